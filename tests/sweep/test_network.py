"""Tests of traces: made once, dropped when the model changes, and freed with the model."""

import gc
import weakref

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.models.keras_models import batch_norm_layers
from tfbn.sweep import network
from tfbn.sweep.network import Network, UnobservableError


@pytest.fixture
def traced(monkeypatch):
    """Return a list that records every trace."""
    made = []
    original = network.trace_model

    def trace_model(*args, **options):
        trace = original(*args, **options)
        made.append(trace.specs)
        return trace

    monkeypatch.setattr(network, "trace_model", trace_model)
    return made


def small(bn=layers.BatchNormalization):
    """Build a network with two levels."""
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="d"), bn(), layers.GaussianDropout(0.0), bn()]
    )


def sweep(model, x, **options):
    """Sweep without output."""
    return tfbn.collect(model, x, verbose=0, **options)


def test_one_trace_serves_all_sweeps_and_reads_the_weights_live(traced):
    model, x = small(), networks.data(small(), 40)
    for batch_size in (40, 7, 16):
        sweep(model, x, batch_size=batch_size, memory_limit=batch_size)
    assert len(traced) == 1
    sweep(model, x, method="pooled")
    sweep(model, x, method="algorithm2", batch_size=8)
    assert len(traced) == 2
    model.get_layer("d").kernel.assign(tf.random.normal([4, 4], seed=1))
    stats = sweep(model, x)
    assert len(traced) == 2
    [expected] = networks.in_training(small, model, x, [slice(None)])
    networks.assert_statistics(stats, expected)


def test_training_and_prediction_keep_the_trace(traced):
    model, x = small(), networks.data(small(), 40)
    sweep(model, x)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    model.evaluate(x, x, verbose=0)
    model.predict(x, verbose=0)
    model.set_weights([w * 1.5 for w in model.get_weights()])
    sweep(model, x)
    assert len(traced) == 1


