"""Compare the layers that are swept inside `fit` with NumPy, for custom steps."""

import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn

X = np.random.default_rng(0).normal(3, 2, (96, 6)).astype("float32")
Y = X[:, :1]
PRETRAINED = 3.0  # The moving means that no data has.


def bn(name, **options):
    """Create a layer whose moving mean shows a change."""
    initial = keras.initializers.Constant(PRETRAINED)
    return layers.BatchNormalization(name=name, moving_mean_initializer=initial, **options)


class Base(keras.Model):
    """A model with an encoder, a head, and a custom step."""

    def __init__(self, **options):
        super().__init__()
        self.dense, self.out = layers.Dense(5), layers.Dense(1)
        self.encoder, self.head = bn("encoder", **options), bn("head")

    def encode(self, x, training):
        """Create batch norm after a dense layer."""
        return self.encoder(self.dense(x), training=training)

    def call(self, x, training=None):
        return self.out(self.head(ops.tanh(self.encode(x, training)), training=training))

    def loss_of(self, x, y):
        return tf.reduce_mean((self(x, training=True) - y) ** 2)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        weights = self.trainable_variables
        pairs = zip(tape.gradient(loss, weights), weights, strict=True)
        self.optimizer.apply_gradients([(g, w) for g, w in pairs if g is not None])
        return {"loss": loss}


class FrozenByStep(Base):
    """A model whose step runs the encoder in inference mode, but `call` trains it."""

    def loss_of(self, x, y):
        z = self.head(ops.tanh(self.encode(x, False)), training=True)
        return tf.reduce_mean((self.out(z) - y) ** 2)


class TrainedByStep(Base):
    """A model whose `call` only predicts, and whose step trains the encoder."""

    def call(self, x, training=None):
        return self.out(self.head(ops.tanh(self.encode(x, False)), training=training))

    def loss_of(self, x, y):
        z = self.head(ops.tanh(self.encode(x, True)), training=True)
        return tf.reduce_mean((self.out(z) - y) ** 2)


class Predicts(TrainedByStep):
    """A model whose `call` trains nothing."""

    def call(self, x, training=None):
        return self.out(self.head(ops.tanh(self.encode(x, False)), training=False))


class Sometimes(Base):
    """A model that trains the encoder in every third step."""

    def __init__(self):
        super().__init__()
        self.steps = self.add_weight(shape=(), dtype="int32", trainable=False, initializer="zeros")

    def loss_of(self, x, y):
        self.steps.assign_add(1)
        return tf.cond(
            self.steps.value % 3 == 0,
            lambda: tf.reduce_mean((self(x, training=True) - y) ** 2),
            lambda: tf.reduce_mean((self(x, training=False) - y) ** 2),
        )


def fit(model, *callbacks, x=X, y=Y, **options):
    """Train briefly."""
    keras.utils.set_random_seed(0)
    model(X[:2])
    kinds = ("steps_per_execution", "run_eagerly", "jit_compile")
    model.compile("sgd", "mse", **{k: options.pop(k) for k in kinds if k in options})
    options = {"batch_size": 16, "verbose": 0, **options}
    return model.fit(x, y, callbacks=list(callbacks), **options)


def entering(model, x=X):
    """Return the inputs of the encoder, float64."""
    kernel, bias = (np.asarray(w, "float64") for w in model.dense.weights)
    return x.astype("float64") @ kernel + bias


def assert_swept(layer, values):
    """Compare the statistics of a layer with the mean and variance of some values."""
    networks.assert_layer(layer, values.mean(0), values.var(0), 1e-3)


def normalized(layer, values, mean, variance):
    """Compute batch norm in float64."""
    gamma, beta = np.asarray(layer.gamma, "d"), np.asarray(layer.beta, "d")
    return (values - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_execution": 3},
        {"run_eagerly": True},
        {"jit_compile": True},
        {"batch_size": 96},
        {"epochs": 2, "validation_data": (X[:16], Y[:16])},
    ],
    ids=str,
)
@pytest.mark.quick(2)
def test_layer_that_the_step_does_not_train_is_not_swept(options):
    model = FrozenByStep()
    callback = tfbn.PopulationStatsCallback(X, every_epoch="validation_data" in options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, callback, **options)
    assert set(callback.stats) == {"head"}
    np.testing.assert_array_equal(model.encoder.moving_mean, PRETRAINED)
    hidden = normalized(model.encoder, entering(model), PRETRAINED, 1.0)
    assert_swept(model.head, np.tanh(hidden))


@pytest.mark.parametrize("kind", [TrainedByStep, Predicts])
def test_layer_that_only_the_step_trains_is_swept(kind):
    model = kind()
    callback = tfbn.PopulationStatsCallback(X)
    fit(model, callback)
    assert set(callback.stats) == {"encoder", "head"}
    values = entering(model)
    assert_swept(model.encoder, values)
    hidden = normalized(model.encoder, values, values.mean(0), values.var(0))
    assert_swept(model.head, np.tanh(hidden))


