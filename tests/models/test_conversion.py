"""Converted models have the same predictions, training and files."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn.models import copying
from tfbn.models.conversion import convert

KERAS, OURS = keras.layers.BatchNormalization, tfbn.BatchNormalization


def randomize(model, seed=0):
    """Assign random weights, to detect a weight that is not copied."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def layers_of(model):
    return list(model._flatten_layers())


def classes(model):
    return [type(layer) for layer in layers_of(model)]


def assert_converted(converted, model, x):
    expected = [OURS if c is KERAS else c for c in classes(model)]
    assert OURS in expected
    assert classes(converted) == expected
    assert [w.name for w in converted.weights] == [w.name for w in model.weights]
    for ours, theirs in zip(converted.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for layer, original in zip(layers_of(converted), layers_of(model), strict=True):
        assert layer.name == original.name or not layer.weights
        assert layer.trainable == original.trainable, layer.name
        assert layer.dtype_policy == original.dtype_policy
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(converted(x, training=False), expected, rtol=1e-4, atol=1e-5)


def sequential():
    return keras.Sequential(
        [
            keras.layers.Dense(4),
            KERAS(momentum=0.7, epsilon=1e-2, scale=False, beta_regularizer="l2"),
            keras.layers.Dropout(0.5),
        ]
    )


def functional():
    x = inputs = keras.Input((6, 5))
    x = keras.layers.Dense(5, dtype="mixed_float16")(x)
    x = KERAS(dtype="mixed_float16", name="half")(x)
    shared = KERAS(name="shared")
    x = keras.layers.Concatenate()([shared(x), shared(inputs)])
    x = keras.layers.TimeDistributed(KERAS(name="wrapped"))(x)
    x = keras.layers.Permute((2, 1))(x) + 1.0
    nested = keras.Sequential([keras.Input((10, 6)), KERAS(axis=1), keras.layers.ReLU()])
    return keras.Model(inputs, nested(x), name="everything")


def test_functional_with_shared_wrapped_and_nested_layers():
    model = randomize(functional())
    before = model.get_weights()
    x = np.random.default_rng(1).normal(size=(3, 6, 5))

    converted = convert(model)

    assert_converted(converted, model, x)
    assert converted.get_layer("half").compute_dtype == "float16"
    assert converted.get_layer("shared").momentum == 0.99
    # A layer that is used twice stays one layer.
    for m in (model, converted):
        m.get_layer("shared").beta.assign(np.arange(5.0))
    np.testing.assert_allclose(converted(x), model(x), rtol=1e-4, atol=1e-5)
    # The original does not change and shares nothing with the copy.
    model.set_weights(before)
    assert KERAS in classes(model)
    assert OURS not in classes(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in converted.variables}


def test_sequential_keeps_arguments():
    model = sequential()
    model.build((None, 3))
    randomize(model)
    converted = convert(model)
    assert_converted(converted, model, np.ones((2, 3), "float32"))
    config, original = (m.layers[1].get_config() for m in (converted, model))
    assert config == original
    assert len(converted.losses) == 1


def test_model_built_by_its_first_call():
    model = sequential()
    x = np.random.default_rng(0).normal(size=(4, 3))
    model(x)
    randomize(model)
    assert_converted(convert(model), model, x)


def test_unbuilt_model():
    converted = convert(sequential())
    assert OURS in classes(converted)
    assert not converted.built
    assert converted(np.ones((2, 3))).shape == (2, 4)


def test_trainable_flags():
    model = randomize(functional())
    model.trainable = False
    model.get_layer("shared").trainable = True
    converted = convert(model)
    assert_converted(converted, model, np.ones((1, 6, 5)))
    x = np.random.default_rng(0).normal(size=(8, 6, 5))
    moved = {}
    for m in (model, converted):
        before = m.get_layer("shared").moving_mean.numpy(), m.get_layer("half").moving_mean.numpy()
        m(x, training=True)
        after = m.get_layer("shared").moving_mean.numpy(), m.get_layer("half").moving_mean.numpy()
        moved[m] = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == {model: [True, False], converted: [True, False]}


def test_subclasses_of_the_layer_are_not_converted():
    class Doubled(KERAS):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training=training)

    model = keras.Sequential([keras.Input((3,)), Doubled(), KERAS()])
    converted = convert(randomize(model))
    assert classes(converted)[-2:] == [Doubled, OURS]
    x = np.ones((2, 3), "float32")
    np.testing.assert_allclose(converted(x), model(x), rtol=1e-5)


