"""Which layers and calls `collect` sweeps, against NumPy in float64."""

import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn

A, B = (np.random.default_rng(seed).normal(seed, 2, (64, 4)).astype("float32") for seed in (1, 5))


class Views(keras.Model):
    """One encoder for two inputs, swept and trained in several ways."""

    def __init__(self):
        super().__init__()
        self.d, self.n = layers.Dense(5), layers.BatchNormalization(name="n")

    def f(self, v, training):
        """Apply dense and batch norm layers."""
        return self.n(self.d(v), training=training)

    def entering(self, *inputs):
        """Return the inputs of the batch norm layer in float64."""
        kernel, bias = (np.asarray(w, "d") for w in self.d.weights)
        return [x.astype("d") @ kernel + bias for x in inputs]


class ExtraView(Views):
    """Adds an auxiliary loss on a view in inference mode."""

    def call(self, z, training=None):
        """Make three calls in training, two in inference."""
        if training:
            self.add_loss(ops.mean(self.f(z[0] + z[1], False) ** 2))
        return self.f(z[0], training) + self.f(z[1], training)


class ExtraTrained(Views):
    """Trains on one more view, in training only."""

    def call(self, z, training=None):
        """Make the additional call before the calls that inference also makes."""
        if training:
            self.add_loss(ops.mean(self.f(z[0] - z[1], True) ** 2))
        return self.f(z[0], training) + self.f(z[1], training)


class Adversarial(Views):
    """Makes one more call in inference mode during training."""

    def call(self, z, training=None):
        """Call the layer on the second input in inference mode first."""
        if training:
            z = [z[0] + 0.01 * self.f(z[1], False)[:, :4], z[1]]
        return self.f(z[0], training) + self.f(z[1], training)


class Other(Views):
    """Has different code for training and inference, without a common call site."""

    def call(self, z, training=None):
        if training:
            return self.f(z[1], True) + self.f(z[0], True) + self.f(z[0], False)
        return self.f(z[0], False) + self.f(z[1], False)


class Fixed(Views):
    """The second call fixes `training=False`, in both modes."""

    def call(self, z, training=None):
        return self.f(z[0], training) + self.f(z[1], False)


class FixedFirst(Views):
    """One call fixes `training=False`; training makes one call more."""

    def call(self, z, training=None):
        """Follow `training` in the last call: the second in inference, the third in training."""
        if training:
            self.f(z[0] + 1, training)
        return self.f(z[1], False) + self.f(z[0], training)


class Branches(Views):
    """Passes literal flags in each mode."""

    def call(self, z, training=None):
        if training:
            return self.f(z[0], True) + self.f(z[1], True)
        return self.f(z[0], False) + self.f(z[1], False)


class AsTensor(Views):
    """Uses `training` as a number as well."""

    def call(self, z, training=None):
        scale = 1.0 - ops.cast(ops.convert_to_tensor(training or False), "float32")
        return self.f(z[0], training) + scale * self.f(z[1], False)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        (ExtraView, (0, 1)),
        (ExtraTrained, (0, 1)),
        (Adversarial, (0, 1)),
        (Other, (0, 1)),
        (Fixed, (0,)),
        (FixedFirst, (0,)),
        (Branches, (0, 1)),
        (AsTensor, (0,)),
    ],
)
@pytest.mark.quick(8)
def test_calls_of_inference_are_judged_on_their_own(kind, counted, eager):
    model = kind()
    model([A[:2], B[:2]])
    model.compile(run_eagerly=eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # The calls differ.
        [stats] = tfbn.collect(model, [A, B], batch_size=16, verbose=0).values()
    values = np.concatenate(model.entering(*((A, B)[i] for i in counted)))
    assert stats.count == len(values)
    networks.assert_layer(stats, values.mean(0), values.var(0), 1e-4)


class Auxiliary(keras.Model):
    """A head that only training runs."""

    def __init__(self):
        super().__init__()
        self.n, self.head = (
            layers.BatchNormalization(name="n"),
            layers.BatchNormalization(name="aux"),
        )
        self.out = layers.Dense(1)

    def call(self, x, training=None):
        h = ops.tanh(self.n(x, training=training))
        if training:
            self.add_loss(ops.mean(self.head(h, training=True) ** 2))
        return self.out(h)


def test_what_inference_never_calls_is_left_out_with_one_warning():
    model = Auxiliary()
    model(A[:2], training=True)
    with pytest.warns(UserWarning, match="never calls are left out: 'aux'") as caught:
        stats = tfbn.collect(model, A, verbose=0)
    assert len(caught) == 1 and set(stats) == set(stats.previous) == {"n"}
    np.testing.assert_allclose(stats["n"].mean, A.astype("d").mean(0), rtol=1e-5)
    callback = tfbn.PopulationStatsCallback(A)
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="left out: 'aux'") as caught:
        model.fit(A, A[:, :1], epochs=2, verbose=0, callbacks=[callback])
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    assert set(callback.stats) == {"n"}
    assert np.abs(model.head.moving_mean).max() > 0  # The head trains.
    callback.unfreeze()
    assert model.head.trainable