def test_layers_that_train_in_later_steps_only():
    model = Sometimes()
    callback = tfbn.PopulationStatsCallback(X)
    with pytest.warns(UserWarning, match="first step of `fit` has changed no statistics"):
        fit(model, callback)
    assert_swept(model.encoder, entering(model))


def test_first_validation_before_any_change():
    model = Sometimes()
    callback = tfbn.PopulationStatsCallback(X, every_epoch=True)
    with pytest.warns(UserWarning, match="first step"):
        fit(model, callback, validation_data=(X, Y), steps_per_epoch=1, epochs=1)
    assert callback.stats is None and model.trainable
    np.testing.assert_array_equal(model.head.moving_mean, PRETRAINED)


def test_layers_with_momentum_1():
    model = Base(momentum=1.0)
    callback = tfbn.PopulationStatsCallback(X)
    fit(model, callback)
    assert set(callback.stats) == {"encoder", "head"}
    assert_swept(model.encoder, entering(model))


def test_data_with_the_moving_statistics():
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")])
    x = np.array([[-1, 1], [1, -1]], "float32").repeat(8, 0)
    callback = tfbn.PopulationStatsCallback(x)
    fit_options = {"batch_size": 16, "verbose": 0, "callbacks": [callback]}
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, **fit_options)
    networks.assert_layer(callback.stats["bn"], 0, 1, 1e-6)


def test_fit_without_steps_sweeps_the_layers_that_call_trains():
    model = Base()
    callback = tfbn.PopulationStatsCallback(X)
    fit(model, callback, epochs=0)
    assert set(callback.stats) == {"encoder", "head"}


def test_changes_are_detected_in_every_fit():
    model = Base()
    fit(model, tfbn.PopulationStatsCallback(X, freeze=False))
    before = np.asarray(model.encoder.moving_mean)
    model.loss_of = FrozenByStep.loss_of.__get__(model)
    callback = tfbn.PopulationStatsCallback(X + 1)
    fit(model, callback, x=X + 1)
    assert set(callback.stats) == {"head"}
    np.testing.assert_array_equal(model.encoder.moving_mean, before)


def test_flags_set_without_compile():
    """Keras ignores flags until the next `compile`."""
    model = Base()
    fit(model)
    model.encoder.trainable = False
    callback = tfbn.PopulationStatsCallback(X)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[callback])
    moved = callback.stats.keys()
    assert ("encoder" in moved) and "head" in moved


def test_weights_loaded_by_another_callback_are_not_training():
    model = FrozenByStep()
    other = FrozenByStep()
    other(X[:2])
    values = [w.numpy() for w in other.encoder.weights]
    load = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: model.encoder.set_weights([v + 0.5 for v in values])
    )
    callback = tfbn.PopulationStatsCallback(X)
    fit(model, callback, load)
    assert set(callback.stats) == {"head"}


@pytest.mark.slow
def test_mirrored():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = FrozenByStep()
        model(X[:2])
        model.compile("sgd")
    callback = tfbn.PopulationStatsCallback(X)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[callback])
    assert set(callback.stats) == {"head"}


class Gan(keras.Model):
    """A container that is never built."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((6,)), layers.Dense(6), bn("g")])
        self.critic = keras.Sequential([keras.Input((6,)), layers.Dense(4), bn("c")])

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.critic(self.generator(x, training=True), training=True) ** 2)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


class Predicting(Gan):
    """A container whose `call` predicts."""

    def call(self, x):
        return self.generator(x, training=False)


class Lazy(Gan):
    """A container with an uncalled `call` that cannot be traced."""

    def call(self, x):
        raise NotImplementedError


class Unbuilt(Gan):
    """A container that is never called, whose parts are built in the first step."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([layers.Dense(6), bn("g")])

    def call(self, x):
        raise NotImplementedError


def steps_of(model, callback):
    """Fit, and return the number of steps."""
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    model.compile("sgd")
    try:
        model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[count, callback])
    finally:
        steps_of.steps = len(steps)


class PartlyBuilt(Unbuilt):
    """A container with a layer that only `call` uses."""

    def __init__(self):
        super().__init__()
        self.last = bn("last")

    def call(self, x, training=None):
        return self.last(self.generator(x, training=training), training=training)


def test_a_container_that_was_called_before_fit_is_swept_as_advised():
    with pytest.raises(ValueError, match=r"has not built model.*or call it once before `fit`"):
        steps_of(PartlyBuilt(), tfbn.PopulationStatsCallback(X))
    model = PartlyBuilt()
    model(X[:2])
    callback = tfbn.PopulationStatsCallback(X)
    steps_of(model, callback)
    kernel, bias = (np.asarray(w, "d") for w in model.generator.layers[0].weights)
    assert_swept(model.generator.layers[1], X.astype("d") @ kernel + bias)


@pytest.mark.parametrize(("kind", "steps"), [(Gan, 0), (Lazy, 0), (Unbuilt, 1)])
def test_containers_are_refused_early_with_advice_that_works(kind, steps):
    model = kind()
    with pytest.raises(ValueError, match=r"model=gan.generator") as error:
        steps_of(model, tfbn.PopulationStatsCallback(X))
    assert steps_of.steps == steps and "include_frozen" not in str(error.value)
    callback = tfbn.PopulationStatsCallback(X, model=model.generator)
    steps_of(model, callback)
    assert steps_of.steps == 12
    assert set(callback.stats) == {"g"}
    kernel, bias = (np.asarray(w, "d") for w in model.generator.layers[0].weights)
    assert_swept(model.generator.layers[1], X.astype("d") @ kernel + bias)


