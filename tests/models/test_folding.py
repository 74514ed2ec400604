"""Folded models compute the same without batch norm layers."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.models.folding import fold
from tfbn.models.keras_models import batch_norm_layers

# Keras computes the original model, the oracle, in float64, so that rounding cannot hide a wrong
# axis, a missing epsilon or weights folded in float32.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def fill(model, seed=0):
    """Assign random weights and statistics."""
    rng = np.random.default_rng(seed)
    for layer in batch_norm_layers(model).values():
        channels = layer.moving_mean.shape[0]
        layer.moving_mean.assign(rng.normal(size=channels))
        layer.moving_variance.assign(rng.uniform(0.1, 3.0, size=channels))
        if layer.scale:
            layer.gamma.assign(rng.normal(size=channels))
        if layer.center:
            layer.beta.assign(rng.normal(size=channels))
    for layer in model._flatten_layers():
        if getattr(layer, "use_bias", False) and hasattr(layer, "bias"):
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


def inputs_of(model, batch=3, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, *x.shape[1:])).astype(x.dtype) for x in model.inputs]


def assert_same(model, folded, **tolerance):
    x = inputs_of(model)
    x = x if len(x) > 1 else x[0]
    want, got = model(x, training=False), folded(x, training=True)
    for a, b in zip(keras.tree.flatten(want), keras.tree.flatten(got), strict=True):
        np.testing.assert_allclose(b, a, **(tolerance or EXACT))


def kinds(model):
    """Return class -> number of layers, including nested ones."""
    counts = {}
    for layer in model._flatten_layers():
        counts[type(layer)] = counts.get(type(layer), 0) + 1
    return counts


@pytest.fixture(autouse=True)
def double_precision():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


L = layers
PRODUCERS = {
    "Dense": (L.Dense, (5,), {"units": 4}),
    "Dense over positions": (L.Dense, (2, 3, 5), {"units": 4}),
    "Conv1D": (L.Conv1D, (7, 3), {"filters": 4, "kernel_size": 3}),
    "Conv2D": (L.Conv2D, (7, 6, 3), {"filters": 4, "kernel_size": 3, "strides": 2}),
    "Conv2D, groups": (L.Conv2D, (7, 6, 4), {"filters": 6, "kernel_size": 3, "groups": 2}),
    "Conv2D, dilated": (L.Conv2D, (9, 9, 3), {"filters": 4, "kernel_size": 3, "dilation_rate": 2}),
    "Conv3D": (L.Conv3D, (5, 4, 4, 2), {"filters": 3, "kernel_size": 2, "padding": "same"}),
    "Conv1DTranspose": (L.Conv1DTranspose, (4, 3), {"filters": 5, "kernel_size": 3}),
    "Conv2DTranspose": (L.Conv2DTranspose, (4, 4, 3), {"filters": 5, "kernel_size": 3}),
    "Conv3DTranspose": (L.Conv3DTranspose, (3, 3, 3, 2), {"filters": 3, "kernel_size": 2}),
    "DepthwiseConv1D": (L.DepthwiseConv1D, (7, 3), {"kernel_size": 3, "depth_multiplier": 2}),
    "DepthwiseConv2D": (L.DepthwiseConv2D, (7, 6, 3), {"kernel_size": 3, "depth_multiplier": 2}),
    "SeparableConv1D": (L.SeparableConv1D, (7, 3), {"filters": 4, "kernel_size": 3}),
    "SeparableConv2D": (
        L.SeparableConv2D,
        (7, 6, 3),
        {"filters": 4, "kernel_size": 3, "depth_multiplier": 2},
    ),
}


@pytest.mark.quick(7)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", PRODUCERS)
def test_folds_into_the_layer_before(name, use_bias):
    cls, shape, arguments = PRODUCERS[name]
    x = keras.Input(shape)
    y = cls(**arguments, use_bias=use_bias, name="before")(x)
    y = L.BatchNormalization(epsilon=0.1)(y)
    model = fill(keras.Model(x, L.Activation("tanh")(y)))
    folded = fold(model)
    assert set(kinds(folded)) == {L.InputLayer, cls, L.Activation, type(folded)}
    assert_same(model, folded)


@pytest.mark.parametrize("batch_norm", [tfbn.BatchNormalization, L.BatchNormalization])
@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": False},
        {"center": False},
        {"scale": False, "center": False},
        {"axis": 3, "epsilon": 1e-7},
    ],
    ids=str,
)
def test_arguments_of_batch_norm(batch_norm, arguments):
    layer = batch_norm(**arguments)
    model = keras.Sequential(
        [keras.Input((5, 5, 2)), L.Conv2D(3, 2), layer, L.ReLU(), batch_norm()]
    )
    folded = fold(fill(model))
    assert kinds(folded)[L.Rescaling] == 1
    assert not batch_norm_layers(folded)
    # tfbn's layers convert epsilon to float32.
    assert_same(model, folded, rtol=1e-6, atol=1e-6)


def branch(x):
    y = L.Conv2D(3, 2)(x)
    return L.Add()([y, L.BatchNormalization()(y)])


def also_an_output(x):
    y = L.Conv2D(3, 2)(x)
    return [y, L.BatchNormalization()(y)]


def shared_convolution(x):
    shared = L.Conv2D(3, 2)
    return L.Add()([L.BatchNormalization()(shared(x)), shared(x)])


def shared_batch_norm(x):
    shared = L.BatchNormalization()
    return L.Add()([shared(L.Conv2D(3, 2)(x)), shared(L.Conv2D(3, 2)(x))])


def mixed_precision(x):
    return L.BatchNormalization(dtype="float64")(L.Conv2D(3, 2, dtype="float32")(x))


AFFINE = {
    "nothing before": lambda x: L.BatchNormalization()(x),
    "activation": lambda x: L.BatchNormalization()(L.Conv2D(3, 2, activation="tanh")(x)),
    "another layer between": lambda x: L.BatchNormalization()(L.ReLU()(L.Conv2D(3, 2)(x))),
    "another axis": lambda x: L.BatchNormalization(axis=1)(L.Conv2D(3, 2)(x)),
    "flattened": lambda x: L.BatchNormalization()(L.Flatten()(L.Conv2D(3, 2)(x))),
    "branch": branch,
    "also an output": also_an_output,
    "shared convolution": shared_convolution,
    "shared batch norm": shared_batch_norm,
    "mixed precision": mixed_precision,
}


@pytest.mark.parametrize("name", AFFINE)
def test_becomes_rescaling_elsewhere(name):
    x = keras.Input((5, 4, 2))
    model = fill(keras.Model(x, AFFINE[name](x)))
    [bn] = batch_norm_layers(model)
    folded = fold(model)
    assert kinds(folded).get(L.Rescaling) == 1
    assert isinstance(folded.get_layer(bn), L.Rescaling)
    assert not batch_norm_layers(folded)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "mixed precision" else EXACT
    assert_same(model, folded, **tolerance)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_rescaling_along_any_axis(shape):
    for axis in range(1, len(shape) + 1):
        model = fill(keras.Sequential([keras.Input(shape), L.BatchNormalization(axis=axis)]))
        folded = fold(model)
        assert kinds(folded)[L.Rescaling] == 1
        assert_same(model, folded)


def test_channels_first():
    keras.config.set_image_data_format("channels_first")
    try:
        x = keras.Input((3, 6, 6))
        y = L.BatchNormalization(axis=1)(L.Conv2D(4, 2)(x))  # In.
        y = L.BatchNormalization(axis=1)(L.ReLU()(y))  # Multiply-add.
        y = L.BatchNormalization(axis=-1)(L.Conv2D(4, 2)(y))  # Multiply-add, along columns.
        y = L.BatchNormalization(name="flat")(L.ReLU()(L.Flatten()(y)))  # Left.
        model = fill(keras.Model(x, y))
        with pytest.warns(UserWarning, match=r"\['flat'\]"):
            folded = fold(model)
        assert kinds(folded)[L.Rescaling] == 2
        # On a CPU only XLA supports channels-first convolutions.
        x = inputs_of(model)[0]
        want, got = (tf.function(m, jit_compile=True)(x, training=False) for m in (model, folded))
        np.testing.assert_allclose(got, want, **EXACT)
    finally:
        keras.config.set_image_data_format("channels_last")


def block(filters, **names):
    x = keras.Input((None, None, 3))
    y = L.BatchNormalization()(L.Conv2D(filters, 2)(x))
    return keras.Model(x, y, **names)


def test_shared_nested_models_are_folded():
    inner = block(3, name="inner")
    ending = keras.Sequential([L.Conv2D(3, 2), L.BatchNormalization(), L.ReLU()], name="ending")
    x = keras.Input((8, 8, 3))
    y = inner(inner(x))
    y = L.BatchNormalization(name="outer")(y)  # Not after a convolution of this model.
    model = fill(keras.Model(x, ending(y)))
    folded = fold(model)
    assert not batch_norm_layers(folded)
    assert kinds(folded)[L.Conv2D] == 2
    assert isinstance(folded.get_layer("outer"), L.Rescaling)
    assert_same(model, folded)


def test_convolution_shared_with_another_model_is_not_changed():
    shared = L.Conv2D(3, 2)
    inside = keras.Input((8, 8, 3))
    inner = keras.Model(inside, L.BatchNormalization()(shared(inside)))
    x = keras.Input((8, 8, 3))
    model = fill(keras.Model(x, L.Add()([inner(x), shared(x)])))
    folded = fold(model)
    assert kinds(folded)[L.Conv2D] == 1
    assert_same(model, folded)


class Own(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = L.Conv2D(3, 2)
        self.bn = L.BatchNormalization(name="inside")

    def call(self, x):
        return self.bn(self.conv(x), training=False)


class Twice(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_warning_lists_layers_that_cannot_be_folded():
    x = keras.Input((8, 8, 3))
    y = L.BatchNormalization(name="folded")(L.Conv2D(3, 2)(x))
    y = Own(name="own")(y)
    y = Twice(name="twice")(L.Conv2D(3, 2)(y))
    y = L.TimeDistributed(L.BatchNormalization(name="wrapped"), name="each")(y)
    z = L.BatchNormalization(name="training")(L.Conv2D(3, 2)(y), training=True)
    model = fill(keras.Model(x, [y, z]))
    left = ["own/inside", "twice", "each/wrapped", "training"]
    with pytest.warns(UserWarning, match="4 batch norm layers") as caught:
        folded = fold(model)
    assert str(left) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert list(batch_norm_layers(folded)) == left
    images = inputs_of(model)[0]
    for a, b in zip(model(images), folded(images), strict=True):
        np.testing.assert_allclose(b, a, **EXACT)


def test_advice_for_subclassed_models_works():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = block(4)
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(keras.ops.mean(self.inner(x), (1, 2)))

    model = Subclassed()
    model(np.ones((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"keras\.Model\(x, model\.call\(x\)\)"):
        fold(model)
    x = keras.Input((8, 8, 3))
    functional = keras.Model(x, model.call(x))
    folded = fold(fill(functional))
    assert not batch_norm_layers(folded)
    images = inputs_of(functional)[0]
    np.testing.assert_allclose(folded(images), model(images), **EXACT)
    with pytest.raises(ValueError, match="built model"):
        fold(keras.Sequential([L.Dense(2)]))


def test_functional_model_with_custom_call_is_refused():
    class Halved(keras.Model):
        def call(self, x, training=None):
            return super().call(x, training=training) / 2

    x = keras.Input((4,))
    halved = fill(Halved(x, L.BatchNormalization()(L.Dense(3)(x))))
    with pytest.raises(ValueError, match="Functional or Sequential"):
        fold(halved)
    x = keras.Input((4,))
    model = keras.Model(x, halved.call(x))  # The advice.
    values = inputs_of(model)[0]
    folded = fold(model)
    assert not batch_norm_layers(folded)
    np.testing.assert_allclose(folded(values), halved(values), **EXACT)


@pytest.mark.filterwarnings("ignore:When providing `inputs`")
def test_names_and_structures_are_kept():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    u = L.BatchNormalization(name="bn")(L.Dense(2, name="u")(a))
    v = L.Dense(2, name="v")(L.Concatenate()([b, u]))
    model = fill(keras.Model({"a": a, "b": b}, {"u": u, "v": v}, name="two"))
    folded = fold(model)
    assert folded.name == "two"
    assert [x.name for x in folded.inputs] == ["a", "b"]
    assert [layer.name for layer in folded.layers if layer.name != "bn"] == [
        layer.name for layer in model.layers if layer.name != "bn"
    ]
    x = dict(zip("ab", inputs_of(model), strict=True))
    want, got = model(x), folded(x)
    assert set(got) == {"u", "v"}
    for name in got:
        np.testing.assert_allclose(got[name], want[name], **EXACT)
    # Inner outputs are accessible as in any model.
    features = keras.Model(folded.input, folded.get_layer("u").output)
    np.testing.assert_allclose(features(x), want["u"], **EXACT)


def test_state_of_other_layers_is_copied():
    words = L.StringLookup(output_mode="one_hot")
    words.adapt(["b", "b", "a"])
    normalization = L.Normalization()
    normalization.adapt(np.array([[1.0, 10.0], [3.0, 50.0]]))
    text, numbers = keras.Input((1,), dtype="string"), keras.Input((2,))
    x = L.Concatenate()([words(text), normalization(numbers)])
    x = x * np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    x = L.Dropout(0.5)(L.GRU(3)(keras.ops.expand_dims(x, 1)))
    model = fill(keras.Model([text, numbers], L.BatchNormalization()(L.Dense(2)(x))))
    given = [tf.constant([["a"], ["b"], ["?"]]), tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])]
    np.testing.assert_allclose(fold(model)(given), model(given), **EXACT)


def test_model_is_not_changed():
    x = keras.Input((5, 5, 2))
    model = fill(keras.Model(x, L.BatchNormalization()(block(3)(L.Conv2D(3, 2)(x)))))
    config, weights = model.get_config(), model.get_weights()
    folded = fold(model)
    for variable in folded.variables:
        variable.assign(variable * 0 + 7)
    assert model.get_config() == config
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


STEPS = (
    "conv",
    "activated conv",
    "depthwise",
    "bn",
    "bn",
    "other axis bn",
    "relu",
    "shared",
    "add",
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), min_size=1, max_size=10)
)
def test_random_networks_compute_the_same(recipe):
    x = y = keras.Input((6, 6, 2))
    shared = L.Conv2D(2, 1)
    seen = [x]
    for step, number in recipe:
        if step == "add":
            y = L.Add()([y, seen[number % len(seen)]])
        else:
            layer = {
                "conv": lambda n: L.Conv2D(2, 2, padding="same", use_bias=n % 2 == 0),
                "activated conv": lambda n: L.Conv2D(2, 1, activation="tanh"),
                "depthwise": lambda n: L.DepthwiseConv2D(2, padding="same", use_bias=n % 2 == 0),
                "bn": lambda n: L.BatchNormalization(scale=n > 2),
                "other axis bn": lambda n: L.BatchNormalization(axis=1 + n % 2),
                "relu": lambda n: L.ReLU(),
                "shared": lambda n: shared,
            }[step]
            y = layer(number)(y)
        seen.append(y)
    model = fill(keras.Model(x, y))
    folded = fold(model)
    assert not batch_norm_layers(folded)
    assert_same(model, folded, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "affine"),
    [("MobileNetV2", 0), ("ResNet50", 0), ("EfficientNetB0", 0), ("DenseNet121", 62)],
)
def test_known_networks(name, affine):
    def network(dtype):
        keras.config.set_dtype_policy(dtype)
        return getattr(keras.applications, name)(
            weights=None, input_shape=(64, 64, 3), classifier_activation=None
        )

    single, double = network("float32"), network("float64")
    images = np.random.default_rng(0).uniform(0, 255, (32, 64, 64, 3)).astype("float32")
    tfbn.update_population_stats(single, images, verbose=0)
    double.set_weights(single.get_weights())
    folded = fold(single)
    rescaled = kinds(folded).get(L.Rescaling, 0) - kinds(single).get(L.Rescaling, 0)
    assert not batch_norm_layers(folded)
    assert rescaled == affine
    want = double.predict(images, verbose=0)
    scale = np.max(np.abs(want))
    assert np.max(np.abs(fold(double).predict(images, verbose=0) - want)) <= 1e-10 * scale
    # Untrained networks amplify rounding: float32 and float64 differ by up to 1e-4, which bounds
    # the precision of the folded network.
    own = np.max(np.abs(single.predict(images, verbose=0) - want)) / scale
    error = np.max(np.abs(folded.predict(images, verbose=0) - want)) / scale
    print(
        f"{name}: {len(batch_norm_layers(single))} batch norm layers, {rescaled} became a "
        f"multiply-add; off by {error:.1e}, before folding by {own:.1e}"
    )
    assert error <= 1e-5 + 1.5 * own


@pytest.mark.slow
def test_saves_and_loads_without_tfbn(tmp_path):
    x = keras.Input((6, 6, 2))
    y = tfbn.BatchNormalization()(L.Conv2D(3, 2)(x))
    model = fill(keras.Model(x, tfbn.BatchNormalization()(L.ReLU()(y))))
    fold(model).save(tmp_path / "folded.keras")
    images = inputs_of(model)[0]
    np.save(tmp_path / "x.npy", images)
    script = """
