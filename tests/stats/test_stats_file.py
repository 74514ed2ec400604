"""Tests of files of population statistics: `PopulationStats.save` and `load`."""

import contextlib
import functools
import json
import os
import pathlib
import time
import tracemalloc
from random import Random

import keras
import numpy as np
import pytest
import safetensors.numpy
from damage import damaged
from keras import layers

import tfbn
from tfbn.files import sealed

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
ATTRIBUTES = ("method", "samples", "batches", "batch_size", "fingerprint", "levels")


def made_up(channels=(3, 600), method="pooled", seed=0):
    """Return random statistics, with renorm values in `previous`.

    One layer has arrays of more than 4,096 bytes, which NumPy reads in several steps.
    """
    rng = np.random.default_rng(seed)

    def layer(n, count, renorm=None):
        return tfbn.LayerStats(count, rng.normal(size=n), rng.uniform(0.1, 2, n), renorm)

    before = {
        f"bn_{i}": layer(n, 0, {name: rng.normal(size=n) for name in RENORM})
        for i, n in enumerate(channels)
    }
    swept = {
        path: layer(len(s.mean), rng.integers(1, 99, len(s.mean))) for path, s in before.items()
    }
    return tfbn.PopulationStats(
        swept,
        method=method,
        samples=10,
        batches=2,
        batch_size=5,
        fingerprint="ab" * 32,
        previous=tfbn.PopulationStats(before, method="assigned"),
        levels=4,
    )


def assert_equal(a, b):
    """Compare everything that a file stores, bit for bit."""
    assert list(a.items()) == list(b.items())
    assert (a.previous is None) == (b.previous is None)
    for x, y in ((a, b), (a.previous, b.previous)):
        if x is not None:
            assert [getattr(x, name) for name in ATTRIBUTES] == [
                getattr(y, name) for name in ATTRIBUTES
            ]
    if a.previous is not None:
        assert list(a.previous.items()) == list(b.previous.items())


@pytest.mark.parametrize("method", ["exact", "pooled", "algorithm2"])
def test_save_and_load_to_the_bit(tmp_path, method):
    stats = made_up(method=method)
    path = tmp_path / "digits.stats"
    stats.save(path)
    assert os.listdir(tmp_path) == ["digits.stats"]
    assert_equal(tfbn.PopulationStats.load(path), stats)
    assert_equal(tfbn.PopulationStats.load(str(path)), stats)
    assert_equal(tfbn.PopulationStats.from_bytes(stats.to_bytes()), stats)
    assert path.read_bytes() == stats.to_bytes()
    empty = tfbn.PopulationStats({}, method="assigned")
    assert_equal(tfbn.PopulationStats.from_bytes(empty.to_bytes()), empty)


def test_safetensors_reads_the_file(tmp_path):
    stats = made_up()
    stats.save(tmp_path / "stats.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "stats.safetensors")
    for i, layer in enumerate(stats.values()):
        np.testing.assert_array_equal(arrays[f"count_{i}"], layer.counts)
        np.testing.assert_array_equal(arrays[f"mean_{i}"], layer.mean)
        np.testing.assert_array_equal(arrays[f"variance_{i}"], layer.variance)


def test_previous_of_a_layer_with_renorm_undoes_from_a_file(tmp_path):
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    model.set_weights([np.full(3, i + 0.1, "float32") for i in range(7)])
    before = model.get_weights()
    [(path, current)] = tfbn.PopulationStats.read(model).items()
    swept = tfbn.PopulationStats(
        {path: tfbn.LayerStats(9, [1, 2, 3], [4, 5, 6])},
        method="exact",
        previous=tfbn.PopulationStats.read(model),
    )
    swept.save(tmp_path / "swept.npz")
    loaded = tfbn.PopulationStats.load(tmp_path / "swept.npz")
    previous = loaded.assign(model)
    assert previous[path] == loaded.previous[path] == current
    previous.save(tmp_path / "previous.npz")
    stddev = np.sqrt(np.array([4, 5, 6]) + model.layers[0].epsilon)
    np.testing.assert_allclose(model.layers[0].renorm_stddev, stddev, rtol=1e-6)
    np.testing.assert_array_equal(model.layers[0].renorm_mean, [1, 2, 3])
    for undo in (
        previous,
        loaded.previous,
        tfbn.PopulationStats.load(tmp_path / "previous.npz"),
    ):
        loaded.assign(model)
        undo.assign(model)
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_unknown_format_is_refused():
    header, arrays = sealed.unpack(made_up().to_bytes())
    later = sealed.pack({**header, "format": 5, "tfbn": "9.9"}, arrays)
    with pytest.raises(ValueError, match=r"format 5, written by tfbn '9.9'"):
        tfbn.PopulationStats.from_bytes(later)
    with pytest.raises(ValueError, match="no checksum"):
        tfbn.PopulationStats.from_bytes(safetensors.numpy.save(arrays))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY", b"PK\5\6" + bytes(18)]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Received: .*stats.npz.*damaged or another kind"):
        tfbn.PopulationStats.load(path)


