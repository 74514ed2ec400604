"""Tests of replicas: the moments of batches, and errors that name the batch."""

import os
import pathlib
import subprocess
import sys
import threading

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("ratio", [0, 5, 1e2, 1e4])
def test_moments_are_right_far_from_zero(method, ratio):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 3)) + ratio).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, method=method, batch_size=100, verbose=0).values()
    exact = x.astype(np.float64)
    networks.assert_layer(stats, exact.mean(0), exact.var(0), 1e-6)


def test_a_constant_channel_has_variance_zero():
    x = np.full((50, 2), 1e4 / 3, "float32")
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, batch_size=7, verbose=0).values()
    assert np.all(stats.variance >= 0)
    np.testing.assert_allclose(stats.variance, 0, atol=1e-6)


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value, method):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 40)
    x[27, 3, 3, 1] = value
    before = model.get_weights()
    first = networks.batch_norms(model)[0].name
    with pytest.raises(ValueError, match=rf"layer '{first}'.*batch 3 .* NaN or Inf"):
        tfbn.update_population_stats(model, x, method=method, batch_size=8, verbose=0)
    networks.assert_same(before, model.get_weights())


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_an_overflow_inside_the_model_is_named(method):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 40)
    scale = model.layers[0].kernel
    scale.assign(scale * 1e36)
    with pytest.raises(ValueError, match=r"batch 0 .* overflow inside"):
        tfbn.collect(model, x * 1e6, method=method, batch_size=20, verbose=0)


def test_one_value_per_channel():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    x = networks.data(model, 9)
    with pytest.raises(ValueError, match=r"two values per channel.*'bn', in batch 2 .*batch size"):
        tfbn.collect(model, x, method="algorithm2", batch_size=4, verbose=0)
    [stats] = tfbn.collect(model, x, method="pooled", batch_size=1, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)
    [stats] = tfbn.collect(model, x, method="algorithm2", batch_size=3, verbose=0).values()
    variance = np.mean([x[i : i + 3].astype("d").var(0, ddof=1) for i in (0, 3, 6)], 0)
    np.testing.assert_allclose(stats.variance, variance, rtol=1e-5)


HERE = pathlib.Path(__file__).parents[1]


