"""Compare the data of a sweep with the data of `fit`."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfbn
from tfbn.callbacks import fed_data
from tfbn.callbacks.fed_data import MeanVariance
from tfbn.stats.layer_stats import LayerStats

X = np.random.default_rng(0).normal(3, 2, (640, 6)).astype("float32")


class Scaling(keras.Model):
    """A model that scales the data in its `train_step`."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def call(self, x, training=None):
        return self.network(x, training=training)

    def train_step(self, data):
        x, y = data
        return super().train_step((x / 16, y))


def build(bn=layers.BatchNormalization, model=lambda network: network, **options):
    """Build a network with batch norm after a dense layer, and another one."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((6,)), layers.Dense(8), bn(name="first")])
    for layer in [layers.Dense(8), layers.BatchNormalization(), layers.Dense(1)]:
        network.add(layer)
    built = model(network)
    built(X[:2])
    built.compile("adam", "mse", **options)
    return built


def messages(model, swept, options=None, callbacks=(), data=(X, X[:, :1]), **fit):
    """Return the warnings of a `fit` about its data."""
    callback = tfbn.PopulationStatsCallback(swept, verbose=0, **(options or {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(*data, verbose=0, callbacks=[*callbacks, callback], **{"epochs": 2, **fit})
    return [str(w.message) for w in caught if "`fit`" in str(w.message)]


@settings(deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    steps=st.integers(1, 30),
    start=st.floats(-10, 10),
    seed=st.integers(0, 99),
)
def test_average_of_recent_batches_is_independent_of_the_start(momentum, steps, start, seed):
    batches = np.random.default_rng(seed).normal(1, 2, (steps, 2, 3)) ** 2
    moving = np.full((2, 3), start)
    for batch in batches:
        moving = momentum * moving + (1 - momentum) * batch
    actual = fed_data.recent_moments(
        MeanVariance(*np.full((2, 3), start)), MeanVariance(*moving), momentum**steps
    )
    weights = momentum ** np.arange(steps)[::-1].astype(float)
    expected = np.tensordot(weights / weights.sum(), batches, 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("start", "end", "kept"),
    [
        ((0.0, 1.0), (3.0, 4.0), 1.0),
        ((3.0, 4.0), (3.0, 4.0), 0.9),
        ((0.0, 1.0), (3.0, 0.9), 0.9),  # The variance of every batch was 0.
        ((1e7, 1.0), (1e7 + 1, 1.5), 0.9),
    ],
    ids=["momentum 1", "not trained", "single values", "rounding"],
)
def test_undefined_averages_are_none(start, end, kept):
    start, end = (MeanVariance(*np.reshape(pair, (2, 1))) for pair in (start, end))
    assert fed_data.recent_moments(start, end, kept) is None


@pytest.mark.parametrize(
    ("fed", "between", "noise", "expected"),
    [
        ((1.0, 4.0), 0.0, 1.0, (0.0, 0.0)),
        ((3.0, 4.0), 0.0, 1.0, (1.0, 0.0)),
        ((1.0, 16.0), 0.0, 1.0, (0.0, np.log(2))),
        ((1.0, 1.0), 0.0, 1.0, (0.0, -np.log(2))),
        ((2.5, 4.0), 1.0, 1.0, (0.0, 0.0)),  # Within two of the std between batches.
        ((5.0, 4.0), 1.0, 1.0, (1.0, 0.0)),
        ((1.0, 3.5), 1.0, 1.0, (0.0, 0.0)),  # Ordered batches vary less than the whole.
        ((1.0, 16.0), 0.0, 3.0, (0.0, 0.0)),
    ],
)
def test_distance_is_in_standard_deviations(fed, between, noise, expected):
    # The second channel is constant and does not count.
    stats = LayerStats(100, np.array([1.0, 0.0]), np.array([4.0, 0.0]))
    fed = MeanVariance(np.array([fed[0], 9.0]), np.array([fed[1], 9.0]))
    actual = fed_data.distance_of(fed, stats, np.array([between, 0.0]), noise)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_variance_between_batches_is_zero_for_random_order():
    x = np.random.default_rng(0).normal(size=(640, 4))
    for ordered, expected in [(False, 0.0), (True, 1.0)]:
        means = np.sort(x, axis=0).reshape(20, 32, 4) if ordered else x.reshape(20, 32, 4)
        error = means.mean(1).std(0) / np.sqrt(20)
        stats = LayerStats(640, x.mean(0), x.var(0), None, error, error)
        actual = fed_data.between_batches(stats, batches=20, batch_size=32)
        np.testing.assert_allclose(actual, expected, atol=0.2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("swept", [X * 255, X * 16, X / 2, X - 3], ids=["255", "16", "2", "mean"])
def test_other_data_than_in_fit_is_reported(swept):
    [message] = messages(build(), swept)
    assert "'first'" in message
    assert "x=dataset.map(preprocess)" in message


@pytest.mark.parametrize("epochs, at_once", [(1, 1), (2, 1), (2, 12)])
@pytest.mark.parametrize("scale", [1.0, 1 / 16])
def test_model_built_by_the_first_step_is_compared(scale, epochs, at_once):
    """It cannot be traced before that step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Dense(8), layers.BatchNormalization(), layers.Dense(1)])
    model.compile("adam", "mse", steps_per_execution=at_once)
    data = (X * np.float32(scale), X[:, :1])
    assert bool(messages(model, X, data=data, epochs=epochs)) == (scale != 1)


def test_data_of_fit_is_not_reported():
    model = build()
    for _ in range(2):  # The second continues from the first.
        assert messages(model, X) == []


