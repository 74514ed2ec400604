"""Tests of files of population statistics: `PopulationStats.save` and `load`."""

import io
import os
import pathlib

import keras
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn import storage

OLD = pathlib.Path(__file__).parent / "data"
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
ATTRIBUTES = ("method", "samples", "batches", "batch_size", "fingerprint", "levels")


def made_up(channels=(3, 600), method="pooled", seed=0):
    """Statistics of some layers, and of what was there before, which has renorm values too.

    Arrays of more than 4,096 bytes are of interest: NumPy reads them in several steps.
    """
    rng = np.random.default_rng(seed)

    def layer(n, count, renorm=None):
        return tfbn.LayerStats(count, rng.normal(size=n), rng.uniform(0.1, 2, n), renorm)

    before = {
        f"block/bn_{i}": layer(n, 0, {name: rng.normal(size=n) for name in RENORM})
        for i, n in enumerate(channels)
    }
    found = {
        path: layer(len(s.mean), rng.integers(1, 99, len(s.mean))) for path, s in before.items()
    }
    return tfbn.PopulationStats(
        found,
        method=method,
        samples=10,
        batches=2,
        batch_size=5,
        fingerprint="ab" * 32,
        previous=tfbn.PopulationStats(before, method="assigned"),
        levels=4,
    )


def assert_equal(a, b):
    """All that is in a file is equal, to the bit."""
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


def test_numpy_reads_the_file(tmp_path):
    stats = made_up()
    stats.save(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz") as archive:
        for i, layer in enumerate(stats.values()):
            np.testing.assert_array_equal(archive[f"count_{i}"], layer.counts)
            np.testing.assert_array_equal(archive[f"mean_{i}"], layer.mean)
            np.testing.assert_array_equal(archive[f"variance_{i}"], layer.variance)


def test_previous_of_a_layer_with_renorm_undoes_from_a_file(tmp_path):
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    model.set_weights([np.full(3, i + 0.1, "float32") for i in range(7)])
    before = model.get_weights()
    [(path, held)] = tfbn.PopulationStats.read(model).items()
    swept = tfbn.PopulationStats(
        {path: tfbn.LayerStats(9, [1, 2, 3], [4, 5, 6])},
        method="exact",
        previous=tfbn.PopulationStats.read(model),
    )
    swept.save(tmp_path / "swept.npz")
    loaded = tfbn.PopulationStats.load(tmp_path / "swept.npz")
    previous = loaded.assign(model)
    assert previous[path] == loaded.previous[path] == held
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


def test_files_of_format_2_load():
    swept = tfbn.PopulationStats.load(OLD / "swept_format_2.npz")
    assert [getattr(swept, name) for name in ATTRIBUTES] == ["pooled", 10, 2, 5, "ab" * 32, 1]
    assert list(swept) == list(swept.previous) == ["conv/bn", "bn"]
    assert swept["conv/bn"] == tfbn.LayerStats(100, -1 + np.arange(2) / 3, 1 + np.arange(2) / 7)
    assert swept["bn"] == tfbn.LayerStats([7, 8, 9], 0.5 + np.arange(3) / 3, 1 + np.arange(3) / 7)
    assert swept.previous.method == "assigned"
    assert swept.previous["bn"] == tfbn.LayerStats(0, 6 + np.arange(3) / 3, 1 + np.arange(3) / 7)
    read = tfbn.PopulationStats.load(OLD / "read_format_2.npz")
    assert (read.method, read.previous, read.fingerprint) == ("assigned", None, "cd" * 32)
    renorm = {name: np.arange(3) / k for name, k in zip(RENORM, (3, 5, 7), strict=True)}
    assert read["bn"] == tfbn.LayerStats(0, 2 + np.arange(3) / 3, 1 + np.arange(3) / 7, renorm)
    for stats in (swept, read):
        assert_equal(tfbn.PopulationStats.from_bytes(stats.to_bytes()), stats)
    with pytest.raises(ValueError, match="part of a sweep"):
        tfbn.PopulationStats.load(OLD / "part_format_2.npz")


def test_a_later_format_says_so(tmp_path):
    header, arrays = storage.unpack(made_up().to_bytes())
    later = storage.pack({**header, "format": 4, "tfbn": "9.9"}, arrays)
    with pytest.raises(ValueError, match=r"format 4, as tfbn '9.9' writes it"):
        tfbn.PopulationStats.from_bytes(later)
    with pytest.raises(ValueError, match="no checksum"):
        tfbn.PopulationStats.from_bytes(unsealed(later))


def unsealed(content):
    """The same archive without its checksum."""
    arrays = dict(np.load(io.BytesIO(content)))
    again = io.BytesIO()
    np.savez(again, **arrays)
    return again.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY", b"PK\5\6" + bytes(18)]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Received: .*stats.npz.*damaged or another kind"):
        tfbn.PopulationStats.load(path)


def test_a_pickle_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "stats.npz", header=np.array([Hostile()], dtype=object))
    with pytest.raises(ValueError, match="Received"):
        tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert not (tmp_path / "ran").exists()