import sys
sys.modules["tfbn"] = None  # Importing it is an error.
import keras, numpy as np
np.save("y.npy", keras.models.load_model("folded.keras")(np.load("x.npy")))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [lambda d: d.quantize("int8"), lambda d: d.enable_lora(2)])
def test_quantized_and_low_rank_kernels_are_not_folded(change):
    inputs = keras.Input((8,))
    dense = keras.layers.Dense(6, name="dense")
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(name="bn")(dense(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 8)).astype("float32")
    tfbn.update_population_stats(model, data, verbose=0)
    change(dense)
    folded = tfbn.fold(model)
    assert folded.get_layer("dense").count_params() == dense.count_params()
    expected = model.predict(data, verbose=0)
    np.testing.assert_allclose(folded.predict(data, verbose=0), expected, rtol=1e-5, atol=1e-5)


HALF = {"float16": 2**-11, "mixed_float16": 2**-11, "bfloat16": 2**-8, "mixed_bfloat16": 2**-8}


@pytest.mark.parametrize("policy", HALF)
@pytest.mark.parametrize("before", ["nothing", "product", "bias", "small product"])
@pytest.mark.parametrize("cls", [layers.BatchNormalization, tfbn.BatchNormalization])
def test_half_precision_is_no_worse_than_batch_norm(policy, before, cls):
    """Inputs are years from 1990 to 2030, 170 std from zero, or Dense outputs 200 std from it."""
    x = np.random.default_rng(0).integers(1990, 2031, (64, 2)).astype("float32")
    x = x if before in ("nothing", "product") else (x - 2010) / 12
    inputs = keras.Input((2,))
    dense = layers.Dense(
        3,
        use_bias=before == "bias",
        kernel_initializer=keras.initializers.RandomUniform(0.1, 1, seed=1),
        bias_initializer=keras.initializers.Constant(200),
        dtype=policy,
    )
    y = entering = inputs if before == "nothing" else dense(inputs)
    y = cls(dtype=policy)(y)
    model = keras.Model(inputs, [y, keras.ops.relu(y)])
    [layer] = batch_norm_layers(model).values()
    z = keras.ops.cast(keras.Model(inputs, entering)(x), layer.compute_dtype)
    z = np.asarray(keras.ops.cast(z, "float64"))
    for variable, value in ((layer.moving_mean, z.mean(0)), (layer.moving_variance, z.var(0))):
        variable.assign(value)
    mean, variance = (
        np.asarray(keras.ops.cast(v, "float64")) for v in (layer.moving_mean, layer.moving_variance)
    )
    folded = fold(model)
    assert not batch_norm_layers(folded)
    expected = (z - mean) / np.sqrt(variance + layer.epsilon)
    actual = np.asarray(keras.ops.cast(folded(x)[0], "float64"))
    # Rounding of the output, and 0.01 std for a folded kernel.
    atol = 2 * HALF[policy] * np.abs(expected).max() + (0.02 if before == "small product" else 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
    assert [output.dtype for output in folded.outputs] == [output.dtype for output in model.outputs]
    gone_into_dense = "Rescaling" not in [type(layer).__name__ for layer in folded.layers]
    assert gone_into_dense == (before == "small product")
