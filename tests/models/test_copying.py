"""Copies of every Keras layer, custom layers, and models that are refused.

The original is the oracle, on inputs that `copying.verify` does not use.
"""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn import fold
from tfbn.models import copying

L = keras.layers
KERAS = tuple(map(int, keras.__version__.split(".")[:2]))

RGB = (8, 8, 3)
SERIES, IMAGE, VOLUME = (6, 4), RGB, (4, 4, 4, 2)
WORDS = ["a", "c", "b", "c", "b", "c"]


def adapted(layer, data):
    """Return a layer after `adapt`."""
    layer.adapt(data)
    return layer


# Layer -> function that creates it, and the shape(s) of its input(s).
NETWORK_LAYERS = {
    "Activation": (lambda: L.Activation("gelu"), IMAGE),
    "ActivityRegularization": (lambda: L.ActivityRegularization(l1=0.1), IMAGE),
    "AdaptiveAveragePooling1D": (lambda: L.AdaptiveAveragePooling1D(2), SERIES),
    "AdaptiveAveragePooling2D": (lambda: L.AdaptiveAveragePooling2D(2), IMAGE),
    "AdaptiveAveragePooling3D": (lambda: L.AdaptiveAveragePooling3D(2), VOLUME),
    "AdaptiveMaxPooling1D": (lambda: L.AdaptiveMaxPooling1D(2), SERIES),
    "AdaptiveMaxPooling2D": (lambda: L.AdaptiveMaxPooling2D(2), IMAGE),
    "AdaptiveMaxPooling3D": (lambda: L.AdaptiveMaxPooling3D(2), VOLUME),
    "Add": (L.Add, [SERIES, SERIES]),
    "AdditiveAttention": (L.AdditiveAttention, [SERIES, SERIES]),
    "AlphaDropout": (lambda: L.AlphaDropout(0.5), IMAGE),
    "Attention": (lambda: L.Attention(use_scale=True), [SERIES, SERIES]),
    "Average": (L.Average, [SERIES, SERIES]),
    "AveragePooling1D": (lambda: L.AveragePooling1D(2), SERIES),
    "AveragePooling2D": (lambda: L.AveragePooling2D(2), IMAGE),
    "AveragePooling3D": (lambda: L.AveragePooling3D(2), VOLUME),
    "BatchNormalization": (L.BatchNormalization, IMAGE),
    "Bidirectional": (
        lambda: L.Bidirectional(L.LSTM(3), backward_layer=L.GRU(3, go_backwards=True)), SERIES),
    "Concatenate": (L.Concatenate, [SERIES, SERIES]),
    "Conv1D": (lambda: L.Conv1D(3, 2), SERIES),
    "Conv1DTranspose": (lambda: L.Conv1DTranspose(3, 2), SERIES),
    "Conv2D": (lambda: L.Conv2D(3, 2), IMAGE),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(3, 2), IMAGE),
    "Conv3D": (lambda: L.Conv3D(3, 2), VOLUME),
    "Conv3DTranspose": (lambda: L.Conv3DTranspose(3, 2), VOLUME),
    "ConvLSTM1D": (lambda: L.ConvLSTM1D(2, 2), (3, *SERIES)),
    "ConvLSTM2D": (lambda: L.ConvLSTM2D(2, 2), (3, *IMAGE)),
    "ConvLSTM3D": (lambda: L.ConvLSTM3D(2, 2), (2, *VOLUME)),
    "Cropping1D": (L.Cropping1D, SERIES),
    "Cropping2D": (lambda: L.Cropping2D(1), IMAGE),
    "Cropping3D": (lambda: L.Cropping3D(1), VOLUME),
    "Dense": (lambda: L.Dense(3, "relu"), SERIES),
    "DepthwiseConv1D": (lambda: L.DepthwiseConv1D(2), SERIES),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(2), IMAGE),
    "Dot": (lambda: L.Dot(2), [SERIES, SERIES]),
    "Dropout": (lambda: L.Dropout(0.5), IMAGE),
    "ELU": (L.ELU, IMAGE),
    "EinsumDense": (lambda: L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), SERIES),
    "Flatten": (L.Flatten, IMAGE),
    "GRU": (lambda: L.GRU(3), SERIES),
    "GRUCell": (lambda: L.RNN(L.GRUCell(3)), SERIES),
    "GaussianDropout": (lambda: L.GaussianDropout(0.5), IMAGE),
    "GaussianNoise": (lambda: L.GaussianNoise(0.5), IMAGE),
    "GlobalAveragePooling1D": (L.GlobalAveragePooling1D, SERIES),
    "GlobalAveragePooling2D": (L.GlobalAveragePooling2D, IMAGE),
    "GlobalAveragePooling3D": (L.GlobalAveragePooling3D, VOLUME),
    "GlobalMaxPooling1D": (L.GlobalMaxPooling1D, SERIES),
    "GlobalMaxPooling2D": (L.GlobalMaxPooling2D, IMAGE),
    "GlobalMaxPooling3D": (L.GlobalMaxPooling3D, VOLUME),
    "GroupNormalization": (lambda: L.GroupNormalization(3), IMAGE),
    "GroupedQueryAttention": (lambda: L.GroupQueryAttention(3, 4, 2), [SERIES, SERIES]),
    "Identity": (L.Identity, IMAGE),
    "LSTM": (lambda: L.LSTM(3), SERIES),
    "LSTMCell": (lambda: L.RNN(L.LSTMCell(3)), SERIES),
    "Lambda": (lambda: L.Lambda(lambda x: x * len(WORDS)), IMAGE),
    "LayerNormalization": (L.LayerNormalization, IMAGE),
    "LeakyReLU": (L.LeakyReLU, IMAGE),
    "Masking": (L.Masking, SERIES),
    "MaxPooling1D": (lambda: L.MaxPooling1D(2), SERIES),
    "MaxPooling2D": (lambda: L.MaxPooling2D(2), IMAGE),
    "MaxPooling3D": (lambda: L.MaxPooling3D(2), VOLUME),
    "Maximum": (L.Maximum, [SERIES, SERIES]),
    "MelSpectrogram": (lambda: L.MelSpectrogram(fft_length=64), (256,)),
    "Minimum": (L.Minimum, [SERIES, SERIES]),
    "MultiHeadAttention": (lambda: L.MultiHeadAttention(2, 3), [SERIES, SERIES]),
    "Multiply": (L.Multiply, [SERIES, SERIES]),
    "PReLU": (L.PReLU, IMAGE),
    "Permute": (lambda: L.Permute((2, 1)), SERIES),
    "RMSNormalization": (L.RMSNormalization, SERIES),
    "RNN": (lambda: L.RNN([L.LSTMCell(3), L.GRUCell(2)]), SERIES),
    "ReLU": (L.ReLU, IMAGE),
    "RepeatVector": (lambda: L.RepeatVector(3), (4,)),
    "Reshape": (lambda: L.Reshape((-1,)), IMAGE),
    "STFTSpectrogram": (
        lambda: L.STFTSpectrogram(frame_length=32, frame_step=16, fft_length=32), (256, 1)),
    "SeparableConv1D": (lambda: L.SeparableConv1D(3, 2), SERIES),
    "SeparableConv2D": (lambda: L.SeparableConv2D(3, 2), IMAGE),
    "SimpleRNN": (lambda: L.SimpleRNN(3), SERIES),
    "SimpleRNNCell": (lambda: L.RNN(L.SimpleRNNCell(3)), SERIES),
    "Softmax": (L.Softmax, IMAGE),
    "SpatialDropout1D": (lambda: L.SpatialDropout1D(0.5), SERIES),
    "SpatialDropout2D": (lambda: L.SpatialDropout2D(0.5), IMAGE),
    "SpatialDropout3D": (lambda: L.SpatialDropout3D(0.5), VOLUME),
    "SpectralNormalization": (lambda: L.SpectralNormalization(L.Dense(3)), SERIES),
    "StackedRNNCells": (lambda: L.RNN(L.StackedRNNCells([L.GRUCell(3)])), SERIES),
    "Subtract": (L.Subtract, [SERIES, SERIES]),
    "TimeDistributed": (lambda: L.TimeDistributed(L.Dense(3)), SERIES),
    "UnitNormalization": (L.UnitNormalization, IMAGE),
    "UpSampling1D": (L.UpSampling1D, SERIES),
    "UpSampling2D": (L.UpSampling2D, IMAGE),
    "UpSampling3D": (L.UpSampling3D, VOLUME),
    "ZeroPadding1D": (L.ZeroPadding1D, SERIES),
    "ZeroPadding2D": (L.ZeroPadding2D, IMAGE),
    "ZeroPadding3D": (L.ZeroPadding3D, VOLUME),
}  # fmt: skip
PREPROCESSING_LAYERS = {
    "AugMix": (L.AugMix, IMAGE),
    "AutoContrast": (L.AutoContrast, IMAGE),
    "CenterCrop": (lambda: L.CenterCrop(4, 4), IMAGE),
    "ContrastLimitedAdaptiveHistogramEqualization": (
        lambda: L.ContrastLimitedAdaptiveHistogramEqualization(tile_grid_size=(2, 2)), IMAGE),
    "CutMix": (L.CutMix, IMAGE),
    "MixUp": (L.MixUp, IMAGE),
    "Normalization": (lambda: adapted(L.Normalization(), np.arange(24.0).reshape(6, 4) ** 2), (4,)),
    "Pipeline": (lambda: L.Pipeline([L.Rescaling(2.0), L.CenterCrop(4, 4)]), IMAGE),
    "RandAugment": (L.RandAugment, IMAGE),
    "RandomBrightness": (lambda: L.RandomBrightness(0.1), IMAGE),
    "RandomColorDegeneration": (lambda: L.RandomColorDegeneration(0.1), IMAGE),
    "RandomColorJitter": (lambda: L.RandomColorJitter(brightness_factor=0.1), IMAGE),
    "RandomContrast": (lambda: L.RandomContrast(0.1), IMAGE),
    "RandomCrop": (lambda: L.RandomCrop(4, 4), IMAGE),
    "RandomElasticTransform": (L.RandomElasticTransform, IMAGE),
    "RandomErasing": (L.RandomErasing, IMAGE),
    "RandomFlip": (L.RandomFlip, IMAGE),
    "RandomGaussianBlur": (L.RandomGaussianBlur, IMAGE),
    "RandomGrayscale": (L.RandomGrayscale, IMAGE),
    "RandomHue": (lambda: L.RandomHue(0.1), IMAGE),
    "RandomInvert": (L.RandomInvert, IMAGE),
    "RandomPerspective": (L.RandomPerspective, IMAGE),
    "RandomPosterization": (lambda: L.RandomPosterization(4), IMAGE),
    "RandomRotation": (lambda: L.RandomRotation(0.1), IMAGE),
    "RandomSaturation": (lambda: L.RandomSaturation(0.1), IMAGE),
    "RandomSharpness": (lambda: L.RandomSharpness(0.1), IMAGE),
    "RandomShear": (L.RandomShear, IMAGE),
    "RandomTranslation": (lambda: L.RandomTranslation(0.1, 0.1), IMAGE),
    "RandomZoom": (lambda: L.RandomZoom(0.1), IMAGE),
    "Rescaling": (lambda: L.Rescaling([1.0, 2.0, 3.0], 5.0), IMAGE),
    "Resizing": (lambda: L.Resizing(5, 5), IMAGE),
    "Solarization": (L.Solarization, IMAGE),
}  # fmt: skip
# Inputs are integers up to 3, or words.
CATEGORICAL_LAYERS = {
    "CategoryEncoding": (lambda: L.CategoryEncoding(4), "int32"),
    "Discretization": (
        lambda: adapted(L.Discretization(num_bins=3), np.array([[0.0], [1], [2], [3]])),
        "float32",
    ),
    "Embedding": (lambda: L.Embedding(4, 3), "int32"),
    "HashedCrossing": (lambda: L.HashedCrossing(5), "string"),
    "Hashing": (lambda: L.Hashing(5), "string"),
    "IntegerLookup": (lambda: adapted(L.IntegerLookup(output_mode="one_hot"), [3, 1, 3]), "int64"),
    "StringLookup": (lambda: adapted(L.StringLookup(), WORDS), "string"),
    "TextVectorization": (
        lambda: adapted(L.TextVectorization(output_sequence_length=2), WORDS),
        "string",
    ),
}
if KERAS >= (3, 12):  # The first with this layer.
    CATEGORICAL_LAYERS["ReversibleEmbedding"] = (lambda: L.ReversibleEmbedding(4, 3), "int32")
