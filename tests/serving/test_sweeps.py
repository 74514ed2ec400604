"""Tests of stale statistics: whether a sweep over the model's weights produced them."""

import gc
import json
import weakref

import keras
import numpy as np
import pytest
from exported_models import dense_model, sweep
from keras import layers

import tfbn
from tfbn import export
from tfbn.models.fingerprints import fingerprint
from tfbn.serving import provenance, sweeps


def siamese():
    """Return an encoder with two batch norm layers, and a model that calls it twice."""
    encoder = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3),
            layers.BatchNormalization(name="first"),
            layers.Dense(2),
            layers.BatchNormalization(name="second"),
        ],
        name="encoder",
    )
    a, b = keras.Input((4,)), keras.Input((4,))
    distance = layers.Dense(1)(layers.Subtract()([encoder(a), encoder(b)]))
    return encoder, sweep(keras.Model([a, b], distance))


def test_the_encoder_of_a_swept_network_is_swept(tmp_path):
    encoder, network = siamese()
    written = json.loads(
        (export(encoder, tmp_path, require_population=True).path / provenance.FILE).read_text()
    )
    assert written["stale"] is None
    assert list(written["statistics"]["layers"]) == ["first", "second"]
    swept = sweeps.sweep_of(network).stats
    for path, layer in written["statistics"]["layers"].items():
        off = swept.compare(swept.previous)[f"encoder/{path}"]
        # A sweep over one batch has no standard errors.
        known = {"channels": 3 if path == "first" else 2, "count": 320, "relative_error": None}
        assert layer == {**known, **off}


def test_a_swept_backbone_under_a_new_head_is_swept(tmp_path):
    encoder, _network = siamese()
    headed = keras.Sequential([encoder, layers.Dense(3), layers.Dense(2)])
    headed.build((None, 4))
    export(headed, tmp_path, require_population=True)
    x = keras.Input((4,))
    functional = keras.Model(x, layers.Dense(2)(encoder(x)))
    assert sweeps.sweep_of(functional).stale is None


@pytest.mark.quick(2)
@pytest.mark.parametrize("change", ["kernel", "gamma", "moving_mean"])
@pytest.mark.parametrize("alive", [True, False])
def test_a_changed_part_is_stale(change, alive):
    encoder, network = siamese()
    if not alive:
        del network
        gc.collect()
    assert sweeps.sweep_of(encoder).stale is None
    layer = encoder.layers[0 if change == "kernel" else 1]
    variable = getattr(layer, change)
    held = variable.numpy()
    variable.assign(held + 1e-3)
    stale = sweeps.sweep_of(encoder).stale
    assert "changed since the sweep" in stale and (change in stale or change == "moving_mean")
    variable.assign(held)
    assert sweeps.sweep_of(encoder).stale is None


def test_what_is_after_the_last_batch_norm_does_not_matter():
    """Neither do its scale and shift."""
    encoder, network = siamese()
    encoder.layers[-1].gamma.assign([5.0, 5.0])
    network.layers[-1].kernel.assign([[5.0], [5.0]])
    for model in (encoder, network):
        assert sweeps.sweep_of(model).stale is None


def test_a_head_that_is_trained_on_a_frozen_base_leaves_the_base_swept():
    encoder, network = siamese()
    del network
    gc.collect()
    encoder.trainable = False
    x = keras.Input((4,), name="x")
    headed = keras.Model(x, layers.Dense(1, name="head")(layers.Dropout(0.5)(encoder(x))))
    headed.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(16, 4)), rng.normal(size=(16, 1))
    before = headed.get_layer("head").kernel.numpy()
    headed.fit(*batch, verbose=0)
    assert not np.array_equal(before, headed.get_layer("head").kernel)
    actual = sweeps.sweep_of(headed)
    assert actual.stale is None and list(actual.stats) == ["encoder/first", "encoder/second"]
    encoder.trainable = True
    headed.compile("sgd", "mse")
    headed.fit(*batch, verbose=0)
    assert "changed since the sweep" in sweeps.sweep_of(headed).stale