class ByBatch(keras.Model):
    """pix2pix: the first layer normalizes by the batch, always."""

    def __init__(self, options):
        super().__init__()
        self.first = layers.BatchNormalization(name="first", **options)
        self.second = layers.BatchNormalization(name="second")

    def call(self, x, training=None):
        return self.second(ops.sigmoid(self.first(x, training=True)), training=training)


class PassedOn(ByBatch):
    """The first layer gets the argument, too."""

    def call(self, x, training=None):
        return self.second(ops.sigmoid(self.first(x, training=training)), training=training)


def behind(x, size):
    """Return the inputs of the second layer in float64, with batches of `size`."""
    parts = [x[i : i + size].astype("d") for i in range(0, len(x), size)]
    normal = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) for p in parts]
    return 1 / (1 + np.exp(-np.concatenate(normal)))


@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.quick(2)
def test_a_layer_that_inference_normalizes_by_the_batch(method, eager):
    model = ByBatch({})
    model(A[:2])
    held = np.asarray(model.first.moving_mean)
    model.compile(run_eagerly=eager)
    with pytest.warns(
        UserWarning, match="training=True in inference too: 'first'.*depends on"
    ) as w:
        stats = tfbn.collect(model, A, method=method, batch_size=8, verbose=0)
    assert len([one for one in w if "depends on" in str(one.message)]) == 1
    assert set(stats) == {"second"}
    values = behind(A, 8)
    networks.assert_layer(stats["second"], values.mean(0), values.var(0), 1e-4)
    np.testing.assert_array_equal(model.first.moving_mean, held)
    cured = PassedOn({})  # The advice.
    cured(A[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(cured, A, verbose=0)
    values = behind(A, len(A))
    networks.assert_layer(stats["first"], A.astype("d").mean(0), A.astype("d").var(0))
    networks.assert_layer(stats["second"], values.mean(0), values.var(0), 1e-4)


def test_networks_that_use_no_statistics_are_refused_with_advice_that_works():
    class Always(ByBatch):
        def call(self, x, training=None):
            return self.second(self.first(x, training=True), training=True)

    class Never(ByBatch):
        def call(self, x, training=None):
            return self.second(self.first(x, training=True), training=True) if training else x

    for refused in (Always, Never):
        model = refused({})
        model(A[:2], training=True)
        with pytest.raises(ValueError, match="Sweep the network that predicts, or pass `training`"):
            tfbn.collect(model, A, verbose=0)
    model = PassedOn({})
    model(A[:2])
    stats = tfbn.collect(model, A, verbose=0)
    networks.assert_layer(stats["first"], A.astype("d").mean(0), A.astype("d").var(0))


def test_a_frozen_layer_is_not_normalized_by_the_batch():
    model = ByBatch({"trainable": False})
    model(A[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(model, A, batch_size=8, verbose=0)
    values = 1 / (1 + np.exp(-A.astype("d") / np.sqrt(1 + 1e-3)))
    np.testing.assert_allclose(stats["second"].mean, values.mean(0), rtol=1e-4)


@pytest.mark.parametrize("freeze", [False, True])
def test_fit_leaves_what_inference_does(freeze):
    model = ByBatch({})
    model(A[:2])
    model.compile("sgd", "mse")
    callback = tfbn.PopulationStatsCallback(A, batch_size=8, freeze=freeze)
    with pytest.warns(UserWarning, match="depends on the batch") as caught:
        model.fit(A, A, batch_size=8, verbose=0, callbacks=[callback])
    assert len([w for w in caught if "depends on" in str(w.message)]) == 1
    gamma, beta = (np.asarray(w, "d") for w in (model.first.gamma, model.first.beta))
    parts = [A[i : i + 8].astype("d") for i in range(0, 64, 8)]
    normal = np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) for p in parts])
    values = 1 / (1 + np.exp(-(normal * gamma + beta)))
    np.testing.assert_allclose(model.second.moving_mean, values.mean(0), rtol=1e-4)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-3)
    expected = expected * np.asarray(model.second.gamma, "d") + np.asarray(model.second.beta, "d")
    np.testing.assert_allclose(model.predict(A, batch_size=8, verbose=0), expected, atol=1e-3)
    callback.unfreeze()
    assert all(layer.trainable for layer in model.layers)


