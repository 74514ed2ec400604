"""Tests of statistics in half precision, and of warnings after a sweep."""

import warnings

import keras
import networks
import numpy as np
import pytest
from keras import layers
from states import FIRST, SECOND, batch, begun, of, swept, values

import tfbn
from tfbn.stats import moments
from tfbn.sweep import results

EPSILON = 1e-3


def two_layers(dtype):
    """Build two batch norm layers in sequence."""
    bn = [layers.BatchNormalization(dtype=dtype, epsilon=EPSILON, name=n) for n in ("one", "two")]
    return keras.Sequential([keras.Input((2,), dtype="float32"), *bn])


def data(dtype):
    """Draw integers that the dtype can represent, with a mean that it cannot."""
    high = {"bfloat16": 256, "float16": 2048}[dtype]
    step = high // 128 if dtype == "bfloat16" else high // 1024
    rng = np.random.default_rng(0)
    return (high + step * rng.choice(4, (4000, 2), p=[0.25, 0.3, 0.25, 0.2])).astype("float32")


def to(dtype, value):
    """Round to a dtype and return float64."""
    return keras.ops.convert_to_numpy(keras.ops.cast(value, dtype)).astype("float64")


def sweep(model, x, engine):
    """Return the statistics from one of the engines."""
    if engine == "shards":
        return tfbn.collect_shards(model, [x[:100], x[100:]], verbose=0)
    options = {"memory_limit": 0} if engine == "again" else {}
    return tfbn.collect(model, x, batch_size=500, verbose=0, **options)


@pytest.mark.parametrize("engine", ["once", "again", "shards"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_later_layers_are_measured_with_the_statistics_that_variables_hold(dtype, engine):
    model, x = two_layers(dtype), data(dtype)
    with pytest.warns(
        UserWarning, match=rf"'one' has statistics in {dtype}.* standard dev.*mixed_"
    ):
        one, two = sweep(model, x, engine).values()
    wide = x.astype("float64")
    np.testing.assert_allclose(one.mean, wide.mean(0), rtol=1e-6)
    held_mean, held_variance = to(dtype, wide.mean(0)), to(dtype, wide.var(0))
    assert np.all(np.abs(held_mean - wide.mean(0)) > 0.02 * wide.std(0))
    normalized = (wide - held_mean) / np.sqrt(held_variance + EPSILON)
    # The outputs of the first layer are in half precision: up to 2^-9 of 2 for bfloat16.
    networks.assert_layer(two, normalized.mean(0), normalized.var(0), 0.02)
    # In inference the input of the second layer has these statistics, also after another sweep.
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = tfbn.update_population_stats(model, x, batch_size=500, verbose=0)
        np.testing.assert_allclose(stats["two"].mean, two.mean, atol=1e-6)
        between = keras.ops.convert_to_numpy(model.layers[0](x, training=False)).astype("float64")
        np.testing.assert_allclose(two.mean, between.mean(0), atol=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_advice_keeps_the_statistics(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(two_layers(f"mixed_{dtype}"), data(dtype), verbose=0)
    assert abs(stats["two"].mean).max() < 0.02


def test_a_variance_that_becomes_0_and_a_mean_that_does_not_fit():
    x = np.random.default_rng(0).normal(0, 1e-5, (100, 2)).astype("float32")
    with pytest.warns(UserWarning, match=r"'one' has statistics in float16.*a variance to 0"):
        tfbn.collect(two_layers("float16"), x, method="pooled", batch_size=50, verbose=0)
    large = keras.Sequential(
        [
            keras.Input((2,)),
            layers.BatchNormalization(dtype="float16", name="one"),
            layers.BatchNormalization(name="two"),
        ]
    )
    held = [w.copy() for w in large.get_weights()]
    wide = np.random.default_rng(0).normal(0, 1000, (100, 2)).astype("float32")
    with pytest.raises(ValueError, match=r"float16 can hold for layer 'one'.*moving_variance"):
        tfbn.update_population_stats(large, wide, verbose=0)
    for before, after in zip(held, large.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_what_is_finished_holds_every_layer_that_inference_calls():
    bns = {name: layers.BatchNormalization(name=name) for name in "ab"}
    model = keras.Sequential([keras.Input((2,)), *bns.values()])
    previous = tfbn.PopulationStats.read(model)

    def finish(state):
        return results.finish(state.next_level(), model, bns, previous, warned=True)

    x = values(4, 0)
    one_level = {"a": 1, "b": 1}
    done = swept(begun(), [(SECOND, x), (FIRST, x)], levels=one_level)
    stats = finish(done)
    assert list(stats) == ["a", "b"] and stats.previous is previous
    np.testing.assert_allclose(stats["a"].variance, x.var(0), rtol=1e-12)
    lacking = swept(begun(), [(FIRST, x)], levels=one_level)
    stats = finish(lacking)
    assert list(stats) == list(stats.previous) == ["a"]
    with pytest.raises(ValueError, match="does not call a, b"):
        finish(begun().add(batch(4), []))
    none = moments.of_values(*np.zeros((3, 2)))
    masked = begun().add(batch(4), [(FIRST, of(x)), (SECOND, none)])
    with pytest.raises(ValueError, match="values for layer 'b'"):
        finish(masked)


@pytest.mark.parametrize("sweep", [tfbn.collect, tfbn.update_population_stats])
def test_warnings_are_about_the_line_that_sweeps(sweep):
    model = keras.Sequential([keras.Input((2,)), *two_layers("float32").layers])
    with pytest.warns(UserWarning, match="one-pass sweep over batches of 4") as caught:
        sweep(model, values(8, 0), method="pooled", batch_size=4, verbose=0)
    assert [warning.filename for warning in caught] == [__file__]


def test_renorm_sets_all_statistics():
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    x = networks.data(model, 40)
    before = model.get_weights()
    stats = tfbn.update_population_stats(model, x, verbose=0)
    v = x.astype(np.float64)
    bn = model.layers[-1]
    networks.assert_layer(bn, v.mean(0), v.var(0))
    np.testing.assert_allclose(bn.moving_stddev, np.sqrt(v.var(0) + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(bn.renorm_mean, v.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.renorm_stddev, np.sqrt(v.var(0) + 1e-3), rtol=1e-5)
    stats.previous.assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_small_batches_are_warned_of_only_where_they_matter():
    deep = networks.plain(layers.BatchNormalization)
    x = networks.data(deep, 20)
    with pytest.warns(UserWarning, match="exact"):
        tfbn.collect(deep, x, method="pooled", batch_size=8, verbose=0)
    flat = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tfbn.collect(deep, x, method="pooled", batch_size=16, verbose=0)
        tfbn.collect(deep, x, method="exact", batch_size=2, verbose=0)
        tfbn.collect(flat, networks.data(flat, 20), method="pooled", batch_size=2, verbose=0)


def test_statistics_that_do_not_fit_the_variable():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(dtype="float32")])
    x = networks.data(model, 40) * np.float32(1e25)  # The variance is beyond float32.
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"finite|Received"):
        tfbn.update_population_stats(model, x, verbose=0)
    networks.assert_same(before, model.get_weights())


def test_renorm_survives_save_load_and_assign(tmp_path):
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    model.compile("sgd", "mse")
    model.fit(networks.normal(64, 3, loc=2), networks.normal(64, 3), epochs=2, verbose=0)
    before = model.get_weights()
    stats = tfbn.update_population_stats(model, networks.normal(64, 3, loc=-5, scale=3), verbose=0)
    stats.previous.save(tmp_path / "before.npz")
    tfbn.PopulationStats.load(tmp_path / "before.npz").assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