def test_a_batch_norm_in_the_new_head_is_not_part_of_the_sweep_until_it_is_swept():
    encoder, _network = siamese()
    encoder.trainable = False
    x = keras.Input((4,), name="x")
    headed = keras.Model(x, layers.BatchNormalization(name="new")(encoder(x)))
    assert "layer 'new' was not part" in sweeps.sweep_of(headed).stale
    data = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    stats = tfbn.update_population_stats(headed, data, verbose=0)
    assert list(stats) == ["new"]  # The others are frozen.
    assert sweeps.sweep_of(headed).stale is None
    encoder.layers[1].moving_mean.assign([1.0, 2.0, 3.0])
    assert "moving_mean of layer 'encoder/first'" in sweeps.sweep_of(headed).stale


def test_the_statistics_of_a_frozen_layer_upstream_are_weights_to_the_sweep():
    """It was not swept, and the layers after it depend on it."""
    base = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="base")])
    base.trainable = False
    x = keras.Input((4,), name="x")
    model = keras.Model(x, layers.BatchNormalization(name="top")(layers.Dense(3)(base(x))))
    data = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    tfbn.update_population_stats(model, data, verbose=0)
    assert sweeps.sweep_of(model).stale is None
    base.layers[0].moving_variance.assign([4.0, 4.0, 4.0, 4.0])
    assert "changed since" in sweeps.sweep_of(model).stale


class Subclassed(keras.Model):
    """Define layers in another order than their calls, with a trainable head."""

    def __init__(self, encoder):
        super().__init__()
        self.head = layers.Dense(1)
        self.bn = layers.BatchNormalization(name="last")
        self.middle = layers.Dense(2)
        self.encoder = encoder

    def call(self, x, training=None):
        return self.head(
            self.bn(self.middle(self.encoder(x, training=training)), training=training)
        )


@pytest.mark.parametrize("where, stale", [("head", False), ("middle", True)])
def test_the_order_of_calls_decides_and_not_that_of_attributes(where, stale):
    encoder, _network = siamese()
    model = Subclassed(encoder)
    model(np.ones((2, 4), "float32"))
    sweep(model)
    getattr(model, where).kernel.assign_add(getattr(model, where).kernel)
    actual = sweeps.sweep_of(model).stale
    assert bool(actual) == stale
    if stale:
        assert "middle" in actual or "dense" in actual


class Untraceable(keras.Model):
    """Require a batch of known size."""

    def __init__(self):
        super().__init__()
        self.bn, self.head = layers.BatchNormalization(name="bn"), layers.Dense(2)

    def call(self, x, training=None):
        return self.head(self.bn(x, training=training)[: int(x.shape[0])])


def test_where_the_network_cannot_be_traced_every_weight_counts():
    model = Untraceable()
    model(np.ones((2, 4), "float32"))
    sweep(model)
    assert sweeps.sweep_of(model).stale is None
    model.head.kernel.assign_add(model.head.kernel)
    assert "changed since the sweep" in sweeps.sweep_of(model).stale


def test_a_layer_that_comes_back_from_its_own_output_depends_on_what_is_after_it():
    """Build a shared layer that is called twice, with a Dense layer in between."""
    x = keras.Input((3,), name="x")
    bn, dense = layers.BatchNormalization(name="bn"), layers.Dense(3, name="between")
    head = layers.Dense(1, name="head")
    model = sweep(keras.Model(x, head(bn(dense(bn(x))))))
    head.kernel.assign_add(head.kernel)
    assert sweeps.sweep_of(model).stale is None
    dense.kernel.assign_add(dense.kernel)
    assert "between/kernel" in sweeps.sweep_of(model).stale


def test_in_a_loop_every_weight_counts():
    class Cell(layers.Layer):
        def __init__(self):
            super().__init__()
            self.state_size = 3
            self.bn = layers.BatchNormalization(name="bn")

        def build(self, shape):
            self.bn.build((None, 3))

        def call(self, x, states, training=None):
            y = self.bn(x + states[0], training=training)
            return y, [y]

    x = keras.Input((5, 3), name="x")
    model = sweep(keras.Model(x, layers.Dense(1, name="head")(layers.RNN(Cell())(x))))
    assert sweeps.sweep_of(model).stale is None
    model.get_layer("head").kernel.assign_add(model.get_layer("head").kernel)
    assert "head/kernel" in sweeps.sweep_of(model).stale