class Cell(layers.Layer):
    """A cell with batch norm on the input, or on the state."""

    def __init__(self, on_state, **options):
        super().__init__(**options)
        self.state_size, self.on_state = 4, on_state
        self.bn = layers.BatchNormalization(name="bn")

    def build(self, shape):
        self.bn.build((None, 4))

    def call(self, x, states, training=None):
        """Compute a recurrence that converges slowly."""
        if self.on_state:
            h = ops.tanh(self.bn(x + states[0], training=training))
        else:
            h = ops.tanh(self.bn(x, training=training) + states[0])
        return h, [h]


SEQUENCES = np.random.default_rng(0).normal(1, 2, (32, 3, 4)).astype("float32")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("on_state", [False, True])
def test_a_loop_that_feeds_itself_is_reported_before_the_sweep(on_state, eager):
    model = keras.Sequential(
        [keras.Input((3, 4)), layers.RNN(Cell(on_state, name="cell"), name="rnn")]
    )
    model.compile("sgd", "mse", run_eagerly=eager)
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))

    def fit(method):
        callback = tfbn.PopulationStatsCallback(SEQUENCES, method=method)
        model.fit(SEQUENCES, SEQUENCES[:, 0], verbose=0, callbacks=[count, callback])
        return callback

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit("exact")
        except ValueError as error:
            assert on_state and "loop that feeds" in str(error)
    said = [w for w in caught if "may not settle" in str(w.message)]
    assert len(said) == on_state
    if on_state:
        assert "'rnn/cell/bn'" in str(said[0].message) and "method='pooled'" in str(said[0].message)
        assert set(fit("pooled").stats) == {"rnn/cell/bn"}