def test_container_whose_call_predicts():
    model = Predicting()
    callback = tfbn.PopulationStatsCallback(X)
    with pytest.warns(UserWarning, match="never calls are left out: 'sequential.*/c'") as caught:
        steps_of(model, callback)
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    [path] = callback.stats
    assert path.endswith("/g")
    kernel, bias = (np.asarray(w, "d") for w in model.generator.layers[0].weights)
    assert_swept(model.generator.layers[1], X.astype("d") @ kernel + bias)
    np.testing.assert_array_less(0.01, np.abs(model.critic.layers[1].moving_mean - PRETRAINED))


def test_named_network_that_no_step_trains():
    """Sweep an average of weights."""
    model = Gan()
    average = keras.models.clone_model(model.generator)
    callback = tfbn.PopulationStatsCallback(X, model=average)
    steps_of(model, callback)
    kernel, bias = (np.asarray(w, "d") for w in average.layers[0].weights)
    assert_swept(average.layers[1], X.astype("d") @ kernel + bias)


class Untrained(Base):
    """A model that trains no layer, neither in `call` nor in the step."""

    def call(self, x, training=None):
        return self.out(self.encode(x, False))


def test_untrained_network_is_refused_after_the_first_step():
    model = Untrained()
    model(X[:2])
    model.head.build((None, 5))
    with pytest.raises(ValueError, match="calls all of them with training=False"):
        steps_of(model, tfbn.PopulationStatsCallback(X))
    assert steps_of.steps == 1
    stats = tfbn.update_population_stats(model, X, include_frozen=True, verbose=0)
    assert set(stats) == {"encoder"}


class Ended(keras.callbacks.Callback):
    """A callback that records the end of training."""

    seen = False

    def on_train_end(self, logs=None):
        self.seen = True


def test_diverged_training_keeps_history_and_moving_averages():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e30), "mse")
    x = np.random.default_rng(0).normal(3, 2, (64, 6)).astype("float32")
    after, callback = Ended(), tfbn.PopulationStatsCallback(x)
    callbacks = [keras.callbacks.TerminateOnNaN(), callback, after]
    with pytest.warns(UserWarning, match="training has diverged"):
        history = model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=callbacks).history
    assert history["loss"] and after.seen and callback.stats is None and model.trainable


class Averaged(keras.Model):
    """A model that trains one network and predicts with an average of its weights."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = (
            keras.Sequential([keras.Input((6,)), layers.Dense(6), bn(name)]) for name in "st"
        )

    def call(self, x, training=None):
        """Predict."""
        return self.teacher(x, training=False)

    def train_step(self, data):
        """Train the student, and copy its weights."""
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.student(data[0], training=True) ** 2)
        weights = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for to, weight in zip(self.teacher.trainable_variables, weights, strict=True):
            to.assign(0.9 * to + 0.1 * weight)
        return {"loss": loss}


def test_advice_names_the_network_that_predicts():
    model = Averaged()
    model(X[:2])
    with pytest.warns(UserWarning, match=r"model=gan.teacher"):
        steps_of(model, tfbn.PopulationStatsCallback(X))
    steps_of(model, tfbn.PopulationStatsCallback(X, model=model.teacher))
    kernel, bias = (np.asarray(w, "d") for w in model.teacher.layers[0].weights)
    assert_swept(model.teacher.layers[1], X.astype("d") @ kernel + bias)


class Converting(keras.Model):
    """A model that encodes numbers in its `train_step`."""

    def __init__(self):
        super().__init__()
        self.network = keras.Sequential([keras.Input((4,)), layers.Dense(5), bn("c")])

    def call(self, x, training=None):
        """Apply the network."""
        return self.network(x, training=training)

    def train_step(self, data):
        """Train on one-hot vectors."""
        return super().train_step((tf.one_hot(data[0], 4), data[1]))


def test_data_that_the_step_converts_is_refused_early_with_advice_that_works():
    model = Converting()
    model(np.zeros((2, 4), "float32"))
    model.compile("sgd", "mse")
    numbers, zeros = np.arange(32) % 4, np.zeros((32, 5))
    callback = tfbn.PopulationStatsCallback(numbers)
    with pytest.raises(ValueError, match=r"`train_step` converts the data.*x=dataset.map"):
        model.fit(numbers, zeros, verbose=0, callbacks=[callback])
    data = tf.data.Dataset.from_tensor_slices(numbers).batch(32)
    callback = tfbn.PopulationStatsCallback(data.map(lambda x: tf.one_hot(x, 4)))
    model.fit(numbers, zeros, verbose=0, callbacks=[callback])
    kernel, bias = (np.asarray(w, "d") for w in model.network.layers[0].weights)
    assert_swept(model.network.layers[1], np.eye(4)[numbers] @ kernel + bias)
