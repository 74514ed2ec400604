"""Tests of the checks that a version must pass before it is put in place."""

import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import (
    BATCH_NORMS,
    ONES,
    HardWired,
    called,
    dense_model,
    everything_under,
    serve,
    sweep,
)
from keras import layers

from tfbn import export, fold
from tfbn.serving.export import endpoint, exporting


class InCompiledFunction(HardWired):
    @tf.function
    def call(self, x):
        return super().call(x)


@pytest.mark.quick(2)
@pytest.mark.parametrize("cls", [HardWired, InCompiledFunction])
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_training_mode_is_refused_and_the_layer_named(tmp_path, batch_norm, cls):
    model = cls(batch_norm)
    model(ONES)
    sweep(model)
    with pytest.raises(ValueError, match=r"'sequential.*/inner'"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []
    assert "call" not in vars(model.block.layers[1])


def test_a_frozen_layer_is_in_inference_mode_whatever_it_is_told(tmp_path):
    model = HardWired(keras.layers.BatchNormalization)
    model(ONES)
    model.block.layers[1].trainable = False
    export(sweep(model), tmp_path)


def test_training_mode_in_a_functional_model_is_never_exported(tmp_path):
    x = keras.Input((4,))
    model = sweep(keras.Model(x, layers.BatchNormalization(name="hard")(x, training=True)))
    given = np.random.default_rng(9).normal(size=(5, 4)).astype("float32")
    gamma, beta, mean, variance = (np.float64(v.numpy()) for v in model.layers[1].weights)
    want = (given - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    # Older versions of Keras 3 use the other of the two `training` arguments.
    if np.allclose(model(given, training=False), want, rtol=1e-4, atol=1e-4):
        served = serve(export(model, tmp_path).path)(**{x.name: given})["output_0"]
        np.testing.assert_allclose(served, want, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="layer 'hard'"):
            export(model, tmp_path)
        assert everything_under(tmp_path) == []


def fused_over_the_first_axis(x):
    channels = x.shape[-1]
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones(channels),
        offset=tf.zeros(channels),
        mean=[],
        variance=[],
        is_training=True,
    )[0]


def test_a_fused_op_in_training_mode_is_refused_wherever_it_is(tmp_path):
    class Own(layers.Layer):
        def call(self, x):
            return tf.function(fused_over_the_first_axis)(x)

    model = keras.Sequential([keras.Input((8, 8, 3)), Own()])
    with pytest.raises(ValueError, match="independent samples"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


def test_a_fused_op_that_normalises_each_sample_is_served(tmp_path):
    class PerSample(layers.Layer):
        def call(self, x):
            one_at_a_time = tf.map_fn(lambda image: fused_over_the_first_axis(image[None])[0], x)
            return tf.ensure_shape(one_at_a_time, x.shape)

    model = keras.Sequential([keras.Input((8, 8, 3), name="x"), PerSample()])
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32")
    centred = x - x.mean((1, 2), keepdims=True)
    want = centred / np.sqrt(x.var((1, 2), keepdims=True) + 1e-4)
    served = serve(export(model, tmp_path).path)(x=x)["output_0"]
    np.testing.assert_allclose(served, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_training_mode_is_refused_where_outputs_do_not_show_it(tmp_path, batch_norm):
    class Saturated(HardWired):
        def call(self, x):
            return tf.sign(super().call(x)) * 0.0

    model = called(Saturated(batch_norm), ONES)
    sweep(model)
    with pytest.raises(ValueError, match=r"'sequential.*/inner'"):
        export(model, tmp_path)
    model = called(HardWired(batch_norm), ONES)
    sweep(model)
    with pytest.raises(ValueError, match=r"'sequential.*/inner'"):  # A batch of one sample.
        export(model, tmp_path, input_signature=[tf.TensorSpec((1, 4), tf.float32)])
    assert everything_under(tmp_path) == []


def test_outputs_that_depend_on_the_batch_are_refused(tmp_path):
    class Centred(layers.Layer):
        def call(self, x):
            return x - tf.reduce_mean(x, 0)

    model = keras.Sequential([keras.Input((4,)), Centred()])
    with pytest.raises(ValueError, match="independent samples"):
        export(model, tmp_path)
    with pytest.raises(ValueError, match="independent samples"):  # A batch of one sample.
        export(model, tmp_path, sample=np.array([[1.0, 2.0, 3.0, 4.0]]))
    assert everything_under(tmp_path) == []


def test_what_cannot_be_verified_is_refused(tmp_path):
    class Picky(layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_greater(x, 1.0)]):
                return tf.identity(x)

    with pytest.raises(ValueError, match=r"random numbers in \[0, 1\)"):
        export(keras.Sequential([keras.Input((4,)), Picky()]), tmp_path)
    assert everything_under(tmp_path) == []


class Constant(layers.Layer):
    """Return a constant output, and an output that depends on the input."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def call(self, x):
        return {"bad": x[:, : len(self.values)] * 0 + self.values, "good": x}


@pytest.mark.parametrize("values", [[np.nan, np.nan], [np.nan, np.inf]])
def test_an_output_without_a_number_is_refused_unless_told_to(tmp_path, values):
    model = keras.Sequential([keras.Input((4,), name="x"), Constant(*values)])
    with pytest.raises(ValueError, match=r"'bad' has no finite value .*allow_nan"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []
    served = serve(export(model, tmp_path, allow_nan=True).path)(x=ONES)
    np.testing.assert_array_equal(served["bad"], [values] * 2)


def test_weights_that_are_nan_are_refused(tmp_path):
    model = dense_model()
    model.get_layer("bn").moving_variance.assign([np.nan, 1.0, 1.0])
    with (
        pytest.warns(UserWarning, match="changed since"),
        pytest.raises(ValueError, match=r"'output_0' has no finite value .*random numbers"),
    ):
        export(model, tmp_path)


@pytest.mark.filterwarnings("error")
def test_some_numbers_are_a_warning_that_says_how_few(tmp_path):
    model = keras.Sequential([keras.Input((4,), name="x"), Constant(np.nan, 1.0)])
    with pytest.warns(UserWarning, match="NaN or infinite in 3 of 6 values on random") as caught:
        export(model, tmp_path)
    assert caught[0].filename == __file__


def test_an_empty_output_is_no_nan(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x[:, :0])])
    export(model, tmp_path)


class Between(layers.Layer):
    """Raise an error for inputs outside an interval, and for lengths other than five."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def call(self, x):
        checks = [
            tf.debugging.assert_greater_equal(x, self.low),
            tf.debugging.assert_less_equal(x, self.high),
        ]
        with tf.control_dependencies(checks):
            return tf.ensure_shape(x, (None, 5))


@pytest.mark.parametrize("kind", ["array", "dataset", "dataset with labels"])
def test_a_sample_verifies_where_random_numbers_cannot(tmp_path, kind):
    # Zeros as the other samples are an error too.
    model = keras.Sequential([keras.Input((None,)), Between(100.0, 255.0)])
    with pytest.raises(ValueError, match=r"random numbers in \[0, 1\).*as sample"):
        export(model, tmp_path)
    sample = np.random.default_rng(0).uniform(100, 255, (4, 5))
    if kind != "array":
        given = (sample, np.zeros(4)) if kind == "dataset with labels" else sample
        sample = tf.data.Dataset.from_tensor_slices(given).batch(2)
    export(model, tmp_path, sample=sample)
    with pytest.raises(ValueError, match="in sample"):
        export(model, tmp_path, sample=np.ones((2, 5, 5)))
    with pytest.raises(ValueError, match="No batches in sample"):
        export(model, tmp_path, sample=np.ones((0, 5)))
    assert os.listdir(tmp_path) == ["1"]


def test_a_sample_needs_no_warmup_and_goes_before_it(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((5,)), Between(0.0, 1.0)])
    with pytest.raises(ValueError, match="on sample"):
        export(model, tmp_path, sample=np.full((2, 5), 2.0))
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    export(model, tmp_path, sample=np.full((2, 5), 0.5))


def cancelling(offset=3e6):
    """Build a network whose mean cancels a bias, so that only the last digits remain."""
    model = keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(3), layers.BatchNormalization()]
    )
    dense, bn = model.layers
    dense.bias.assign([offset] * 3)
    bn.moving_mean.assign([offset] * 3)
    return model


