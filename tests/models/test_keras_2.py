"""Models and layers of Keras 2 (`tf_keras`) are refused, with advice that works."""

import keras
import networks
import numpy as np
import pytest

import tfbn

keras_2 = pytest.importorskip("tf_keras")

x = np.random.default_rng(0).normal(3, 2, (32, 6)).astype("float32")
y = x[:, :1]


def network(library):
    layers = library.layers
    model = library.Sequential(
        [layers.InputLayer((6,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    return model


def functional():
    inputs = keras_2.Input((6,))
    return keras_2.Model(inputs, keras_2.layers.BatchNormalization()(inputs), name="functional")


class Subclassed(keras_2.Model):
    """A model class of the user."""

    def __init__(self):
        super().__init__()
        self.bn = keras_2.layers.BatchNormalization()

    def call(self, inputs, training=None):
        return self.bn(inputs, training=training)


class Layer(keras_2.layers.BatchNormalization):
    """A layer class of the user."""


def population():
    return tfbn.collect(network(keras), x, verbose=0)


MODELS = {
    "sequential": lambda: network(keras_2),
    "functional": functional,
    "subclassed": Subclassed,
    "layer": keras_2.layers.BatchNormalization,
    "custom layer": Layer,
}
USES = {
    "collect": lambda model, path: tfbn.collect(model, x),
    "update_population_stats": lambda model, path: tfbn.update_population_stats(model, x),
    "collect_shards": lambda model, path: tfbn.collect_shards(model, [x]),
    "collect_shards by a function": lambda model, path: tfbn.collect_shards(lambda: model, [x]),
    "convert": lambda model, path: tfbn.convert(model),
    "fold": lambda model, path: tfbn.fold(model),
    "export": lambda model, path: tfbn.export(model, path / "served"),
    "read": lambda model, path: tfbn.PopulationStats.read(model),
    "assign": lambda model, path: population().assign(model),
    "mismatch": lambda model, path: population().mismatch(model),
    "callback's model": lambda model, path: network(keras).fit(
        x, y, verbose=0, callbacks=[tfbn.PopulationStatsCallback(x, model=model)]
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("use", USES)
def test_refused(use, kind, tmp_path):
    model = MODELS[kind]()
    with pytest.raises(ValueError, match=r"Expected a model of Keras 3.*tf_keras.*load_model") as e:
        USES[use](model, tmp_path)
    assert model.name in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "callback",
    [
        lambda: tfbn.PopulationStatsCallback(x),
        lambda: tfbn.PopulationStatsCallback(x, every_epoch=True),
        lambda: tfbn.StatsTracker(x, validation_data=(x, y)),
    ],
)
def test_refused_by_callbacks_before_the_first_step(callback):
    model = network(keras_2)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"Expected a model of Keras 3.*tf_keras.*load_model"):
        model.fit(x, y, verbose=0, callbacks=[callback()])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("build", [lambda: network(keras_2), functional])
def test_advice_works(tmp_path, build):
    old = build()
    old.compile("adam", "mse", metrics=["mae"])
    old.fit(x, y, verbose=0)
    old.save(tmp_path / "model.h5")
    model = keras.models.load_model(tmp_path / "model.h5", compile=False)
    np.testing.assert_allclose(model.predict(x, verbose=0), old.predict(x, verbose=0), atol=1e-5)
    tfbn.update_population_stats(model, x, verbose=0)
    [bn] = [one for one in model.layers if isinstance(one, keras.layers.BatchNormalization)]
    entering = np.float64(keras.Model(model.inputs, bn.input)(x))
    networks.assert_layer(bn, entering.mean(0), entering.var(0), 1e-4)