class Block(keras.Model):
    """A subclassed model whose code creates batch norm."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense, self.norm = keras.layers.Dense(units), KERAS()

    def call(self, inputs, training=None):
        return self.norm(self.dense(inputs), training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Backbone(keras.Model):
    """A Functional model whose class builds the graph, as in KerasHub."""

    def __init__(self, units, preprocess=None, **kwargs):
        inputs = keras.Input((3,))
        features = Block(units, name="block")(inputs)
        super().__init__(inputs, KERAS(name="last")(features), **kwargs)
        self.units, self.preprocess = units, preprocess

    def get_config(self):
        return {"units": self.units, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def from_raw(self, x):
        return self(x / 255)


def test_batch_norm_created_by_a_class():
    x = np.ones((2, 3), "float32")
    model = randomize(Backbone(4))
    model.get_layer("block").norm.trainable = False
    converted = convert(model)
    assert_converted(converted, model, x)
    np.testing.assert_allclose(converted.from_raw(x), model.from_raw(x), rtol=1e-5)
    # A converted model is copied, although its class creates Keras's layers; so is a folded one.
    assert classes(copying.copy(converted)) == classes(converted)
    np.testing.assert_allclose(tfbn.fold(converted)(x), model(x), rtol=1e-5)
    # Nested in another model, and in a subclassed one.
    inputs = keras.Input((3,))
    model = randomize(keras.Model(inputs, keras.layers.Dense(2)(Backbone(4)(inputs))))
    assert_converted(convert(model), model, x)
    model = Block(5)
    model(x)
    assert_converted(convert(randomize(model)), model, x)


def test_statistics_of_the_model_fit_the_copy():
    model = Block(5)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    model(x)
    stats = tfbn.update_population_stats(model, x, verbose=0)
    converted = convert(model)
    swept = tfbn.collect(converted, x, verbose=0)
    assert list(swept) == list(stats)
    stats.previous.assign(converted)


@pytest.mark.parametrize("make", [Backbone, Block])
def test_saved_class_loads_with_the_layers_of_its_code(make, tmp_path):
    """It loads with Keras's layers and the same predictions, and can be converted again."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model = make(4)
    model(x)
    converted = convert(randomize(model))
    converted.save(tmp_path / "model.keras")
    objects = {"Backbone": Backbone, "Block": Block}
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert type(loaded) is make and OURS not in classes(loaded)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5)
    reconverted = convert(loaded)
    assert KERAS not in classes(reconverted) and OURS in classes(reconverted)
    np.testing.assert_allclose(reconverted(x), model(x), rtol=1e-5)


