"""Tests of `PopulationStats.blend` and `LayerStats.blend`."""

import re

import keras
import networks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import layers

import tfbn
from tfbn.layer import sweep_records

NUMBERS = st.integers(0, 10**6)


def network():
    """Build three batch norm layers with random statistics."""
    model = networks.plain(layers.BatchNormalization)
    rng = np.random.default_rng(1)
    for layer in networks.batch_norms(model):
        layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
        layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_mean.shape))
    return model


@pytest.fixture
def model():
    """Return a network."""
    return network()


@pytest.fixture
def swept(model):
    """Return the statistics of `model` over 6 samples."""
    x = np.random.default_rng(0).normal(2, 3, (6, *model.input_shape[1:]))
    return tfbn.collect(model, x.astype("float32"), batch_size=4, verbose=0)


def layer_stats(draw, channels, count):
    """Draw statistics of a layer."""
    values = st.floats(-1e6, 1e6)
    mean = draw(arrays(np.float64, channels, elements=values))
    variance = draw(arrays(np.float64, channels, elements=st.floats(0, 1e6)))
    return tfbn.LayerStats(count, mean, variance)


@given(st.data(), NUMBERS, st.integers(1, 10**6))
def test_blend_equals_the_mean_with_prior_samples(data, prior_samples, n):
    own, source = (layer_stats(data.draw, 3, count) for count in (7, 9))
    blended = own.blend(source, prior_samples, n)
    np.testing.assert_array_equal(blended.counts, own.counts)
    for name in ("mean", "variance"):
        ours, theirs = getattr(own, name), getattr(source, name)
        right = np.average([theirs, ours], axis=0, weights=[prior_samples, n])
        scale = np.maximum(np.abs(ours), np.abs(theirs))
        assert (np.abs(getattr(blended, name) - right) <= 1e-14 * scale + 1e-300).all()
        if prior_samples == 0:
            np.testing.assert_array_equal(getattr(blended, name), ours)


def test_source_adds_no_standard_error():
    own = tfbn.LayerStats(4, [3.0, 1.0], [1.0, 1.0], None, [0.8, np.nan], [0.4, 0.2])
    blended = own.blend(tfbn.LayerStats(9, [1.0] * 2, [3.0] * 2, None, [7.0] * 2, [7.0] * 2), 3, 1)
    np.testing.assert_allclose(blended.mean_error, [0.2, np.nan])
    np.testing.assert_allclose(blended.variance_error, [0.1, 0.05])


def test_model_is_blended_by_its_number_of_samples(model, swept):
    blended = swept.blend(swept.previous, samples=18)
    assert (blended.prior_samples, swept.prior_samples, blended.samples) == (18, 0, 6)
    assert list(blended) == list(swept) and blended.method == "exact"
    for layer, stats in zip(networks.batch_norms(model), blended.values(), strict=True):
        own = swept[layer.name]
        # 18 of 24 and 6 of 24. The law of total variance would add to the variance.
        right = 0.75 * layer.moving_mean.numpy().astype(np.float64) + 0.25 * own.mean
        np.testing.assert_allclose(stats.mean, right, rtol=1e-14)
        right = 0.75 * layer.moving_variance.numpy().astype(np.float64) + 0.25 * own.variance
        np.testing.assert_allclose(stats.variance, right, rtol=1e-14)
        assert stats.count == own.count
    assert swept.blend(swept.previous, samples=0) == swept


def test_blend_is_assigned_and_undone_to_the_bit(model, swept):
    before = [np.array(w) for w in model.get_weights()]
    blended = swept.blend(swept.previous, samples=2)
    previous = blended.assign(model)
    assert blended.mismatch(model) is None
    assert all(sweep_records.get(layer).stats is blended for layer in networks.batch_norms(model))
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    previous.assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    blended.assign(model)
    blended.previous.assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blend_drops_renorm_values():
    renorm = {name: [5.0] for name in ("moving_stddev", "renorm_mean", "renorm_stddev")}
    source = tfbn.LayerStats(0, [1.0], [3.0], renorm)
    assert tfbn.LayerStats(4, [3.0], [1.0]).blend(source, 1, 1) == tfbn.LayerStats(4, [2.0], [2.0])


