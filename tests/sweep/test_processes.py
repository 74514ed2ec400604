"""Tests of models in the processes of a cluster."""

import gc
import multiprocessing
import os
import pathlib
import pickle
import weakref

import cloudpickle
import keras
import networks
import numpy as np
import pytest
import shard_workers as work
from keras import layers

import tfbn


@pytest.mark.slow
def test_in_other_processes_layers_go_by_the_names_they_have_here(pool, tmp_path):
    source = work.Source(0)
    model = source()
    x = networks.data(model, 24)
    stats = tfbn.collect_shards(
        source, work.in_file(tmp_path, x, 7, 7, 15), map=pool.map, load=work.slice_of, verbose=0
    )
    networks.assert_statistics(stats, tfbn.collect(model, x, verbose=0), 1e-6)


def loads_and_traces(pool, tmp_path, shards, by_value):
    """Return the process ids of all loads, and of all Python calls of the model."""
    log = tmp_path / f"calls-{len(shards)}-{by_value}"
    path = tmp_path / "counted.keras"
    work.counting(str(log)).save(path)
    loads = tmp_path / f"loads-{len(shards)}-{by_value}"
    log.unlink()

    def load():

        with open(loads, "a") as file:
            file.write(f"{os.getpid()}\n")
        return keras.models.load_model(path)

    def map_by_value(function, items):
        packed = cloudpickle.dumps(function)
        return pool.map(unpack, [(packed, item) for item in items])

    source = load if by_value else str(path)
    any_map = map_by_value if by_value else pool.map
    tfbn.collect_shards(source, shards, map=any_map, load=work.slice_of, batch_size=2, verbose=0)
    return [
        sorted(pathlib.Path(file).read_text().split()) if pathlib.Path(file).exists() else []
        for file in (loads, log)
    ]


def unpack(packed_and_item):
    """Run a function that was pickled by value."""
    packed, item = packed_and_item
    return pickle.loads(packed)(item)


@pytest.mark.parametrize("by_value", [False, True])
def test_a_process_loads_and_traces_the_model_once(by_value, pool, tmp_path):
    x = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
    few = work.in_file(tmp_path, x, 8, 16)
    many = work.in_file(tmp_path, x, *range(2, 24, 2))
    counts = []  # Calls per process, for each sweep.
    for shards in (few, many):
        loads, calls = loads_and_traces(pool, tmp_path, shards, by_value)
        if by_value:
            assert len(set(loads)) == len(loads)
        counts.append({calls.count(process) for process in calls})
    # Loading calls the model, and so does a trace; tasks do not.
    assert counts[0] == counts[1] and max(counts[1]) <= 8


@pytest.mark.slow
def test_this_process_lets_the_model_go():
    held = []

    def load():
        model = networks.plain(layers.BatchNormalization)
        held.append(weakref.ref(model))
        return model

    tfbn.collect_shards(load, [np.ones((4, 8, 8, 3), "float32")], verbose=0)
    gc.collect()
    assert len(held) == 1 and held[0]() is None


@pytest.mark.slow
def test_other_weights_in_a_worker(pool, tmp_path):
    x = np.zeros((4, 8, 8, 3), "float32")
    with pytest.raises(RuntimeError, match="every process to load the same weights"):
        tfbn.collect_shards(
            work.Source(None),
            work.in_file(tmp_path, x),
            map=pool.map,
            load=work.slice_of,
            verbose=0,
        )


def test_a_model_is_not_sent_to_other_processes(pool):
    model = networks.plain(layers.BatchNormalization)
    with pytest.raises(ValueError, match=r"itself, and a map that sends .*path of a \.keras file"):
        tfbn.collect_shards(model, [networks.data(model, 4)], map=pool.map, verbose=0)


def test_a_process_that_was_forked_is_told():
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 4)
    tfbn.collect_shards(model, [x], method="pooled", verbose=0)
    with (
        multiprocessing.get_context("fork").Pool(1) as forked,
        pytest.raises(RuntimeError, match=r"forked from.*get_context\('spawn'\)"),
    ):
        tfbn.collect_shards(work.Source(0), [x], map=forked.map, verbose=0)
