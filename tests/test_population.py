"""Tests of `tfbn.PopulationStats`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import layers

import tfbn
from tfbn import population as module


@pytest.fixture
def model():
    """A network with three batch norm layers."""
    return networks.plain(layers.BatchNormalization)


@pytest.fixture
def stats(model):
    """Its population statistics, made up."""
    return made_up(model, seed=0)


def made_up(model, seed):
    """Statistics of the right shapes."""
    rng = np.random.default_rng(seed)
    before = tfbn.PopulationStats.read(model)
    found = {
        path: tfbn.LayerStats(
            100, rng.normal(size=s.mean.shape), rng.uniform(0.1, 2, size=s.mean.shape)
        )
        for path, s in before.items()
    }
    return tfbn.PopulationStats(
        found,
        method="pooled",
        samples=10,
        batches=2,
        batch_size=5,
        fingerprint=before.fingerprint,
        previous=before,
    )


def weights(model):
    """All weights."""
    return [np.array(w) for w in model.get_weights()]


def assert_same(a, b):
    """To the bit."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_assign_sets_the_layers_and_undoes_to_the_bit(model, stats):
    networks.batch_norms(model)[0].moving_mean.assign([0.1, 1e-30, -3e20, 1 / 3])
    before = weights(model)
    previous = stats.assign(model)
    for bn, expected in zip(networks.batch_norms(model), stats.values(), strict=True):
        np.testing.assert_array_equal(bn.moving_mean, expected.mean.astype("float32"))
        np.testing.assert_array_equal(bn.moving_variance, expected.variance.astype("float32"))
    again = previous.assign(model)
    assert_same(before, weights(model))
    assert again.method == previous.method == "assigned"


def test_assign_knows_what_it_put_where(model, stats):
    assert module.assigned(model) is None
    previous = stats.assign(model)
    assert module.assigned(model) is stats
    assert stats.mismatch(model) is None
    bn = networks.batch_norms(model)[1]
    held = bn.moving_mean.numpy()
    bn.moving_mean.assign(held + 1)
    assert f"moving_mean of layer '{bn.name}'" in stats.mismatch(model)
    bn.moving_mean.assign(held)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    assert "weights have changed" in stats.mismatch(model)
    previous.assign(model)
    assert module.assigned(model) is None


def test_assign_refuses_another_model_and_names_the_first_difference(stats):
    last = list(stats)[-1]
    one = keras.Sequential([keras.Input((4,)), *map(layer_named, list(stats)[:-1])])
    before = weights(one)
    with pytest.raises(ValueError, match=f"no batch norm layer '{last}'"):
        stats.assign(one)
    assert_same(before, weights(one))
    wide = keras.Sequential([keras.Input((7,)), *map(layer_named, stats)])
    before = weights(wide)
    with pytest.raises(ValueError, match=r"shape \(7,\) for layer.*Received: shape \(4,\)"):
        stats.assign(wide)
    assert_same(before, weights(wide))