def test_weights_are_found_on_several_devices(two_devices):
    with two_devices.scope():
        model = sweep(dense_model())
    model.layers[2].kernel.assign_add(model.layers[2].kernel)
    assert sweeps.sweep_of(model).stale is None
    model.layers[0].kernel.assign_add(model.layers[0].kernel)
    assert "changed since the sweep" in sweeps.sweep_of(model).stale


def test_what_the_swept_model_did_not_have_is_stale():
    encoder, _network = siamese()
    x = keras.Input((6,))
    adapted = keras.Model(x, encoder(layers.Dense(4, name="adapter")(x)))
    assert "'adapter/" in sweeps.sweep_of(adapted).stale
    x = keras.Input((4,))
    normalised = keras.Model(x, layers.BatchNormalization(name="new")(encoder(x)))
    assert "layer 'new' was not part" in sweeps.sweep_of(normalised).stale
    stranger = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    assert sweeps.sweep_of(stranger) == (None, "no sweep of them is known")


def test_the_last_sweep_of_a_layer_counts_in_every_model_that_has_it():
    encoder, network = siamese()
    sweep(encoder)
    assert sweeps.sweep_of(network).stats.fingerprint == fingerprint(encoder)
    encoder.layers[0].bias.assign_add([1.0, 0.0, 0.0])
    for model in (encoder, network):
        assert "weights have changed" in sweeps.sweep_of(model).stale


def test_a_network_of_two_that_were_swept_is_swept():
    a, b = dense_model(), siamese()[0]
    x = keras.Input((4,), name="x")
    both = keras.Model(x, layers.Add()([a(x), b(x)]))
    actual = sweeps.sweep_of(both)
    assert actual.stale is None and list(actual.stats) == ["encoder/first", "encoder/second"]
    b.layers[0].bias.assign_add([1.0, 0.0, 0.0])
    assert "encoder/first" in sweeps.sweep_of(both).stale


def test_statistics_of_other_weights_are_stale_from_the_start():
    a, b = dense_model(), dense_model()
    b.layers[0].kernel.assign(a.layers[0].kernel + 1.0)
    tfbn.PopulationStats.from_bytes(sweeps.sweep_of(a).stats.to_bytes()).assign(b)
    assert "weights have changed" in sweeps.sweep_of(b).stale
    b.layers[0].kernel.assign(a.layers[0].kernel)
    b.layers[2].kernel.assign(a.layers[2].kernel)
    sweeps.sweep_of(a).stats.assign(b)
    assert sweeps.sweep_of(b).stale is None


def test_copies_know_of_the_sweep():
    model = dense_model()
    converted = tfbn.convert(model)
    assert sweeps.sweep_of(converted).stale is None
    converted.layers[0].kernel.assign_add(converted.layers[0].kernel)
    assert "weights have changed" in sweeps.sweep_of(converted).stale
    assert sweeps.sweep_of(model).stale is None


def test_nothing_keeps_a_swept_model_alive():
    encoder, network = siamese()
    there = weakref.ref(network), weakref.ref(encoder.layers[0])
    sweeps.sweep_of(encoder)
    del network
    gc.collect()
    assert there[0]() is None
    del encoder
    gc.collect()
    assert there[1]() is None


def test_statistics_whose_weights_are_not_known_say_so():
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    actual = tfbn.LayerStats(4, np.zeros(3), np.ones(3))
    tfbn.PopulationStats({"bn": actual}, method="exact").assign(model)
    assert sweeps.sweep_of(model).stale == "it is not known with which weights the sweep was"


class Unrecorded(keras.Model):
    """Keras stores no input spec of it."""

    def __init__(self):
        super().__init__()
        self.bn = keras.layers.BatchNormalization()
        self.bn.build((None, 3))
        self.built = True

    def call(self, x, training=None):
        return self.bn(x, training=training)


def test_a_model_whose_inputs_are_not_known(tmp_path):
    model = Unrecorded()
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    assert keras.Model.get_build_config(model) is None
    tfbn.update_population_stats(model, x, verbose=0)
    assert sweeps.sweep_of(model).stale is None
    model.bn.gamma.assign(2 * model.bn.gamma)
    assert sweeps.sweep_of(model).stale is not None
    with pytest.raises(ValueError, match=r"inputs of model .* are not known"):
        tfbn.export(model, tmp_path / "m")