# Base classes, inputs, wrappers of packages that are not installed, and one for labels.
OTHERS = {"Layer", "Wrapper", "InputLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper"}
OTHERS |= {"MaxNumBoundingBoxes", "TFSMLayer"}
# Returns its input unchanged in symbolic mode, so Keras builds no graph.
OTHERS |= {"Equalization"}


def randomize(model, seed=0):
    """Assign random weights, to detect a weight that is not copied."""
    rng = np.random.default_rng(seed)
    normalized = {
        id(v) for layer in model.layers if type(layer) is L.Normalization for v in layer.variables
    }  # Their adapted values are in constants as well.
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype) and id(variable) not in normalized:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def assert_copied(model, x):
    """Copy a model and compare the predictions."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        copied = copying.copy(model)
        copying.verify(model, copied)
    assert type(copied) is type(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in copied.variables}
    for mine, theirs in zip(model.variables, copied.variables, strict=True):
        assert (mine.name, mine.dtype, mine.trainable) == (
            theirs.name,
            theirs.dtype,
            theirs.trainable,
        )
        np.testing.assert_array_equal(mine.value, theirs.value)
    for mine, theirs in zip(
        keras.tree.flatten(model(x, training=False)),
        keras.tree.flatten(copied(x, training=False)),
        strict=True,
    ):
        mine, theirs = (np.asarray(keras.ops.convert_to_numpy(value)) for value in (mine, theirs))
        if np.issubdtype(mine.dtype, np.inexact):
            # The memory address of an array changes the order of its sums.
            atol = 1e-6 * np.abs(mine).max(initial=0)
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol)
        else:
            np.testing.assert_array_equal(mine, theirs)
    return copied


def test_every_keras_layer_is_tested():
    classes = [c for c in vars(L).values() if inspect.isclass(c) and issubclass(c, L.Layer)]
    known = OTHERS.union(NETWORK_LAYERS, PREPROCESSING_LAYERS, CATEGORICAL_LAYERS)
    assert {cls.__name__ for cls in classes} <= known


# A quick selection with state, sublayers or a function.
QUICK = {"BatchNormalization", "Bidirectional", "Lambda", "Normalization", "SpectralNormalization"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*NETWORK_LAYERS, *PREPROCESSING_LAYERS)
    ],
)
def test_every_layer(name):
    make, shape = (NETWORK_LAYERS | PREPROCESSING_LAYERS)[name]
    several = isinstance(shape, list)
    inputs = [keras.Input(s) for s in shape] if several else keras.Input(shape)
    layer = make()
    outputs = layer(*inputs) if "Query" in name or "Head" in name else layer(inputs)
    model = randomize(keras.Model(inputs, outputs))
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, *s)).astype("float32") for s in (shape if several else [shape])]
    assert_copied(model, x if several else x[0])


@pytest.mark.parametrize("name", CATEGORICAL_LAYERS)
def test_every_layer_with_categorical_inputs(name):
    make, dtype = CATEGORICAL_LAYERS[name]
    inputs = [keras.Input((1,), dtype=dtype) for _ in range(2 if name == "HashedCrossing" else 1)]
    inputs = inputs if len(inputs) > 1 else inputs[0]
    model = keras.Model(inputs, make()(inputs))
    x = tf.constant([["b"], ["z"], ["c"]] if dtype == "string" else [[1], [3], [0]])
    x = x if dtype == "string" else tf.cast(x, dtype)
    assert_copied(model, [x, x] if isinstance(inputs, list) else x)


def test_layer_around_a_saved_model(tmp_path):
    inner = randomize(keras.Sequential([keras.Input((4,)), L.Dense(3)]))
    inner.export(tmp_path / "inner", verbose=False)
    x = keras.Input((4,))
    layer = L.TFSMLayer(str(tmp_path / "inner"), call_endpoint="serve")
    assert_copied(keras.Model(x, layer(x)), np.ones((2, 4), "float32"))


def test_feature_space():
    space = keras.utils.FeatureSpace(
        features={
            "number": keras.utils.FeatureSpace.float_normalized(),
            "word": keras.utils.FeatureSpace.string_categorical(),
        },
        output_mode="concat",
    )
    data = {"number": np.array([1.0, 2.0, 50.0]), "word": np.array(["x", "y", "x"])}
    space.adapt(tf.data.Dataset.from_tensor_slices(data))
    model = keras.Model(space.get_inputs(), space.get_encoded_features())
    x = {"number": tf.constant([[3.0], [9.0]]), "word": tf.constant([["y"], ["z"]])}
    assert_copied(model, x)


@pytest.mark.slow
def test_low_rank_factors_and_quantized_weights():
    model = keras.Sequential([keras.Input((4,)), L.Dense(5), L.Dense(3)])
    model.layers[0].enable_lora(2)
    model.layers[1].bias.trainable = False
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    assert_copied(randomize(model), x)
    model = randomize(keras.Sequential([keras.Input((4,)), L.Dense(5), L.Dense(3)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    assert_copied(model, x)


def test_random_generators_keep_their_state():
    model = keras.Sequential([keras.Input((40,)), L.Dropout(0.5, seed=3)])
    x = np.ones((2, 40), "float32")
    model(x, training=True)
    copied = assert_copied(model, x)
    np.testing.assert_array_equal(copied(x, training=True), model(x, training=True))


class Noisy(L.Layer):
    """Adds noise in inference too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


