"""Models as people have them, all the way: swept, converted, folded, served.

In float64, so that rounding does not hide an error. The oracle is Keras alone: the model itself,
when all else is done with it, its batch norm layers with momentum 0 and its dropout with rate 0.
After one step in training mode on all data it holds the statistics of the data as a single batch.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import dtype_policy

import tfbn
from tfbn.models.keras_models import batch_norm_layers


def assert_all_the_way(model, x, path, *, fold_in_export=True):
    """Sweep, convert, fold and export a model, and compare each with Keras. It is used up.

    Args:
        model: A network whose batch norm layers are Keras's.
        x: Its data.
        path: A directory for the SavedModel.
        fold_in_export: Whether `export` gets the converted model and folds it once more, or gets
            the folded one.
    """
    flags = [layer.trainable for layer in batch_norm_layers(model).values()]
    if any(flags):
        stats = tfbn.collect(model, x, method="exact", batch_size=5, verbose=0)
        stats.assign(model)
    expected = model(x, training=False)
    tolerance = 10 * rounding(model, x, expected)
    converted = tfbn.convert(model)
    assert type(converted) is type(model)
    kinds = {type(layer) for layer in batch_norm_layers(converted).values()}
    assert kinds <= {tfbn.BatchNormalization}
    assert [layer.trainable for layer in batch_norm_layers(converted).values()] == flags
    assert_close(converted(x, training=False), expected, tolerance)
    if not fold_in_export:
        del converted  # The largest networks take gigabytes.
    folded = tfbn.fold(model)
    assert not batch_norm_layers(folded)
    assert_close(folded(x, training=False), expected, tolerance)
    network = converted if fold_in_export else folded
    served = tf.saved_model.load(tfbn.export(network, path, fold=fold_in_export, sample=x).path)
    assert_close(served.serve(keras.tree.map_structure(tf.constant, x)), expected, tolerance)
    if any(flags):
        trained = outputs_of_one_batch(model, x)
        assert_close(trained, expected, tolerance)
        assert_statistics_of(model, stats)


def rounding(model, x, expected):
    """How far outputs move, of their largest value, when every weight moves in its last place.

    The rounding of each step goes through the rest of the network, which may make it a million
    times as large, or no larger. Right copies are apart by less than twice this. One epsilon in the
    middle of a copy that is wrong by a millionth puts it off by a hundred times this.
    """
    generator = np.random.default_rng(0)
    weights = model.get_weights()
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value * (1 + 2.0**-52 * generator.choice([-1.0, 1.0], value.shape)))
    moved = model(x, training=False)
    model.set_weights(weights)
    return max(2.0**-52, *differences(moved, expected))


def outputs_of_one_batch(model, x):
    """The outputs of a step in training mode, which leaves the statistics of just this batch."""
    for layer in model._flatten_layers():
        if hasattr(layer, "rate"):
            layer.rate = 0.0
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    return model(x, training=True)


def assert_statistics_of(model, stats):
    """Compare with the moving statistics of the layers that are not frozen."""
    trained = {name: layer for name, layer in batch_norm_layers(model).items() if layer.trainable}
    assert set(stats) == set(trained)
    for name, layer in trained.items():
        variance = np.max(layer.moving_variance)
        np.testing.assert_allclose(
            stats[name].mean, layer.moving_mean, rtol=1e-10, atol=1e-10 * np.sqrt(variance)
        )
        np.testing.assert_allclose(
            stats[name].variance, layer.moving_variance, rtol=1e-10, atol=1e-10 * variance
        )


def assert_same(copy, model):
    """The same layers called in the same way, with the same weights in separate variables.

    A Sequential part may have become a Functional one, of the same layers in their order.
    """
    assert calls(copy) == calls(model)
    assert innermost_layers(copy) == innermost_layers(model)
    for mine, theirs in zip(copy.weights, model.weights, strict=True):
        assert mine is not theirs
        np.testing.assert_array_equal(mine, theirs)


def calls(model):
    """The layers' names, and the tensors that each is called with."""
    return [(layer["name"], layer["inbound_nodes"]) for layer in model.get_config()["layers"]]


def innermost_layers(model):
    """The class and the config of every layer that is not a model."""
    flat = [layer for layer in model._flatten_layers() if not isinstance(layer, keras.Model)]
    return [(type(layer), layer.get_config()) for layer in flat]


def assert_close(got, expected, tolerance):
    """All outputs, by the largest value of each."""
    assert all(off <= tolerance for off in differences(got, expected))


def differences(got, expected):
    """Of each output the largest difference, as a part of its largest value."""
    if isinstance(expected, dict):
        got = {name: got[name] for name in expected}
    pairs = zip(keras.tree.flatten(got), keras.tree.flatten(expected), strict=True)
    return [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs]


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


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", [frozen_base, segmentation, detection])
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

# They have no batch norm, and so must be copied as they are. The way of such a network, of the same
# layers, to its SavedModel is shown by ConvNeXtTiny and VGG16.
ONLY_COPIED = {"ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtSmall", "ConvNeXtXLarge", "VGG19"}

# One of each family, and the one that makes most of rounding. Their siblings, of the same layers,
# take a quarter of an hour more: `pytest -m exhaustive`.
REPRESENTATIVES = {
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "EfficientNetV2M"),
    *("InceptionResNetV2", "InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small"),
    *("NASNetMobile", "ResNet50", "ResNet50V2", "VGG16", "VGG19", "Xception"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in REPRESENTATIVES else pytest.mark.exhaustive
        )
        for name in APPLICATIONS
    ],
)
@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_applications(name, tmp_path):
    keras.utils.set_random_seed(0)
    size = SMALLEST.get(name, 32)
    with dtype_policy("float64"):
        # Not the probabilities: they may be 0 and 1, and then nothing moves them.
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None
        )
        if name in ONLY_COPIED:
            assert not batch_norm_layers(model)
            for copied in (tfbn.convert, tfbn.fold):
                assert_same(copied(model), model)
        else:
            # The statistics of fewer images, at a single position each, make much of all rounding.
            images = np.random.default_rng(0).uniform(0, 255, (8, size, size, 3))
            assert_all_the_way(model, images.astype("float32"), tmp_path, fold_in_export=False)
    keras.backend.clear_session()