@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_a_fold_is_compared_with_the_networks_own_rounding(tmp_path):
    with pytest.warns(UserWarning, match="one unit in the last place") as caught:
        exported = export(cancelling(), tmp_path, fold=True)
    assert caught[-1].filename == __file__
    assert 1e-2 < exported.max_abs_difference < 1


@pytest.mark.filterwarnings("ignore:The batch norm statistics")
@pytest.mark.parametrize(("offset", "error"), [(0.0, 0.01), (3e6, 20.0)])
def test_a_wrong_fold_is_refused(tmp_path, monkeypatch, offset, error):
    def wrong(model):
        folded = fold(model)
        folded.layers[-1].bias.assign_add([0.0, error, 0.0])
        return folded

    monkeypatch.setattr(exporting, "folded_copy", wrong)
    with pytest.raises(ValueError, match=r"differs by .* on random numbers in \[0, 1\)") as caught:
        export(cancelling(offset), tmp_path, fold=True)
    assert "draw random" not in str(caught.value)  # It has no such layer.
    assert everything_under(tmp_path) == []


def test_each_output_is_compared_on_its_own_scale(tmp_path, monkeypatch):
    class Scales(layers.Layer):
        def call(self, x):
            return {"large": x * 1e6, "small": x}

    model = keras.Sequential([keras.Input((4,)), Scales()])

    def off(network, specs, path, *rest):
        class Off(keras.Model):
            def call(self, x):
                outputs = network(x)
                return {**outputs, "small": outputs["small"] + 0.5}

        return save(called(Off(), ONES), specs, path, *rest)

    save = endpoint.save
    monkeypatch.setattr(endpoint, "save", off)
    with pytest.raises(ValueError, match=r"'small' differs by 0\.5"):
        export(model, tmp_path)


class Noise(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


class SeededNoise(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(tf.shape(x), seed=self.seeds)


class Counter(layers.Layer):
    def build(self, _):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        return x + self.calls.assign_add(1.0)


@pytest.mark.quick(2)
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("layer", [Noise, SeededNoise, Counter])
def test_a_model_whose_calls_differ_is_refused_with_the_reason(tmp_path, layer, seed):
    if seed is not None:  # With a seed, equal functions draw equal numbers in their first calls.
        tf.random.set_seed(seed)
    with pytest.raises(ValueError, match=r"equal outputs in two calls.*draw random numbers"):
        export(keras.Sequential([keras.Input((4,)), layer()]), tmp_path)
    assert everything_under(tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*retracing")
def test_many_exports_do_not_warn_of_retracing(tmp_path, caplog):
    for _ in range(7):
        export(keras.Sequential([keras.Input((4,)), layers.Dense(1)]), tmp_path)
    assert "retracing" not in caplog.text