CHANGES = {
    "epsilon": lambda m: setattr(m.layers[1], "epsilon", 0.5),
    "activation": lambda m: setattr(m.layers[0], "activation", keras.activations.relu),
    "frozen": lambda m: setattr(m.layers[1], "trainable", False),
    "rate": lambda m: setattr(m.layers[2], "rate", 0.9),
    "lora": lambda m: m.layers[0].enable_lora(1),
    "added layer": lambda m: m.add(layers.Dense(2)),
    "an array": lambda m: setattr(m.layers[0], "table", np.ones(3)),
    "an object of no known kind": lambda m: setattr(m.layers[0], "thing", object()),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_traced_anew(change, traced):
    model, x = small(), networks.data(small(), 40)
    sweep(model, x)
    CHANGES[change](model)
    again = sweep(model, x)
    assert len(traced) == 2
    twin = keras.models.clone_model(model)
    if change not in ("activation", "lora"):
        twin.set_weights(model.get_weights())
        for one, two in zip(again.values(), sweep(twin, x).values(), strict=True):
            np.testing.assert_allclose(one.variance, two.variance, rtol=1e-5)


def test_signatures_share_traces_where_they_can(traced):
    model = keras.Sequential([keras.Input((None, 3)), layers.BatchNormalization()])
    parts = [np.ones((4, steps, 3), "f") * steps for steps in (3, 5, 9, 4)]
    sweep(model, iter(parts))
    assert [spec[0].shape[1] for spec in traced] == [3, None]


def test_only_a_few_traces_are_kept():
    model = networks.Subclassed(layers.BatchNormalization)
    held = Network(model, {}, None, None)  # Any key.
    assert network._KEPT_TRACES >= 2 and held.model is model
    static = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    for size in range(1, 15):
        dataset = tf.data.Dataset.from_tensor_slices(np.ones((size * 2, 4), "f"))
        sweep(static, dataset.batch(size, drop_remainder=True))
    _, traces = network._traces[static]
    assert sum(map(len, traces.values())) <= network._KEPT_TRACES


def test_only_a_few_kinds_of_traces_are_kept():
    model, x = small(), networks.data(small(), 8)
    for dtype in ("float32", "float16", "int8", "int32", "uint8"):
        for method in ("exact", "pooled"):
            sweep(model, x.astype(dtype), method=method)
    _, traces = network._traces[model]
    assert len(traces) == network._KEPT_TRACES


def test_nothing_stays_of_a_model_that_is_gone():
    model, x = small(), networks.data(small(), 40)
    sweep(model, x, memory_limit=0)
    sweep(model, x, method="pooled")
    _, traces = network._traces[model]
    gone = [weakref.ref(model), weakref.ref(model.layers[0].kernel.value)]
    gone += [weakref.ref(trace.graph) for several in traces.values() for trace in several]
    assert len(gone) == 4
    del model, traces, x
    for _ in range(3):  # Objects with finalizers are freed in a later round.
        gc.collect()
    assert [reference() for reference in gone] == [None] * 4


class Accumulating(layers.Layer):
    """Accumulates its inputs over batches."""

    def __init__(self, plain):
        super().__init__()
        self.total = tf.Variable(tf.zeros([3])) if plain else None
        self.enabled = True

    def build(self, _):
        if self.total is None:
            self.total = self.add_weight(shape=(3,), initializer="zeros", trainable=False)

    def call(self, x):
        """Return the inputs plus the running sum."""
        if not self.enabled:
            return x
        self.total.assign(self.total + tf.reduce_sum(x, 0))
        return x + self.total


@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("plain", [False, True])
def test_data_that_is_carried_from_batch_to_batch_is_refused(plain, method):
    layer = Accumulating(plain)
    model = keras.Sequential([keras.Input((3,)), layer, layers.BatchNormalization()])
    before = layer.total.numpy()
    with pytest.raises(ValueError, match="does not depend on the batch before"):
        sweep(model, np.ones((20, 3), "f"), method=method)
    np.testing.assert_array_equal(layer.total, before)
    behind = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), Accumulating(False)])
    sweep(behind, np.ones((20, 3), "f"), method=method)
    x = networks.normal(20, 3, loc=1)
    layer.enabled = False  # The advice.
    [stats] = sweep(model, x, method=method).values()
    networks.assert_layer(stats, x.astype("d").mean(0), x.astype("d").var(0))


@pytest.mark.parametrize("kind", [layers.GRU, layers.LSTM, layers.SimpleRNN])
def test_stateful_layers_are_found_wherever_they_are(kind):
    inputs = keras.Input((3, 4), batch_size=5)
    inner = keras.Sequential(
        [keras.Input((3, 4), batch_size=5), kind(2, stateful=True, name="keeps")]
    )
    model = keras.Model(inputs, layers.BatchNormalization()(inner(inputs)))
    actual = Network(model, batch_norm_layers(model))
    with pytest.raises(UnobservableError, match=r"layer '.*/keeps', which keeps a state"):
        actual.trace(tf.zeros([5, 3, 4]), settled=True)


# NaN that the network drops.

LEAVING_OUT = {
    "where": lambda x, known: keras.ops.where(known, x, 0.0),
    "select": lambda x, known: tf.raw_ops.Select(condition=known, x=x, y=tf.zeros_like(x)),
    "boolean_mask": lambda x, known: tf.boolean_mask(x, tf.reduce_all(known, 1)),
    "where and gather": lambda x, known: tf.gather(x, tf.where(known[:, 1])[:, 0]),
    "gather_nd": lambda x, known: tf.gather_nd(x, tf.where(known[:, 1])),
    "dynamic_partition": lambda x, known: tf.dynamic_partition(
        x, tf.cast(known[:, 1], tf.int32), 2
    )[1],
    "columns": lambda x, known: x[:, ::2],
    "gather columns": lambda x, known: tf.gather(x, [0, 2], axis=1),
    "unstack": lambda x, known: tf.stack(tf.unstack(x, axis=1)[::2], 1),
    "split": lambda x, known: tf.split(x, 3, axis=1)[0],
}