def test_verify_leaves_generators_unchanged():
    model = keras.Sequential([keras.Input((4,)), Noisy()])
    before = model.layers[0].seed_generator.state.numpy()
    copying.verify(model, copying.copy(model))
    np.testing.assert_array_equal(model.layers[0].seed_generator.state, before)


def scaled(name, factor):
    """Create an unregistered layer class with a given name."""

    def call(self, x):
        return x * factor

    return type(name, (L.Layer,), {"call": call})


def test_unregistered_custom_classes_and_functions():
    def own_activation(x):
        return x * 3

    inputs = keras.Input((3, 4))
    # Two classes of one name, which is also the name of a layer and an operation of Keras.
    x = scaled("Add", 2.0)()(inputs) + 1.0
    x = scaled("Own", 3.0)()(scaled("Own", 5.0)()(x))
    x = L.TimeDistributed(L.Dense(2, own_activation))(x)
    x = L.Add()([x, x * np.array([1.0, 2.0])])
    assert_copied(randomize(keras.Model(inputs, x)), np.ones((2, 3, 4), "float32"))


class WithStore(L.Layer):
    """A layer with NumPy state that it saves and loads."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = np.zeros(4, "float32")

    def call(self, x):
        return x + self.table

    def compute_output_shape(self, input_shape):
        """Return the shape of the input."""
        return input_shape

    def save_own_variables(self, store):
        """Save an array and a number."""
        store["table"] = self.table
        store["size"] = len(self.table)

    def load_own_variables(self, store):
        """Load them as from HDF5."""
        assert store["size"][()] == 4
        self.table = store["table"][:]


class WithHiddenState(WithStore):
    """A layer with NumPy state that it does not save."""

    def save_own_variables(self, store):
        """Save nothing."""

    def load_own_variables(self, store):
        """Load nothing."""


def around(layer, wrapped=False):
    """Build a network around a layer with a table of four values."""
    layer.table = np.arange(4, dtype="float32")
    x = keras.Input((3, 4))
    y = L.TimeDistributed(layer)(x) if wrapped else layer(x)
    y = L.BatchNormalization()(L.Dense(3)(y))
    return randomize(keras.Model(x, y))


@pytest.mark.parametrize("wrapped", [False, True])
def test_custom_state_is_copied_or_refused(wrapped):
    x = np.ones((2, 3, 4), "float32")
    assert_copied(around(WithStore(), wrapped), x)
    model = around(WithStore(), wrapped)
    np.testing.assert_allclose(fold(model)(x), model(x), rtol=1e-5)
    model = around(WithHiddenState(), wrapped)
    with pytest.raises(ValueError, match=r"differ by .*save_own_variables.*\['WithHiddenState'\]"):
        copying.verify(model, copying.copy(model))
    with pytest.raises(ValueError, match=r"differ by .*save_own_variables.*\['WithHiddenState'\]"):
        fold(model)


def test_inputs_stay_sparse_and_optional():
    class First(L.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

        def compute_output_shape(self, x_shape, y_shape=None):
            return x_shape

    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b", optional=True)
    x = {"a": np.ones((2, 3), "float32"), "b": None}
    copied = assert_copied(keras.Model({"a": a, "b": b}, First()(a, b)), x)
    assert list(copied.input) == ["a", "b"]
    x = tf.sparse.from_dense(np.ones((2, 5), "float32"))
    inputs = keras.Input((5,), sparse=True)
    copied = assert_copied(keras.Model(inputs, L.Dense(2)(inputs)), x)
    assert copied.inputs[0].sparse


def test_fixed_batch_size_and_unknown_sizes():
    x = keras.Input(batch_shape=(4, 6))
    model = keras.Model(x, keras.ops.reshape(x, (4, 3, 2)))
    assert_copied(model, np.ones((4, 6), "float32"))


def test_predictions_of_windows_larger_than_the_image_are_not_compared(monkeypatch):
    x = keras.Input((None, None, 3))
    stack = keras.Sequential([x, *(L.Conv2D(2, 3, 2) for _ in range(6))])  # 32 is too small.
    predict, sizes = copying._predict, []
    monkeypatch.setattr(
        copying,
        "_predict",
        lambda model, inputs: (sizes.append(inputs[0].shape[1]), predict(model, inputs))[1],
    )
    for model in (stack, keras.Model(x, stack(x))):
        assert_copied(model, np.ones((1, 150, 130, 3), "float32"))
    assert sizes and min(sizes) >= 127


def test_vocabulary_without_unknown_words():
    model = keras.Sequential([keras.Input((1,), dtype="string"), L.StringLookup(num_oov_indices=0)])
    model.layers[0].set_vocabulary(["x", "y"])
    assert_copied(model, tf.constant([["y"]]))


def test_warns_if_no_random_input_is_accepted():
    lookup = L.IntegerLookup(num_oov_indices=0, vocabulary=[70, 71])
    model = keras.Sequential([keras.Input((1,), dtype="int64"), lookup], name="picky")
    with pytest.warns(
        UserWarning, match="'picky' .* not compared: the model accepts no random"
    ) as caught:
        copying.verify(model, copying.copy(model))
    assert len(caught) == 1


class Unseeded(L.Layer):
    """Draws from a generator that cannot be copied."""

    def call(self, x):
        return tf.random.uniform(tf.shape(x))


def test_warns_if_predictions_are_random():
    model = keras.Sequential([keras.Input((4,)), Unseeded()])
    with pytest.warns(UserWarning, match="not compared: the model predicts something else"):
        copying.verify(model, copying.copy(model))


class UninitializedBelow(L.Layer):
    """Returns random values for images of less than `least` pixels a side."""

    def __init__(self, least=100, **options):
        super().__init__(**options)
        self.least = least
        self.lost = np.random.default_rng().random()  # State that no copy has.

    def call(self, x):
        if x.shape[1] is not None and x.shape[1] < self.least:
            return tf.random.uniform(tf.shape(x))
        return x * self.factor

    factor = 1.0


class LosesItsFactor(UninitializedBelow):
    @property
    def factor(self):
        return self.lost


def test_too_small_images_are_skipped():
    model = keras.Sequential([keras.Input((None, None, 1)), UninitializedBelow()])
    assert_copied(model, np.ones((1, 150, 130, 1), "float32"))
    model = keras.Sequential([keras.Input((None, None, 1)), LosesItsFactor()])
    with pytest.raises(ValueError, match=r"differ by .*\['LosesItsFactor'\]"):
        copying.verify(model, copying.copy(model))


def test_empty_predictions_are_not_compared():
    def cut(x):
        return x[:, 40:]

    model = keras.Sequential([keras.Input((None, 1)), L.Lambda(cut), LosesItsFactor(least=1)])
    with pytest.raises(ValueError, match="differ by"):
        copying.verify(model, copying.copy(model))
    model = keras.Sequential([keras.Input((30, 1)), L.Lambda(cut)])
    with pytest.warns(UserWarning, match="not compared: its predictions .* are empty"):
        copying.verify(model, copying.copy(model))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e-3])
def test_differences_are_detected(bad):
    def network(bias):
        x = keras.Input((2,))
        dense = L.Dense(1, kernel_initializer="ones")
        model = keras.Model(x, [L.ReLU()(x), dense(x)])
        dense.bias.assign([bias])
        return model

    for one, other in ((0.0, bad), (bad, 0.0)):
        with pytest.raises(ValueError, match="differ by"):
            copying.verify(network(one), network(other))
    copying.verify(network(bad), network(bad))


def test_unused_layers_are_ignored():
    inputs = keras.Input((4,))
    model = scaled_by_class(inputs)
    model.extra = L.Rescaling(2.0)
    model.extra = None
    if KERAS >= (3, 15):  # Earlier ones forget the layer by themselves.
        assert len(list(model._flatten_layers())) == 4
    assert_copied(model, np.ones((2, 4), "float32"))


def scaled_by_class(inputs):
    """Build a Functional model of a custom class."""

    class Own(keras.Model):
        pass

    return Own(inputs, L.Dense(3)(inputs))


def test_models_that_cannot_be_rebuilt_are_refused():
    class NeedsArgument(keras.Model):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.dense = L.Dense(units)

        def call(self, x):
            return self.dense(x)

    model = NeedsArgument(3)
    model(np.ones((2, 4)))
    with pytest.raises(
        ValueError,
        match=r"NeedsArgument.*(NotImplementedError|TypeError).* Add get_config\(\)",
    ):
        copying.copy(model)

    class Configured(NeedsArgument):
        """The advice."""

        def get_config(self):
            return {**super(NeedsArgument, self).get_config(), "units": self.dense.units}

    model = Configured(3)
    model(np.ones((2, 4)))
    assert_copied(model, np.ones((2, 4), "float32"))
    shared = L.Dense(4)
    a, b = keras.Input((4,)), keras.Input((3, 4))
    model = keras.Model([a, b], [shared(a), L.TimeDistributed(shared)(b)])
    with pytest.raises(ValueError, match="of 3 layers with state the config creates 4"):
        copying.copy(model)
    lookup = adapted(L.StringLookup(), ["two\nlines", "one"])
    with pytest.raises(ValueError, match="the vocabulary of layer 'string_lookup"):
        copying.copy(keras.Sequential([keras.Input((1,), dtype="string"), lookup]))


class Rough(keras.layers.Layer):
    """Rounds differently each time, as some devices do."""

    def call(self, x):
        """Return the inputs with a relative noise of 1e-4."""
        return x * (1 + 1e-4 * tf.random.normal(tf.shape(x)))


def test_small_noise_of_predictions_is_tolerated():
    model = keras.Sequential([keras.Input((4,)), Rough(), L.BatchNormalization()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = tfbn.convert(model)
    assert type(copy.layers[1]) is tfbn.BatchNormalization