def test_scaling_in_train_step_is_reported_and_the_advice_works():
    assert messages(build(model=Scaling), X)
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(32)
    assert messages(build(model=Scaling), dataset.map(lambda x: x / 16)) == []


class Doubling(layers.BatchNormalization):
    """A layer with custom updates of the statistics."""

    def call(self, inputs, training=None, mask=None):
        return super().call(2 * inputs, training=training, mask=mask)


def renormed(**options):
    """A layer whose moving averages follow batch renormalization."""
    return tfbn.BatchNormalization(renorm=True, **options)


def constant(**options):
    """A layer whose statistics do not change."""
    return layers.BatchNormalization(momentum=1.0, **options)


def restored(monitor="loss"):
    """`EarlyStopping` that restores the first epoch."""
    return keras.callbacks.EarlyStopping(
        monitor, patience=1, restore_best_weights=True, mode="max", min_delta=1e9
    )


def resetting():
    """A callback that resets the moving averages during `fit`."""

    def reset(epoch, logs):
        layer = callback.model.get_layer("first")
        layer.moving_mean.assign(np.zeros(8))
        layer.moving_variance.assign(np.ones(8))

    callback = keras.callbacks.LambdaCallback(on_epoch_end=reset)
    return callback


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "fit"),
    [
        ({"steps_per_execution": 3}, {}),
        ({"run_eagerly": True}, {}),
        ({"bn": renormed}, {}),
        ({"bn": constant}, {}),
        ({"bn": Doubling}, {}),
        ({"bn": tfbn.BatchNormalization}, {"validation_split": 0.5}),
        ({}, {"epochs": 5, "callbacks": [restored()]}),
        ({}, {"epochs": 3, "callbacks": [resetting()]}),
        ({}, {"batch_size": 1, "epochs": 1}),
        ({}, {"steps_per_epoch": 1, "epochs": 3}),
        ({}, {"class_weight": {0: 2.0}, "data": (X, np.zeros(640, "int32"))}),
    ],
    ids=[
        *("several steps", "eager", "renorm", "momentum 1", "own rule", "split"),
        *("restored", "reset", "batches of 1", "one step", "class weight"),
    ],
)
def test_incomparable_data_is_not_reported(model, fit):
    assert messages(build(**model), X, **fit) == []


@pytest.mark.slow
def test_restored_epoch_is_compared():
    assert messages(build(), X * 16, callbacks=[restored()], epochs=5)


@settings(deadline=None)
@given(momentum=st.floats(0, 0.99), updates=st.integers(1, 30))
def test_effective_number_is_that_of_the_weights(momentum, updates):
    weights = momentum ** np.arange(updates)
    expected = weights.sum() ** 2 / (weights**2).sum()
    actual = fed_data.effective_number(momentum, updates)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_channels_are_known_if_batches_determine_their_variance():
    """In 40 samples, a variance is known for normal values and unknown for rare ones."""
    generator = np.random.default_rng(0)
    x = np.stack([generator.normal(size=3200), generator.random(3200) < 0.002], 1).astype(float)
    squares = (x - x.mean(0)) ** 2
    error = squares.reshape(100, 32, 2).mean(1).std(0) / 10
    stats = LayerStats(3200, x.mean(0), x.var(0), None, error, error)
    assert fed_data.known_channels(stats, 3200 / 40).tolist() == [True, False]
    actual = fed_data.distance_of(
        MeanVariance(x.mean(0), np.array([x.var(0)[0], 0.0])), stats, known=[True, False]
    )
    assert actual == (0.0, 0.0)


def rare(generator):
    """Pixels that are 0 but in few images, apart from the first."""
    return generator.random((640, 6)) < [0.5, 0.002, 0.003, 0.004, 0.005, 0.006]


@pytest.mark.parametrize(
    "values",
    [rare, lambda generator: generator.standard_cauchy((640, 6))],
    ids=["rare", "heavy tails"],
)
def test_channels_that_few_batches_determine_are_not_reported(values):
    """The moving averages are on the data."""
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        x = values(np.random.default_rng(seed)).astype("float32")
        model = keras.Sequential(
            [keras.Input((6,)), layers.BatchNormalization(momentum=0.5), layers.Dense(1)]
        )
        model.compile("sgd", "mse")
        assert messages(model, x, data=(x, np.zeros((640, 1))), epochs=1) == []


@pytest.mark.slow
def test_ordered_data_is_not_reported():
    order = np.argsort(X[:, 0])
    ordered = X[order]
    assert messages(build(), ordered, data=(ordered, ordered[:, :1]), shuffle=False) == []


@pytest.mark.slow
def test_dropout_before_a_layer_is_not_reported():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5), layers.BatchNormalization()])
    model.add(layers.Dense(1))
    model.compile("adam", "mse")
    assert messages(model, X) == []


def test_too_few_samples_are_reported_and_the_advice_works():
    [message] = messages(build(), X[:16])
    assert "16 samples" in message
    assert "640" in message
    assert messages(build(), X[:16], {"steps": 1}) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fit"),
    [({"tolerance": 0.5}, {}), ({"batch_size": 16, "steps": 1}, {}), ({}, {"steps_per_epoch": 20})],
    ids=["tolerance", "steps", "steps per epoch"],
)
def test_requested_samples_are_not_reported(options, fit):
    swept = X if options else X[:64]
    repeated = tf.data.Dataset.from_tensor_slices((X[:64], X[:64, :1])).repeat().batch(32)
    data = (repeated,) if fit else (X, X[:, :1])
    assert messages(build(), swept, options, data=data, **fit) == []