class LeavingOut(keras.layers.Layer):
    """Selects some of the values."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def call(self, x, known):
        return LEAVING_OUT[self.how](x, known)


class Masked(keras.Model):
    """Batch norm over the values that are known."""

    def __init__(self, how):
        super().__init__()
        self.leave_out = LeavingOut(how)
        self.first, self.dense = keras.layers.BatchNormalization(), keras.layers.Dense(2)
        self.second = keras.layers.BatchNormalization()

    def call(self, inputs):
        return self.second(self.dense(self.first(self.leave_out(**inputs))))


@pytest.mark.quick(5)
@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("how", LEAVING_OUT)
def test_nan_that_the_network_leaves_out_is_no_error(how, method):
    x = np.random.default_rng(0).normal(3, 2, (24, 3)).astype("float32")
    x[::4, 1] = np.nan
    inputs = {"x": x, "known": ~np.isnan(x)}
    model = Masked(how)
    model(inputs)
    stats = tfbn.collect(model, inputs, method=method, batch_size=10, verbose=0)
    entered = model.leave_out(**{name: tf.constant(value) for name, value in inputs.items()})
    assert np.isfinite(entered).all()
    first, second = stats.values()
    np.testing.assert_allclose(first.mean, np.asarray(entered, "d").mean(0), rtol=1e-5)
    assert np.isfinite(second.mean).all()


def test_nan_that_enters_a_layer_behind_a_choice_is_an_error():
    x = np.random.default_rng(0).normal(3, 2, (24, 3)).astype("float32")
    x[5, 2] = np.nan
    model = Masked("columns")
    model({"x": x, "known": x > 0})
    with pytest.raises(ValueError, match="finite values to enter layer"):
        tfbn.collect(model, {"x": x, "known": x > 0}, verbose=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kind", [keras.layers.BatchNormalization, tfbn.BatchNormalization])
def test_a_mask_that_is_not_one_value_per_position_is_named(kind, rank):
    frames, mask = keras.Input((5, 4, 4, 2)), keras.Input((5, 4, 3, 1)[: rank - 1], dtype="bool")
    video = keras.layers.ConvLSTM2D(3, 3, return_sequences=True, padding="same")(frames)
    norm = kind(name="norm")
    outputs = norm(video, mask=mask)
    model = keras.Model([frames, mask], outputs)
    x = [np.ones((6, 5, 4, 4, 2), "f"), np.ones((6, 5, 4, 3)[:rank], bool)]
    with pytest.raises(ValueError, match=r"^Expected a mask of shape .* layer 'norm'") as caught:
        tfbn.collect(model, x, verbose=0)
    assert len(str(caught.value)) < 250
    model.compile("sgd", "mse")
    with pytest.raises(ValueError):  # Keras does not train it either.
        model.fit(x, np.zeros((6, 5, 4, 4, 3)), verbose=0)
    # The advice: one value per position, here from a mask of the frames.
    seen = keras.Input((5,), dtype="bool")
    expanded = keras.layers.Lambda(lambda v: v[..., None, None])(seen)
    cured = keras.Model([frames, seen], kind()(video, mask=expanded))
    known = np.arange(30).reshape(6, 5) % 4 > 0
    [stats] = tfbn.collect(cured, [x[0], known], verbose=0).values()
    entered = keras.Model(frames, video).predict(x[0], verbose=0)[known].astype("d")
    networks.assert_layer(stats, entered.mean((0, 1, 2)), entered.var((0, 1, 2)))


def test_conv_lstm_behind_a_mask_of_positions():
    x = np.random.default_rng(0).normal(size=(6, 5, 4, 4, 2)).astype("float32")
    x[:, 3:] = 0
    inputs = keras.Input((5, 4, 4, 2))
    masked = keras.layers.Masking()(inputs)
    video = keras.layers.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(masked)
    model = keras.Model(inputs, keras.layers.BatchNormalization()(video))
    [stats] = tfbn.collect(model, x, verbose=0).values()
    entered = keras.Model(inputs, video).predict(x, verbose=0).astype("d")[:, :3]
    np.testing.assert_allclose(stats.mean, entered.mean((0, 1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert stats.count == 6 * 3 * 16
