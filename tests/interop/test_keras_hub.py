"""KerasHub's models at random weights: converted, folded, trained, saved, loaded, served."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn.models.keras_models import batch_norm_layers

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:The batch norm statistics"),
    pytest.mark.filterwarnings("ignore:.*compile.*was not called as part of model loading"),
    pytest.mark.filterwarnings("ignore:.*shuffle=True"),
]


@pytest.fixture(scope="module")
def hub():
    """The package. It also needs tensorflow-text."""
    return pytest.importorskip("keras_hub")


def resnet(hub):
    """Functions that call layers."""
    return hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="bottleneck_block",
        image_shape=(32, 32, 3),
    )


def densenet(hub):
    """Batch norm before convolutions."""
    return hub.models.DenseNetBackbone(
        stackwise_num_repeats=[2, 2], growth_rate=8, image_shape=(32, 32, 3)
    )


def efficientnet(hub):
    """Custom layers that make their batch norm, one kind fused, and stem and top of functions."""
    return hub.models.EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[2, 2],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        input_shape=(32, 32, 3),
    )


def mobilenet(hub):
    """Custom layers inside custom layers."""
    return hub.models.MobileNetBackbone(
        stackwise_expansion=[[16, 24], [24, 32]],
        stackwise_num_blocks=[2, 2],
        stackwise_num_filters=[[16, 16], [24, 24]],
        stackwise_kernel_size=[[3, 3], [5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish", "hard_swish"]],
        stackwise_padding=[[1, 1], [2, 2]],
        output_num_filters=32,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=32,
        squeeze_and_excite=0.5,
        input_num_filters=16,
        image_shape=(32, 32, 3),
    )


def randomize(model):
    """Statistics and parameters that no layer starts with."""
    rng = np.random.default_rng(0)
    for layer in batch_norm_layers(model).values():
        for weight in layer.weights:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def images(count=5, size=32, most=1.0):
    """Random images."""
    return np.random.default_rng(1).uniform(0, most, (count, size, size, 3)).astype("float32")


def assert_close(got, expected):
    """To float32 rounding, as deep networks pile it up."""
    got, expected = keras.tree.flatten(got), keras.tree.flatten(expected)
    for a, b in zip(got, expected, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-4 * np.max(np.abs(b))


BACKBONES = [resnet, densenet, efficientnet, mobilenet]


@pytest.mark.parametrize("make", BACKBONES)
def test_backbones(make, hub, tmp_path):
    model = randomize(make(hub))
    stock = batch_norm_layers(model)
    assert len(stock) >= 5
    converted = tfbn.convert(model)
    assert type(converted) is type(model)
    assert converted.get_config() == model.get_config()
    ours = batch_norm_layers(converted)
    assert list(ours) == list(stock)
    assert {type(layer) for layer in ours.values()} == {tfbn.BatchNormalization}
    x = images()
    expected = model(x)
    assert_close(converted(x), expected)
    # The copy trains like the model: the same batch statistics.
    for network in (model, converted):
        network(x, training=True)
    for path, layer in ours.items():
        assert_close(layer.moving_variance, stock[path].moving_variance)
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert_close(loaded(x), converted(x))


@pytest.mark.parametrize("make", BACKBONES)
@pytest.mark.filterwarnings("ignore:.*batch norm layers of model .* cannot be folded exactly")
def test_backbones_folded_and_served(make, hub, tmp_path):
    model = randomize(make(hub))
    x = images()
    expected = model(x)
    assert_close(tfbn.fold(model)(x), expected)
    exported = tfbn.export(tfbn.convert(model), tmp_path, fold=True)
    loaded = tf.saved_model.load(exported.path)
    assert_close(loaded.serve(x), expected)


def classifier(hub):
    """A task that resizes and rescales what it is given."""
    converter = hub.layers.ResNetImageConverter(image_size=(32, 32), scale=1 / 255)
    return hub.models.ResNetImageClassifier(
        backbone=resnet(hub),
        num_classes=3,
        preprocessor=hub.models.ResNetImageClassifierPreprocessor(image_converter=converter),
    )


def test_a_task_keeps_its_methods(hub, tmp_path):
    model = randomize(classifier(hub))
    converted = tfbn.convert(model)
    assert type(converted) is type(model)
    assert type(converted.preprocessor) is type(model.preprocessor)
    assert converted.preprocessor is not model.preprocessor
    raw, labels = images(6, size=40, most=255.0), np.arange(6) % 3
    expected = model.predict(raw, verbose=0)
    assert_close(converted.predict(raw, verbose=0), expected)
    # It preprocesses in `fit` as well: the moving averages are of rescaled images.
    converted.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    first = next(iter(batch_norm_layers(converted).values()))
    before = first.moving_mean.numpy()
    converted.fit(raw, labels, verbose=0)
    prepared = converted.preprocess_samples(raw)
    assert float(np.max(prepared)) <= 1.0
    model(prepared, training=True)
    after = next(iter(batch_norm_layers(model).values())).moving_mean.numpy()
    assert np.max(np.abs(after - before)) > 1e-4
    np.testing.assert_allclose(first.moving_mean, after, rtol=1e-4, atol=1e-6)
    converted.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    assert type(loaded) is type(model)
    assert_close(loaded.predict(raw, verbose=0), converted.predict(raw, verbose=0))
    again = tfbn.convert(loaded)
    assert {type(layer) for layer in batch_norm_layers(again).values()} == {tfbn.BatchNormalization}
    assert_close(again.predict(raw, verbose=0), converted.predict(raw, verbose=0))


def test_a_task_without_preprocessor_and_one_with_a_layer(hub):
    raw = images()
    for preprocessor in (None, keras.layers.Rescaling(2.0)):
        model = classifier(hub)
        model.preprocessor = preprocessor
        converted = tfbn.convert(randomize(model))
        assert_close(converted.predict(raw, verbose=0), model.predict(raw, verbose=0))


def test_a_backbone_under_a_head_of_ones_own(hub, tmp_path):
    base = randomize(efficientnet(hub))
    base.trainable = False
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(base(inputs))
    x = keras.layers.BatchNormalization(name="head")(keras.layers.Dense(4)(x))
    model = keras.Model(inputs, x)
    converted = tfbn.convert(model)
    ours = batch_norm_layers(converted)
    assert [path for path, layer in ours.items() if layer.trainable] == ["head"]
    assert {type(layer) for layer in ours.values()} == {tfbn.BatchNormalization}
    assert_close(converted(images()), model(images()))
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    # What the config names comes back as ours, what the backbone's class makes as Keras's.
    assert type(loaded.get_layer("head")) is tfbn.BatchNormalization
    assert_close(loaded(images()), model(images()))