def test_pickles_are_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "stats.npz", header=np.array([Hostile()], dtype=object))
    with pytest.raises(ValueError, match="Received"):
        tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert not (tmp_path / "ran").exists()


# Any bytes load as the saved statistics or raise one ValueError, in bounded time and memory.
# Statistics that load are usable.


VALUES = [np.nan, np.inf, -np.inf, -1.0, -1e-300, 1e300, 0.0, -0.0, 1e39, 2.0**60]
JUNK = [None, True, -1, 0, 1, 2, 3, 4, 1.5, 1e300, 2**70, "", "bn_0", "magic", "assigned", "exact"]
JUNK += ["pooled", [], ["bn_0"], ["bn_0", "bn_0"], [["bn_0"]], [3], {}, {"layers": []}, "x" * 9999]


def craft(header, arrays, random):
    """Build a file from a header and arrays with random changes."""
    header, arrays = json.loads(json.dumps(header)), dict(arrays)
    for _ in range(random.randrange(1, 4)):
        name = random.choice(list(arrays) or [""])
        kind = random.choice(["value", "value", "header", "previous", "array", "drop", "rename"])
        if kind == "header" or not arrays:
            header[random.choice(list(header))] = random.choice(JUNK)
        elif kind == "previous" and isinstance(header.get("previous"), dict):
            previous = header["previous"]
            previous[random.choice([*previous, "more"])] = random.choice(JUNK)
        elif kind == "value" and arrays[name].dtype.kind == "f" and arrays[name].size:
            arrays[name] = arrays[name].copy()
            arrays[name].flat[random.randrange(arrays[name].size)] = random.choice(VALUES)
        elif kind == "array":
            shape = random.choice([(), (0,), (2,), (3,), (3, 1), (600,), (10**6,)])
            dtype = random.choice(["f8", "f4", "f2", "i8", "u8", "?", ">f8"])
            arrays[name] = np.full(shape, random.choice([0, 1, 1, -1]), float).astype(dtype)
        elif kind == "drop":
            del arrays[name]
        elif kind == "rename":
            arrays[random.choice([random.choice(list(arrays)), "more", "mean_9"])] = arrays.pop(
                name
            )
    return sealed.pack(header, arrays)


def network():
    """Build a model with the layers of `made_up`."""
    inputs = [keras.Input((3,)), keras.Input((600,))]
    normalized = [layers.BatchNormalization(name=f"bn_{i}")(x) for i, x in enumerate(inputs)]
    return keras.Model(inputs, normalized)


def use(stats, model):
    """Check that loaded statistics are possible, and that every use works or raises ValueError."""
    assert stats.method in ("exact", "pooled", "algorithm2", "assigned")
    for layer in stats.values():
        assert layer.mean.shape == layer.variance.shape == layer.counts.shape == (len(layer.mean),)
        assert 0 <= layer.counts.min() == layer.count
        if stats.method != "assigned":
            assert np.isfinite(layer.mean).all() and np.isfinite(layer.variance).all()
            assert (layer.variance >= 0).all()
    stats.summary(print_fn=len)
    stats._repr_html_()
    json.dumps(stats.to_dict())
    assert_equal(tfbn.PopulationStats.from_bytes(stats.to_bytes()), stats)
    with contextlib.suppress(ValueError):
        stats.merge(stats)
    with contextlib.suppress(ValueError):
        stats.compare(stats.previous or {})
    before = model.get_weights()
    try:
        previous = stats.assign(model)
    except ValueError:
        pass
    else:
        if stats.method != "assigned":
            assert all(np.isfinite(w).all() for w in model.get_weights())
            assert all((bn.moving_variance.numpy() >= 0).all() for bn in model.layers[2:])
        stats.mismatch(model)
        previous.assign(model)
    assert list(map(np.ndarray.tobytes, before)) == list(
        map(np.ndarray.tobytes, model.get_weights())
    )


def load(content):
    """Load a file in bounded time and memory; return `None` if it is refused."""
    start = time.thread_time()
    tracemalloc.start()
    try:
        return tfbn.PopulationStats.from_bytes(content)
    except ValueError as error:
        assert "Received" in str(error) and len(str(error)) < 2000
        return None
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 3 * len(content) + (1 << 20)
        assert time.thread_time() - start < 5


