"""SavedModels that Keras 2 wrote, recalibrated and compared with Keras 2."""

import os

import numpy as np
import pytest

keras = pytest.importorskip("tf_keras")

import tensorflow as tf  # noqa: E402

import tfbn  # noqa: E402

pytestmark = pytest.mark.interop
layers = keras.layers
rng = np.random.default_rng(0)


class Subclassed(keras.Model):
    """Batch norm in a model of the user's own, by default with renorm."""

    def __init__(self):
        super().__init__()
        self.dense, self.bn = layers.Dense(5), layers.BatchNormalization(renorm=True)

    def call(self, x, training=None):
        return tf.nn.relu(self.bn(self.dense(x), training=training))


def nested():
    inner = keras.Sequential(
        [layers.Input((6,)), layers.Dense(4), layers.BatchNormalization(), layers.ReLU()]
    )
    x = inputs = layers.Input((6,))
    return keras.Model(inputs, layers.Dense(1)(layers.BatchNormalization()(inner(x))))


def mixed():
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        return sequential((6,), layers.Dense(5), layers.BatchNormalization(), layers.ReLU())
    finally:
        keras.mixed_precision.set_global_policy("float32")


def sequential(shape, *inner):
    return keras.Sequential([layers.Input(shape), *inner])


MODELS = {
    "dense": lambda: sequential(
        (6,),
        layers.Dense(4),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Dense(3),
        layers.BatchNormalization(scale=False),
        layers.LayerNormalization(),
    ),
    "convolutional": lambda: sequential(
        (8, 8, 3),
        layers.Conv2D(4, 3),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.DepthwiseConv2D(3),
        layers.BatchNormalization(center=False),
        layers.GlobalAveragePooling2D(),
    ),
    "nested": nested,
    "subclassed": Subclassed,
    "channels first": lambda: sequential(
        (3, 4, 4), layers.BatchNormalization(axis=1, fused=False), layers.Flatten()
    ),
    "one channel": lambda: sequential(
        (1, 4, 4), layers.BatchNormalization(axis=1, fused=False), layers.Flatten()
    ),
    "LSTM": lambda: sequential((5, 3), layers.LSTM(4), layers.BatchNormalization()),
    "mixed precision": mixed,
}


@pytest.mark.parametrize("name", MODELS)
def test_recalibrate(tmp_path, name):
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    shape = model.input_shape[1:] if name != "subclassed" else (6,)
    x = (rng.normal(size=(40, *shape)) * 3 + 2).astype("float32")
    model(x[:2])
    model.save(tmp_path / "1", save_format="tf")
    actual = tfbn.recalibrate(tmp_path, x, batch_size=8, verbose=0)
    norms = [layer for layer in model._flatten_layers() if hasattr(layer, "moving_variance")]
    assert len(actual.stats) == len(norms)
    inner = model.layers[1] if name == "nested" else None
    if inner is not None:
        norms.sort(key=lambda layer: layer not in inner.layers)
    for layer in norms:  # One after the other, each behind the population of those before.
        whole = inner if inner is not None and layer in inner.layers else model
        entering = model.dense if name == "subclassed" else keras.Model(whole.inputs, layer.input)
        values = np.float64(entering(x))
        axis = np.atleast_1d(layer.axis)[0] % values.ndim
        axes = tuple(other for other in range(values.ndim) if other != axis)
        layer.moving_mean.assign(values.mean(axes))
        layer.moving_variance.assign(values.var(axes))
    signature = tf.saved_model.load(os.fspath(actual.path)).signatures["serving_default"]
    [argument] = signature.structured_input_signature[1]
    [answer] = signature(**{argument: x}).values()
    expected = model(x, training=False)
    limit = 1e-2 if name == "mixed precision" else 1e-4
    np.testing.assert_allclose(answer, expected, rtol=limit, atol=limit)


def test_statistics_over_several_axes_are_refused(tmp_path):
    model = sequential((2, 3, 4), layers.BatchNormalization(axis=[1, 2]))
    model.save(tmp_path / "1", save_format="tf")
    with pytest.raises(ValueError, match="not per channel"):
        tfbn.recalibrate(tmp_path, np.ones((4, 2, 3, 4), "float32"), verbose=0)
    assert os.listdir(tmp_path) == ["1"]
