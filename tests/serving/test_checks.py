"""Versions that must not be put in place, and versions that must."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import BATCH_NORMS, ONES, HardWired, everything_under, serve, sweep
from keras import layers

from tfbn.serving import export


class InCompiledFunction(HardWired):
    @tf.function
    def call(self, x):
        return super().call(x)


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
    # Which of the two `training` counts is another matter in older versions of Keras 3.
    if np.allclose(model(given, training=False), want, rtol=1e-4, atol=1e-4):
        served = serve(export(model, tmp_path).path)(**{x.name: given})["output_0"]
        np.testing.assert_allclose(served, want, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="layer 'hard'"):
            export(model, tmp_path)
        assert everything_under(tmp_path) == []


def test_a_fused_op_in_training_mode_is_refused_wherever_it_is(tmp_path):
    class Own(layers.Layer):
        def call(self, x):
            @tf.function
            def inner(x):
                return tf.raw_ops.FusedBatchNormV3(
                    x=x,
                    scale=[1.0, 1.0, 1.0],
                    offset=[0.0, 0.0, 0.0],
                    mean=[],
                    variance=[],
                    is_training=True,
                )[0]

            return inner(x)

    model = keras.Sequential([keras.Input((8, 8, 3)), Own()])
    with pytest.raises(ValueError, match=r"FusedBatchNormV3 .* is_training=True"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


def test_outputs_that_depend_on_the_batch_are_refused(tmp_path):
    class Centred(layers.Layer):
        def call(self, x):
            return x - tf.reduce_mean(x, 0)

    model = keras.Sequential([keras.Input((4,)), Centred()])
    with pytest.raises(ValueError, match="other samples"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


def test_what_cannot_be_verified_is_refused(tmp_path):
    class Noise(layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    with pytest.raises(ValueError, match="differ by"):
        export(keras.Sequential([keras.Input((4,)), Noise()]), tmp_path)

    class Picky(layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_greater(x, 1.0)]):
                return tf.identity(x)

    with pytest.raises(ValueError, match=r"random numbers in \[0, 1\)"):
        export(keras.Sequential([keras.Input((4,)), Picky()]), tmp_path)
    assert everything_under(tmp_path) == []