def layer_named(name):
    """A batch norm layer of that name."""
    return layers.BatchNormalization(name=name)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_assign_refuses_what_is_not_finite_in_the_variable(model, stats, value):
    path = list(stats)[-1]
    spoiled = {**stats}
    variance = stats[path].variance.copy()
    variance[1] = value
    spoiled[path] = tfbn.LayerStats(100, stats[path].mean, variance)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"(?s)'{path}'.*moving_variance.*channel 1"):
        tfbn.PopulationStats(spoiled, method="pooled").assign(model)
    assert_same(before, weights(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", range(6))
def test_an_interrupted_assign_puts_everything_back(model, stats, fails_at, error, monkeypatch):
    before = weights(model)
    calls = []
    variable = type(networks.batch_norms(model)[0].moving_mean)
    original = variable.assign

    def assign(self, value):
        calls.append(self)
        if len(calls) == fails_at + 1:
            raise error("stop")
        return original(self, value)

    monkeypatch.setattr(variable, "assign", assign)
    with pytest.raises(error, match="stop"):
        stats.assign(model)
    monkeypatch.undo()
    assert len(calls) > fails_at
    assert_same(before, weights(model))
    assert module.assigned(model) is None


@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
def test_merged_shards_are_one_sweep_over_all(model, method):
    x = networks.data(model, 60)
    shards = [x[:16], x[16:48], x[48:]]
    parts = [
        tfbn.collect(model, shard, method=method, batch_size=16, verbose=0) for shard in shards
    ]
    whole = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    for total in (
        parts[0].merge(parts[1]).merge(parts[2]),
        parts[2].merge(parts[1].merge(parts[0])),
    ):
        assert (total.samples, total.batches, total.batch_size) == (60, 4, 16)
        for path in whole:
            assert total[path].count == whole[path].count
            np.testing.assert_allclose(total[path].mean, whole[path].mean, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(total[path].variance, whole[path].variance, rtol=1e-9)


def shards(draw_values):
    """Statistics of shards, and all their values together."""
    parts = []
    for values in draw_values:
        layer = tfbn.LayerStats(len(values), np.mean(values, 0), np.var(values, 0))
        parts.append(
            tfbn.PopulationStats({"bn": layer}, method="pooled", samples=len(values), batches=1)
        )
    return parts, np.concatenate(draw_values)


@given(
    st.lists(
        st.integers(1, 9).flatmap(
            lambda n: arrays(np.float64, (n, 2), elements=st.floats(-1e3, 1e3))
        ),
        min_size=3,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_shards_merge_in_any_order_and_grouping(draw_values, random):
    parts, values = shards(draw_values)
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    [total] = parts
    assert total.samples == total["bn"].count == len(values)
    assert total.batches == len(draw_values)
    np.testing.assert_allclose(total["bn"].mean, values.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(total["bn"].variance, values.var(0), rtol=1e-9, atol=1e-6)


def test_merge_refuses_what_does_not_belong_together(model, stats):
    exact = tfbn.collect(model, networks.data(model, 20), method="exact", verbose=0)
    with pytest.raises(ValueError, match="'exact' and 'exact'"):
        exact.merge(exact)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    with pytest.raises(ValueError, match="same weights"):
        stats.merge(made_up(model, 1))
    with pytest.raises(ValueError, match="PopulationStats"):
        stats.merge({})
    first = next(iter(stats))
    fewer = tfbn.PopulationStats({first: stats[first]}, method="pooled")
    with pytest.raises(ValueError, match="3 layers in one and 1"):
        stats.merge(fewer)


def test_compare_is_what_it_says():
    ours = tfbn.LayerStats(9, np.array([1.0, 2.0]), np.array([4.0, 9.0]))
    theirs = tfbn.LayerStats(9, np.array([2.0, -1.0]), np.array([16.0, 9.0]))
    near = tfbn.LayerStats(9, np.array([1.0, 2.1]), np.array([4.0, 9.0]))
    a = tfbn.PopulationStats({"near": ours, "far": ours}, method="pooled")
    b = tfbn.PopulationStats({"near": near, "far": theirs}, method="pooled")
    report = a.compare(b)
    assert list(report) == ["far", "near"]
    far = report["far"]
    np.testing.assert_allclose(far["mean_shift"], np.sqrt((0.5**2 + 1) / 2))
    np.testing.assert_allclose(far["mean_shift_max"], 1)
    np.testing.assert_allclose(far["std_ratio"], np.sqrt(2))
    np.testing.assert_allclose(far["std_ratio_max"], 2)


def test_summary_has_the_worst_layer_first(model, stats):
    lines = []
    stats.summary(print_fn=lines.append)
    assert "pooled" in lines[0] and "10 samples" in lines[0]
    worst, *_ = stats.compare(stats.previous)
    assert lines[2].split()[0] == worst
    assert lines[2].split()[1] == "100"
    assert lines[2].split()[-1] == f"{10**-0.5:.4f}"
    assert len(lines) == 2 + len(stats)


def test_to_dict_survives_json(stats):
    found = json.loads(json.dumps(stats.to_dict()))
    assert found["method"] == "pooled" and found["samples"] == 10
    for path, layer in stats.items():
        np.testing.assert_array_equal(found["layers"][path]["mean"], layer.mean)
        np.testing.assert_array_equal(found["layers"][path]["variance"], layer.variance)


# Files.


def test_save_and_load_to_the_bit(stats, tmp_path):
    path = tmp_path / "digits.stats"
    stats.save(path)
    assert os.listdir(tmp_path) == ["digits.stats"]
    loaded = tfbn.PopulationStats.load(path)
    assert loaded == stats
    assert loaded.previous == stats.previous
    for name in ("method", "samples", "batches", "batch_size", "fingerprint"):
        assert getattr(loaded, name) == getattr(stats, name)


def test_counts_that_differ_between_channels_are_merged_and_saved(tmp_path):
    # A mask can tell channels apart, where they are not on the last axis.
    rng = np.random.default_rng(0)
    shards = [[rng.normal(size=n) for n in counts] for counts in ((3, 5), (4, 2))]
    parts = []
    for shard in shards:
        counts = np.array([len(values) for values in shard])
        mean, variance = (np.array([f(values) for values in shard]) for f in (np.mean, np.var))
        layer = tfbn.LayerStats(counts, mean, variance)
        parts.append(tfbn.PopulationStats({"bn": layer}, method="pooled", samples=5))
    parts[0].merge(parts[1]).save(tmp_path / "stats.npz")
    loaded = tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert json.loads(json.dumps(loaded.to_dict()))["layers"]["bn"]["count"] == 7
    assert loaded["bn"].count == 7
    parts[0].save(tmp_path / "part.npz")
    part = tfbn.PopulationStats.load(tmp_path / "part.npz")
    assert part == parts[0]
    assert part.to_dict()["layers"]["bn"]["count"] == [3, 5]
    for channel, both in enumerate(zip(*shards, strict=True)):
        values = np.concatenate(both)
        np.testing.assert_allclose(loaded["bn"].mean[channel], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(loaded["bn"].variance[channel], values.var(), rtol=1e-12)


def test_renorm_is_saved_too(tmp_path):
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    model.set_weights([np.full(3, i + 1.5) for i in range(7)])
    before = weights(model)
    tfbn.PopulationStats.read(model).save(tmp_path / "before.npz")
    made_up(model, 0).assign(model)
    tfbn.PopulationStats.load(tmp_path / "before.npz").assign(model)
    assert_same(before, weights(model))


@pytest.mark.parametrize("position", np.linspace(0, 0.999, 23))
def test_a_damaged_file_is_refused(stats, tmp_path, position):
    path = tmp_path / "stats.npz"
    stats.save(path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0xFF
    path.write_bytes(content)
    try:
        loaded = tfbn.PopulationStats.load(path)
    except ValueError as error:
        assert "Received" in str(error) and "stats.npz" in str(error)
    else:  # Some bytes of a zip archive, such as times, carry nothing.
        assert loaded == stats


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Received: .*damaged or another kind"):
        tfbn.PopulationStats.load(path)


def test_a_cut_file_is_refused(stats, tmp_path):
    path = tmp_path / "stats.npz"
    stats.save(path)
    content = path.read_bytes()
    for end in range(0, len(content), len(content) // 17):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="Received"):
            tfbn.PopulationStats.load(path)


def test_a_pickle_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "stats.npz", header=np.array([Hostile()], dtype=object))
    with pytest.raises(ValueError, match="Received"):
        tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(stats, tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    stats.save(path)
    old = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stats.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["stats.npz"]


KILLED = """
import sys, numpy as np, tfbn
path = sys.argv[1]
layers = {f"layer_{i}": tfbn.LayerStats(1, np.zeros(20000), np.ones(20000)) for i in range(20)}
i = 0
while True:
    i += 1
    value = {p: tfbn.LayerStats(i, np.full(20000, float(i)), s.variance) for p, s in layers.items()}
    tfbn.PopulationStats(value, method="pooled", samples=i).save(path)
    print("saved", flush=True)
"""


def test_a_killed_process_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "stats.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        rng = np.random.default_rng(0)
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    loaded = tfbn.PopulationStats.load(path)
    assert {layer.count for layer in loaded.values()} == {loaded.samples}
    assert all(np.all(layer.mean == loaded.samples) for layer in loaded.values())
