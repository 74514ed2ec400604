"""Models as people have them, all the way: swept, converted, folded, served.

In float64, so that rounding does not hide an error. The oracle is Keras alone: a clone whose
batch norm layers have momentum 0 and whose dropout has rate 0, after one step in training mode on
all data, holds the statistics of the data as a single batch.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import dtype_policy

import tfbn
from tfbn.keras_models import batch_norm_layers


def assert_all_the_way(model, x, path):
    """Sweep, convert, fold and export a model, and compare each with Keras."""
    swept = {name for name, layer in batch_norm_layers(model).items() if layer.trainable}
    if swept:
        stats = tfbn.collect(model, x, method="exact", batch_size=2, verbose=0)
        assert set(stats) == swept
        for name, layer in statistics_of_one_batch(model, x).items():
            scale = np.sqrt(np.max(layer.moving_variance))
            np.testing.assert_allclose(
                stats[name].mean, layer.moving_mean, rtol=1e-6, atol=1e-6 * scale
            )
            np.testing.assert_allclose(
                stats[name].variance, layer.moving_variance, rtol=1e-5, atol=1e-5 * scale**2
            )
        stats.assign(model)
    expected = model(x, training=False)
    converted, folded = tfbn.convert(model), tfbn.fold(model)
    assert type(converted) is type(model)
    assert not batch_norm_layers(folded)
    kinds = {type(layer) for layer in batch_norm_layers(converted).values()}
    assert kinds <= {tfbn.BatchNormalization}
    # The layers of tfbn take epsilon as a float32 number.
    assert_close(converted(x, training=False), expected, 1e-6)
    assert_close(folded(x, training=False), expected, 1e-8)
    stats_stay_with = [layer.trainable for layer in batch_norm_layers(model).values()]
    assert [layer.trainable for layer in batch_norm_layers(converted).values()] == stats_stay_with
    served = tf.saved_model.load(tfbn.export(converted, path, fold=True).path)
    assert_close(served.serve(keras.tree.map_structure(tf.constant, x)), expected, 1e-6)


def statistics_of_one_batch(model, x):
    """The layers of a clone that hold the statistics of all data, by path."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for layer, original in zip(clone._flatten_layers(), model._flatten_layers(), strict=True):
        layer.trainable = original.trainable
    for layer in clone._flatten_layers():
        if hasattr(layer, "rate"):
            layer.rate = 0.0
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    clone(x, training=True)
    return {name: layer for name, layer in batch_norm_layers(clone).items() if layer.trainable}


def assert_close(got, expected, tolerance):
    """All outputs, by the largest value of each."""
    if isinstance(expected, dict):
        got = {name: got[name] for name in expected}
    got, expected = keras.tree.flatten(got), keras.tree.flatten(expected)
    for a, b in zip(got, expected, strict=True):
        assert np.max(np.abs(a - b)) <= tolerance * max(1e-3, np.max(np.abs(b)))


def conv(x, filters, strides=1, cls=layers.Conv2D):
    """A convolution, batch norm and an activation."""
    x = cls(filters, 3, strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def encoder(size=16):
    """Features at three scales."""
    x = inputs = keras.Input((size, size, 3), name="image")
    scales = []
    for filters, strides in ((4, 1), (6, 2), (8, 2)):
        x = conv(x, filters, strides)
        scales.append(x)
    return keras.Model(inputs, scales, name="encoder")


def segmentation():
    """A U-Net with a second head: classes of pixels, and edges, by name."""
    inputs = keras.Input((16, 16, 3), name="image")
    fine, middle, coarse = encoder()(inputs)
    x = layers.Concatenate()([conv(coarse, 6, 2, layers.Conv2DTranspose), middle])
    x = layers.Concatenate()([conv(x, 4, 2, layers.Conv2DTranspose), fine])
    return keras.Model(
        inputs,
        {
            "classes": layers.Conv2D(5, 1, activation="softmax")(conv(x, 4)),
            "edges": layers.Conv2D(1, 1, activation="sigmoid")(x),
        },
    )


def detection():
    """A feature pyramid. Its head is shared between scales, but for batch norm: boxes, classes."""
    inputs = keras.Input((16, 16, 3), name="image")
    scales = encoder()(inputs)
    tower = layers.SeparableConv2D(4, 3, padding="same")
    boxes, classes = layers.Conv2D(4, 1), layers.Conv2D(3, 1, activation="sigmoid")
    merged = None
    outputs = {}
    for number, x in enumerate(reversed(scales)):
        x = layers.BatchNormalization()(layers.Conv2D(4, 1)(x))
        merged = x if merged is None else layers.Add()([x, layers.UpSampling2D()(merged)])
        features = layers.ReLU()(layers.BatchNormalization()(tower(merged)))
        outputs |= {f"boxes_{number}": boxes(features), f"classes_{number}": classes(features)}
    return keras.Model(inputs, outputs)


def frozen_base():
    """Transfer learning: the base keeps its statistics, the head has its own."""
    base = encoder()
    base.trainable = False
    inputs = keras.Input((16, 16, 3), name="image")
    x = layers.GlobalAveragePooling2D()(base(inputs)[-1])
    x = layers.BatchNormalization(name="head")(layers.Dense(4)(layers.Dropout(0.5)(x)))
    return keras.Model(inputs, layers.Dense(2)(x))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", [segmentation, detection, frozen_base])
@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_several_outputs_and_frozen_parts(network, tmp_path):
    keras.utils.set_random_seed(0)
    with dtype_policy("float64"):
        model = network()
        rng = np.random.default_rng(0)
        for layer in batch_norm_layers(model).values():
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_variance.shape))
        assert_all_the_way(model, rng.normal(size=(6, 16, 16, 3)).astype("float32"), tmp_path)


SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
APPLICATIONS = sorted(
    name
    for name, thing in vars(keras.applications).items()
    if inspect.isfunction(thing) and "classifier_activation" in inspect.signature(thing).parameters
)


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_applications(name, tmp_path):
    keras.utils.set_random_seed(0)
    size = SMALLEST.get(name, 32)
    with dtype_policy("float64"):
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classes=5
        )
        images = np.random.default_rng(0).uniform(0, 255, (4, size, size, 3)).astype("float32")
        assert_all_the_way(model, images, tmp_path)
    keras.backend.clear_session()