@functools.cache
def samples():
    """Return statistics, their bytes, and a model for them."""
    stats = made_up()
    return stats, stats.to_bytes(), network()


def changed(content, **changes):
    """Return a file with some attributes or arrays changed, and a valid checksum."""
    header, arrays = sealed.unpack(content)
    for name, value in changes.items():
        target = arrays if name in arrays or isinstance(value, np.ndarray) else header
        target[name] = value
    arrays = {name: value for name, value in arrays.items() if value is not None}
    return sealed.pack(header, arrays)


IMPOSSIBLE = [
    {"variance_0": np.array([1.0, -1.0, 1.0])},
    {"variance_0": np.array([1.0, np.nan, 1.0])},
    {"variance_0": np.array([1.0, np.inf, 1.0])},
    {"variance_0": np.array([1.0, 1.0])},
    {"variance_0": np.array(1.0)},
    {"variance_0": np.array([True, True, True])},
    {"mean_0": np.array([0.0, np.nan, 0.0])},
    {"mean_0": np.array([0.0, -np.inf, 0.0])},
    {"mean_0": np.array([[0.0, 1.0, 0.0]])},
    {"mean_0": np.array([])},
    {"mean_0": None},
    {"mean_9": np.zeros(3)},
    {"count_0": np.array(-1)},
    {"count_0": np.array([1, 2, -3])},
    {"count_0": np.array([1, 2])},
    {"count_0": np.array(1.5)},
    {"count_0": np.array(2**60)},
    {"previous_mean_0": np.zeros(2)},
    {"previous_variance_1": None},
    {"method": "magic"},
    {"method": None},
    {"method": ["pooled"]},
    {"samples": -1},
    {"samples": 1.5},
    {"samples": "ten"},
    {"batches": None},
    {"batch_size": 2**64},
    {"levels": {}},
    {"fingerprint": 3},
    {"layers": ["bn_0"]},
    {"layers": ["bn_0", "bn_0"]},
    {"layers": ["bn_0", 1]},
    {"layers": {"bn_0": 0, "bn_1": 1}},
    {"layers": None},
    {"previous": ["bn_0", "bn_1", "bn_2"]},
    {"previous": {"layers": ["bn_0", "bn_1"]}},
    {"previous": "bn" * 5000},
    {"format": None},
    {"format": 1},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=lambda changes: "-".join(changes))
def test_impossible_statistics_are_refused(tmp_path, changes):
    content = samples()[1]
    path = tmp_path / "stats.npz"
    path.write_bytes(changed(content))
    tfbn.PopulationStats.load(path)
    bad = changed(content, **changes)
    assert load(bad) is None
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=r"(?s)^Expected .* Received: '.*stats\.npz', which is "):
        tfbn.PopulationStats.load(path)


def test_statistics_of_a_broken_model_load(tmp_path):
    broken = tfbn.PopulationStats(
        {"bn": tfbn.LayerStats(0, [np.nan, 1], [-1, np.inf])}, method="assigned"
    )
    assert_equal(tfbn.PopulationStats.from_bytes(broken.to_bytes()), broken)
    fixed = {"bn": tfbn.LayerStats(3, [0, 1], [1, 2])}
    stats = tfbn.PopulationStats(fixed, method="exact", previous=broken)
    assert_equal(tfbn.PopulationStats.from_bytes(stats.to_bytes()), stats)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_1": np.zeros(10**6)},
        {"mean_1": np.zeros(10**6), "variance_1": np.zeros(10**6), "count_1": np.array(3)},
        {"previous_mean_1": np.zeros(10**6)},
        {"mean_0": np.zeros((1, 10**6)), "variance_0": np.zeros((10**6, 1))},
        {"count_1": np.zeros(10**6, np.int32)},
        {"more": np.zeros(10**6)},
    ],
)
def test_memory_is_bounded_by_the_file_size(changes):
    load(changed(samples()[1], **changes))


def fuzz(seed):
    """Load four damaged copies of a file, and one crafted file."""
    random = Random(seed)
    stats, content, model = samples()
    assert_equal(tfbn.PopulationStats.from_bytes(content), stats)
    for _ in range(4):
        loaded = load(damaged(content, random))
        if loaded is not None:
            assert_equal(loaded, stats)
    loaded = load(craft(*sealed.unpack(content), random))
    if loaded is not None:
        use(loaded, model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(0, 240, 30))
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_damaged_files_load_unchanged_or_are_refused(seed):
    for i in range(seed, seed + 30):
        fuzz(i)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_many_damaged_files_load_unchanged_or_are_refused():
    for seed in range(1000, 2000):
        fuzz(seed)