def test_a_call_in_a_loop_over_the_batch_feeds_nothing():
    class Mapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = layers.BatchNormalization()

        def call(self, x, training=None):
            return tf.map_fn(lambda row: self.bn(row, training=training), x)

    model = Mapped()
    model(SEQUENCES[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [stats] = tfbn.collect(model, SEQUENCES, verbose=0).values()
    np.testing.assert_allclose(stats.mean, SEQUENCES.astype("d").mean((0, 1)), rtol=1e-4)


SAMPLES = 37


def test_frozen_layers_are_left_alone_unless_included():
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, SAMPLES)
    frozen = networks.batch_norms(model)[0]
    frozen.trainable = False
    frozen.moving_mean.assign([3.0, -1.0, 0.5, 7.0])
    stats = tfbn.collect(model, x, method="exact", batch_size=16, verbose=0)
    assert frozen.name not in stats
    assert len(stats) == 2
    # Later layers are measured with the frozen layer in inference mode.
    inference = keras.Model(model.inputs, model.layers[4].output)(x)
    values = np.asarray(inference, np.float64)
    actual = stats[networks.batch_norms(model)[1].name]
    convolved = np.asarray(model.layers[3](model.layers[2](frozen(model.layers[0](x)))), np.float64)
    assert values.shape == convolved.shape
    networks.assert_layer(actual, convolved.mean((0, 1, 2)), convolved.var((0, 1, 2)), 1e-4)
    both = tfbn.collect(model, x, include_frozen=True, batch_size=16, verbose=0)
    assert frozen.name in both


class Pretrained(keras.Model):
    """A base that always infers, and a head that trains."""

    def __init__(self):
        super().__init__()
        self.base = keras.Sequential([keras.Input((4,)), layers.Dense(4), bn_of(3.0)])
        self.head = keras.Sequential([keras.Input((4,)), layers.Dense(3), bn_of(0.0)])

    def call(self, x, training=None):
        return self.head(self.base(x, training=False), training=training)


def bn_of(mean):
    """Return a layer with an initial moving mean that shows whether it is used."""
    return layers.BatchNormalization(moving_mean_initializer=keras.initializers.Constant(mean))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("method", "shards", "eager"),
    [
        ("exact", False, False),
        ("pooled", True, False),
        ("exact", True, False),
        ("exact", False, True),
    ],
)
def test_a_layer_that_fit_does_not_train_is_left_alone(method, shards, eager):
    model = Pretrained()
    x = networks.normal(40, 4, loc=1, scale=2)
    model(x)
    model.run_eagerly = eager
    collect = tfbn.collect_shards if shards else tfbn.collect
    stats = collect(model, [x] if shards else x, method=method, batch_size=40, verbose=0)
    base, head = model.base.layers[-1], model.head.layers[-1]
    assert [path.split("/")[-1] for path in stats] == [head.name]
    # Like `fit`, which does not update the moving averages of the base.
    model.compile("sgd", "mse")
    model.fit(x, networks.normal(40, 3), verbose=0)
    np.testing.assert_array_equal(base.moving_mean, 3.0)
    model2 = Pretrained()
    model2(x)
    model2.set_weights(model.get_weights())
    [actual] = collect(
        model2, [x] if shards else x, method=method, batch_size=40, verbose=0
    ).values()
    entered = np.asarray(model2.head.layers[0](model2.base(x, training=False)), np.float64)
    networks.assert_layer(actual, entered.mean(0), entered.var(0), rtol=1e-4)
    # `include_frozen=True` adds the frozen layer.
    both = collect(model, [x] if shards else x, method=method, include_frozen=True, verbose=0)
    assert len(both) == 2


def test_a_functional_model_that_fixes_training_is_swept_as_fit_trains_it():
    inputs = keras.Input((4,))
    fixed = bn_of(3.0)
    x = layers.Dense(4)(inputs)
    model = keras.Model(inputs, bn_of(0.0)(fixed(x, training=False)))
    data = networks.normal(40, 4)
    stats = tfbn.collect(model, data, verbose=0)
    model.compile("sgd", "mse")
    model.fit(data, data, verbose=0)
    # In Keras 3, `fit` may train it nevertheless.
    trains = not np.array_equal(fixed.moving_mean, [3.0] * 4)
    assert (fixed.name in stats) == trains and len(stats) == 1 + trains


class OwnStep(keras.Model):
    """A model with a custom training step."""

    def __init__(self, bn=layers.BatchNormalization):
        super().__init__()
        self.dense, self.bn = layers.Dense(3), bn()

    def call(self, x, training=None):
        return self.bn(self.dense(x), training=training)

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(x, training=True) ** 2)
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


def test_a_model_with_its_own_training_step():
    model = OwnStep()
    x = networks.normal(40, 4, loc=2)
    model(x)
    model.compile("sgd")
    model.fit(x, np.zeros(40), verbose=0)
    [actual] = tfbn.collect(model, x, verbose=0).values()
    entered = np.asarray(model.dense(x), "d")
    networks.assert_layer(actual, entered.mean(0), entered.var(0), rtol=1e-4)