def test_our_layer_has_the_attributes_of_keras():
    """`convert_layer` requires it, because it changes the class of a layer."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    stock, ours = (cls(name="bn", momentum=0.9) for cls in (KERAS, OURS))
    for layer in (stock, ours):
        layer(x)
    assert vars(stock).keys() == vars(ours).keys()
    assert not {"__init__", "build", "get_config", "from_config"} & vars(OURS).keys()
    converted = convert(keras.Sequential([keras.Input((3,)), stock])).layers[0]
    for layer in (converted, ours):
        layer(np.full((4, 3), np.nan, "float32"), training=True)
        # Our layer ignores a batch with NaN.
        np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    config = keras.saving.serialize_keras_object(converted)
    assert config["registered_name"] == "tfbn>BatchNormalization"


def test_state_other_than_weights_is_copied():
    normalization = keras.layers.Normalization()
    normalization.adapt(np.array([[0.0, 100], [10, 900]]))
    lookup = keras.layers.StringLookup(output_mode="one_hot")
    lookup.adapt(["a", "b", "b"])
    numbers, words = keras.Input((2,)), keras.Input((1,), dtype="string")
    x = keras.layers.Concatenate()([normalization(numbers), lookup(words)])
    model = randomize_batch_norm(keras.Model([numbers, words], KERAS()(x)))
    converted = convert(model)
    given = [tf.constant([[5.0, 1.0], [7.0, 2.0]]), tf.constant([["a"], ["?"]])]
    np.testing.assert_allclose(converted(given), model(given), rtol=1e-5, atol=1e-6)


def randomize_batch_norm(model):
    for layer in model.layers:
        if isinstance(layer, KERAS):
            layer.set_weights([w + 0.5 for w in layer.get_weights()])
    return model


class Own(keras.Model):
    """Build a Functional model of a custom class."""


@pytest.mark.parametrize("cls", [keras.Model, Own])
def test_layers_with_the_name_of_an_operation(cls):
    """`x + 3` is the operation Add, not the layer Add (as in MobileNetV3)."""
    inputs = keras.Input((3,))
    model = randomize(cls(inputs, KERAS()(keras.layers.Add()([inputs + 3.0, inputs]))))
    assert_converted(convert(model), model, np.ones((2, 3)))


def test_other_objects_are_refused(tmp_path):
    for wrong in (keras.layers.Dense(3), "model.keras", None):
        with pytest.raises(ValueError, match=r"Expected a keras.Model. Received: .*load_model"):
            convert(wrong)
    model = randomize(sequential_of_input())
    model.save(tmp_path / "model.keras")
    converted = convert(keras.models.load_model(tmp_path / "model.keras"))  # The advice.
    assert_converted(converted, model, np.ones((2, 3), "float32"))


def sequential_of_input():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), KERAS()])


def test_copy_is_not_compiled():
    def own_loss(y, y_pred):
        return keras.ops.mean(y - y_pred)

    for model in (sequential(), functional(), Backbone(3)):
        model.compile("adam", own_loss)
        assert model.compiled and not convert(model).compiled


def test_copy_with_other_predictions_is_refused():
    class Shifted(keras.layers.Layer):
        shift = 0.0

        def call(self, x):
            return x + self.shift

    model = keras.Sequential([keras.Input((3,)), Shifted(), KERAS()])
    model.layers[0].shift = 0.1
    with pytest.raises(ValueError, match=r"predictions.*\['Shifted'\]"):
        convert(model)

    class Saving(Shifted):
        """The advice."""

        def save_own_variables(self, store):
            store["shift"] = np.float32(self.shift)

        def load_own_variables(self, store):
            self.shift = float(store["shift"][()])

    model = randomize(keras.Sequential([keras.Input((3,)), Saving(), KERAS()]))
    model.layers[0].shift = 0.1
    assert_converted(convert(model), model, np.ones((2, 3), "float32"))


def test_functional_model_with_custom_train_step():
    class Custom(keras.Model):
        def train_step(self, data):
            return {"marker": 1.0}

    inputs = keras.Input((3,))
    model = randomize(Custom(inputs, KERAS()(inputs)))
    converted = convert(model)
    assert type(converted) is Custom
    assert_converted(converted, model, np.ones((2, 3), "float32"))


def test_converted_model_saves_and_loads(tmp_path):
    model = randomize(functional())
    converted = convert(model)
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_converted(loaded, model, np.ones((2, 6, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV3Small"])
def test_applications(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=7)
    for layer in model.layers[::3]:
        layer.trainable = False
    # Close to the initial values: with uniform weights a deep network overflows.
    rng = np.random.default_rng(0)
    model.set_weights([w * rng.uniform(0.9, 1.1, w.shape) for w in model.get_weights()])
    assert_converted(convert(model), model, rng.normal(size=(2, 64, 64, 3)))