HIDDEN_NAN = """
import sys
sys.path.insert(0, sys.argv[1])
import keras, numpy as np, tfbn
from keras import layers
x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("f")
x[5, 2, 2, 1] = np.nan
def refused(first, name, **options):
    parts = first if isinstance(first, list) else [first]
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), *parts, layers.BatchNormalization(name="seen")])
    model.run_eagerly = options.pop("eager", False)
    try:
        tfbn.collect(model, x, batch_size=4, verbose=0, **options)
    except ValueError as error:
        assert "batch 1 " in str(error) and "NaN" in str(error), error
        return
    print("missed", name, options)
for method in ("exact", "pooled", "algorithm2"):
    for kind in (layers.Conv2D, layers.SeparableConv2D):
        for activation in ("relu", "relu6", "elu", "leaky_relu"):
            refused(kind(4, 3, activation=activation), (kind.__name__, activation), method=method)
    refused(layers.Dense(4, activation="relu"), "Dense", method=method)
    refused([layers.Conv2D(4, 3), layers.ReLU(6.0)], "ReLU(6)", method=method)
    for eager in (False, True):
        refused([layers.MaxPooling2D(3)], "max pooling", method=method, eager=eager)
        refused([layers.Conv2D(4, 3, activation="relu"), layers.GlobalMaxPooling2D()], "both",
                method=method, eager=eager)
print("all")
"""


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_nan_behind_a_fused_kernel_is_an_error(method):
    convolution = layers.Conv2D(4, 3, activation="relu")
    model = keras.Sequential([keras.Input((8, 8, 3)), convolution, layers.BatchNormalization()])
    x = networks.normal(12, 8, 8, 3)
    x[5, 2, 2] = np.nan
    with pytest.raises(ValueError, match=r"batch 1 .*NaN.*Clean "):
        tfbn.collect(model, x, method=method, batch_size=4, verbose=0)
    x = np.nan_to_num(x)
    [stats] = tfbn.collect(model, x, method=method, batch_size=4, verbose=0).values()
    entered = np.asarray(convolution(x), "d")
    networks.assert_layer(stats, entered.mean((0, 1, 2)), entered.var((0, 1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("one_dnn", ["1", "0"])
def test_nan_behind_a_kernel_that_hides_it_is_an_error(one_dnn):
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": one_dnn, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN_NAN, str(HERE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2:] == ["all", ""] and "missed" not in done.stdout, done.stdout


IMPUTERS = {
    "is_nan": lambda x: tf.where(tf.math.is_nan(x), 0.0, x),
    "keras": lambda x: ops.nan_to_num(x),
    "equal": lambda x: tf.where(tf.equal(x, x), x, 0.0),
    "not_equal": lambda x: ops.where(x != x, 0.0, x),
    "is_finite": lambda x: tf.where(tf.math.is_finite(x), x, 0.0),
    "a comparison": lambda x: ops.cast(x > 0, "float32"),
    "buckets": lambda x: layers.Discretization([-1.0, 0.0, 1.0], output_mode="one_hot")(x[:, 0]),
}


@pytest.mark.quick(6)
@pytest.mark.parametrize("how", IMPUTERS)
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_network_that_takes_nan_may_have_it(how, method):
    function = IMPUTERS[how]
    inputs = keras.Input((3,))
    imputed = layers.Lambda(function)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(imputed))
    x = networks.normal(40, 3)
    x[::4, 1] = np.nan
    [actual] = tfbn.collect(model, x, method=method, batch_size=16, verbose=0).values()
    entered = np.asarray(keras.Model(inputs, imputed)(x), np.float64)
    networks.assert_layer(actual, entered.mean(0), entered.var(0))


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_nan_in_an_input_that_no_batch_norm_layer_reads_is_fine(method):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    outputs = layers.BatchNormalization()(a), layers.Dense(2)(b)
    model = keras.Model({"a": a, "b": b}, outputs)
    x = {"a": networks.normal(20, 3), "b": np.full((20, 3), np.nan, "f")}
    [actual] = tfbn.collect(model, x, method=method, verbose=0).values()
    networks.assert_layer(actual, x["a"].astype("d").mean(0), x["a"].astype("d").var(0))


@pytest.mark.parametrize("method", ["exact", "pooled", "algorithm2"])
def test_counts_are_whole_numbers(method):
    model = keras.Sequential(
        [keras.Input((4, 3)), layers.Masking(), layers.BatchNormalization(), layers.Flatten()]
    )
    x = networks.normal(9, 4, 3)
    x[:, 3] = 0
    for layer in tfbn.collect(model, x, method=method, verbose=0).values():
        assert type(layer.count) is int and layer.count == 27


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_moments_come_back_once_a_batch(method, two_devices, monkeypatch):
    with two_devices.scope():
        model = networks.residual(tfbn.BatchNormalization)
    x = networks.data(model, 48)
    read = []

    def noting(original):
        def noted(value, *args, **kwargs):
            if threading.current_thread() is not threading.main_thread():  # A thread of a device.
                read.append(tuple(value.shape))
            return original(value, *args, **kwargs)

        return noted

    eager = type(tf.constant(0))
    for name in ("numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(eager, name, noting(getattr(eager, name)))
    stats = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    # The layer on the shortcut shares a level, so there are fewer levels than layers.
    levels = stats.levels if method == "exact" else 1
    assert 1 <= levels < len(stats)
    moments = [shape for shape in read if shape[:1] == (3,)]
    assert len(moments) == 3 * levels
    assert sum(channels for _, channels in moments) == 3 * sum(len(s.mean) for s in stats.values())
    # Else only inputs are read, which are on the host, and only in the first level.
    assert [s for s in read if s[:1] != (3,)] == [(16, *x.shape[1:])] * 3