def test_files_store_the_prior_samples(tmp_path, swept):
    blended = swept.blend(swept.previous, samples=18)
    blended.save(tmp_path / "stats.npz")
    loaded = tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert loaded == blended and loaded.prior_samples == 18
    assert blended.to_dict()["prior_samples"] == 18
    assert loaded.replace(method="pooled").prior_samples == 18
    lines = []
    loaded.summary(lines.append)
    assert lines[0].endswith("blended: 6 field samples, 18 prior samples")
    swept.summary(lines.clear() or lines.append)
    assert "blended" not in lines[0]


@pytest.mark.slow
def test_export_stores_the_prior_samples(tmp_path, model, swept):
    swept.blend(swept.previous, samples=18).assign(model)
    tfbn.export(model, tmp_path / "served")
    record = tfbn.describe(tmp_path / "served")
    assert record["statistics"]["prior_samples"] == 18 and record["stale"] is None
    assert "blended: 6 field samples, 18 prior samples" in str(record)


def renamed(stats):
    """Rename all layers."""
    return stats.replace(layers={f"other_{path}": s for path, s in stats.items()})


def cut(stats):
    """Remove a channel of the last layer."""
    *_, last = stats
    shorter = tfbn.LayerStats(1, stats[last].mean[1:], stats[last].variance[1:])
    return stats.replace(layers={**stats, last: shorter})


def spoiled(name, value):
    """Return a function that writes an impossible value into the last layer."""

    def spoil(stats):
        *_, last = stats
        values = {"mean": stats[last].mean.copy(), "variance": stats[last].variance.copy()}
        values[name][-1] = value
        return stats.replace(layers={**stats, last: tfbn.LayerStats(1, **values)})

    return spoil


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.replace(fingerprint="2:other"), "same weights.*'2:other'"),
        (lambda s: s.replace(fingerprint=""), "same weights.*''"),
        (renamed, "layer '.*other_"),
        (cut, "same shapes"),
        (spoiled("mean", np.nan), r"finite statistics.*mean nan in channel \d+\..*Layer: '"),
        (spoiled("variance", -1.0), r"finite statistics.*variance -1\.0 in channel"),
        (dict, "PopulationStats, like.*dict"),
    ],
)
def test_incompatible_sources_are_refused(swept, change, says):
    with pytest.raises(ValueError, match=f"Expected .*{says}"):
        swept.blend(change(swept.previous), samples=4)


@pytest.mark.quick(2)
@pytest.mark.parametrize("samples", [-1, 1.5, True, None, "4", 2**53 + 1])
def test_invalid_samples_are_refused(swept, samples):
    with pytest.raises(ValueError, match=rf"Expected samples.*{re.escape(repr(samples))}"):
        swept.blend(swept.previous, samples=samples)
    one, *_ = swept.values()
    with pytest.raises(ValueError, match="Expected samples"):
        one.blend(one, samples, 3)
    with pytest.raises(ValueError, match="Expected field_samples"):
        one.blend(one, 3, 0)


def test_only_unblended_sweeps_can_be_blended(swept):
    blended = swept.blend(swept.previous, samples=4)
    for stats in (blended, swept.previous, swept.replace(samples=0)):
        with pytest.raises(ValueError, match=r"Expected unblended statistics of a sweep.*collect"):
            stats.blend(swept.previous, samples=4)


def test_blended_statistics_cannot_be_merged(swept):
    pooled = swept.replace(method="pooled")
    blended = pooled.blend(swept.previous, samples=4)
    for a, b in ((pooled, blended), (blended, pooled)):
        with pytest.raises(ValueError, match=r"not blended yet.*Merge first, then blend"):
            a.merge(b)
    merged = pooled.merge(pooled).blend(swept.previous, samples=4)
    assert (merged.samples, merged.prior_samples) == (12, 4)


def test_source_may_have_more_layers(model):
    frozen, *others = networks.batch_norms(model)
    frozen.trainable = False
    x = np.random.default_rng(0).normal(size=(5, *model.input_shape[1:])).astype("float32")
    stats = tfbn.collect(model, x, verbose=0)
    blended = stats.blend(tfbn.PopulationStats.read(model), samples=5)
    assert list(blended) == [layer.name for layer in others]
    blended.assign(keras.models.clone_model(model))
