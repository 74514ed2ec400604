"""`tfbn.collect_shards` on real engines, as `examples/cluster_sweep.py` starts them.

Run them with `pytest -m engines`, with the extra `engines` installed.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn

TESTS = pathlib.Path(__file__).parents[1]
FOLDERS = [TESTS.parent, TESTS.parent / "examples", TESTS, TESTS / "sweep"]
sys.path[:0] = [str(TESTS.parent / "examples"), str(TESTS / "sweep")]

import cluster_sweep  # noqa: E402
import shard_workers as work  # noqa: E402
from cluster_sweep import ENGINES  # noqa: E402

pytestmark = pytest.mark.engines

SAMPLES = 24


@pytest.fixture(scope="module", params=["spark", "ray", "dask"])
def engine(request):
    """The name of an engine, and its `map`, whose workers can import what the tests do."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        with ENGINES[request.param]() as any_map:
            yield request.param, any_map


@pytest.fixture
def any_map(engine):
    """The `map` alone."""
    return engine[1]


@pytest.fixture
def saved(tmp_path):
    """A network in a file, data for it, and shards of that, of which two are empty."""
    keras.utils.set_random_seed(0)
    model = networks.plain(layers.BatchNormalization)
    model.save(tmp_path / "model.keras")
    x = networks.data(model, SAMPLES)
    np.save(tmp_path / "x.npy", x)
    bounds = [(0, 8), (8, 8), (8, 13), (13, 13), (13, SAMPLES)]
    return model, tmp_path / "model.keras", x, [(str(tmp_path / "x.npy"), *b) for b in bounds]


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_the_same_as_in_one_process(method, any_map, saved):
    model, path, x, shards = saved
    stats = tfbn.collect_shards(
        path,
        shards,
        map=any_map,
        load=work.slice_of,
        method=method,
        batch_size=32,
        verbose=0,
    )
    if method == "exact":
        networks.assert_statistics(stats, tfbn.collect(model, x, verbose=0), 1e-6)
    else:
        batches = (x[start:end] for _, start, end in shards if start < end)
        networks.assert_statistics(
            stats, tfbn.collect(model, batches, method=method, verbose=0), 1e-12
        )
    assert stats.batches == 3


def test_a_process_loads_the_model_once(any_map, saved, tmp_path):
    _, path, _, shards = saved
    log = tmp_path / "loads"

    def load():  # Of a test, so that engines pickle it by value, anew for every task.
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return keras.models.load_model(path)

    tfbn.collect_shards(load, shards * 2, map=any_map, load=work.slice_of, verbose=0)
    loads = log.read_text().split()
    assert str(os.getpid()) in loads and 2 <= len(loads) <= 3  # And two workers at most.
    assert len(set(loads)) == len(loads)


def test_an_error_names_the_shard(any_map, saved, tmp_path):
    _, path, _, shards = saved
    shards.append((str(tmp_path / "none.npy"), 0, 3))
    with pytest.raises(Exception, match=r"(?s)every shard to be swept.*shard 5 .*none\.npy"):
        tfbn.collect_shards(path, shards, map=any_map, load=work.slice_of, verbose=0)


def test_a_worker_that_is_killed_while_it_sweeps(any_map, saved, tmp_path):
    model, path, x, shards = saved
    deadly = work.Deadly(tmp_path / "log", 4, shards[-1])
    stats = tfbn.collect_shards(path, shards, map=any_map, load=deadly, verbose=0)
    assert len(deadly.log.read_text().split()) == 4  # Of three levels, the second twice.
    networks.assert_statistics(stats, tfbn.collect(model, x, verbose=0), 1e-6)


def test_the_example(engine, monkeypatch, tmp_path, capsys):
    name, any_map = engine  # It has started as the example would start it, two workers and all.
    monkeypatch.setitem(ENGINES, name, lambda: contextlib.nullcontext(any_map))
    command = ["cluster_sweep.py", "--engine", name, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    cluster_sweep.main()
    assert_example(capsys.readouterr().out, tmp_path)


def test_the_example_as_a_script(tmp_path):
    script = TESTS.parent / "examples" / "cluster_sweep.py"
    command = [sys.executable, script, "--engine", "processes", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_example(done.stdout, tmp_path)


def assert_example(printed, out):
    """It prints its table, and writes statistics that are those of all shards."""
    assert re.search(r"moving averages .*\npopulation statistics ", printed)
    model = keras.models.load_model(out / "model.keras")
    x = np.concatenate([np.load(shard) for shard in sorted(out.glob("train-*.npy"))])
    stats = tfbn.PopulationStats.load(out / "stats.safetensors")
    expected = tfbn.collect(model, x, verbose=0)
    assert stats.samples == expected.samples == len(x)
    for drift in stats.compare(expected).values():
        assert drift["mean_shift_max"] < 1e-6 and drift["std_ratio_max"] < 1 + 1e-6
