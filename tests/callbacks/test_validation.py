"""Tests of `tfbn.callbacks.validation`."""

import itertools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn

X = np.random.default_rng(0).normal(3, 2, (24, 3)).astype("float32")
Y = X[:, :1]


def network(**options):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(**({"optimizer": "sgd", "loss": "mse"} | options))
    return model


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


class Numbered(keras.utils.PyDataset):
    """A PyDataset with numbered batches, endless without `length`."""

    def __init__(self, length=None):
        super().__init__()
        self.length = length

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, i):
        i %= 3
        return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


class Repeating:
    """An endless dataset with length sys.maxsize, like in Grain."""

    def __len__(self):
        return sys.maxsize

    def __iter__(self):
        return itertools.cycle([(X[:8], Y[:8])])


def distributed():
    return tf.distribute.get_strategy().experimental_distribute_dataset(dataset().repeat())


def callbacks(data, **options):
    yield lambda: tfbn.PopulationStatsCallback(X, validation_data=data, **options)
    yield lambda: tfbn.StatsTracker(X, validation_data=data, **options)


ENDLESS = {
    "tf.data": lambda: dataset().repeat(),
    "PyDataset": Numbered,
    "distributed": distributed,
    "iterable": Repeating,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_endless_data_needs_validation_steps(kind):
    for make in callbacks(ENDLESS[kind]()):
        with pytest.raises(ValueError, match=r"validation_steps.*endless"):
            make()


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "distributed"])
def test_endless_data_is_evaluated_for_validation_steps(kind):
    model = network()
    callback, tracker = (make() for make in callbacks(ENDLESS[kind](), validation_steps=2))
    history = model.fit(X, Y, callbacks=[tracker, callback], verbose=0).history
    [moving] = history["val_loss_moving_average"]
    before, after = callback.validation["loss"]
    assert moving == pytest.approx(before)
    assert after == pytest.approx(np.mean((model.predict(X[:16], verbose=0) - Y[:16]) ** 2), 1e-4)


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: ((x, x[:, :1]) for x in [X]),
        lambda: iter([(X, Y)]),
        lambda: map(tuple, [(X, Y)]),
        lambda: iter(dataset()),
        lambda: itertools.tee([(X, Y)])[0],
        lambda: (None, Y),
    ],
)
def test_one_shot_data_is_refused(make_data):
    for make in callbacks(make_data()):
        with pytest.raises(ValueError, match="Expected validation_data as"):
            make()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y[:5]), {}, r"same number of samples.*\[5, 24\]"),
        ((X[:0], Y[:0]), {}, "at least one batch"),
        (dataset(), {"validation_steps": 4}, "validation_steps up to 3.*Received: 4"),
        (dataset(), {"validation_steps": 0}, "an integer >= 1"),
        (Numbered(0), {}, "at least one batch"),
        ("data.npz", {}, "`model.fit` takes"),
    ],
)
def test_bad_data_is_refused_by_the_constructor(data, options, message):
    for make in callbacks(data, **options):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("data", [X, (X,), dataset().map(lambda x, y: x)])
def test_missing_targets_are_refused_before_the_first_epoch(data):
    for make in callbacks(data):
        model = network()
        with pytest.raises(ValueError, match=r"with targets.*Pass \(x, y\)"):
            model.fit(X, Y, callbacks=[make()], verbose=0)
        assert model.optimizer.iterations == 0
    callback, _ = (make() for make in callbacks((X, Y)))  # The advice.
    model.fit(X, Y, callbacks=[callback], verbose=0)
    predicted = model.predict(X, verbose=0).astype("d")
    assert callback.validation["loss"][1] == pytest.approx(np.mean((predicted - Y) ** 2), 1e-4)


def test_added_losses_need_no_targets():
    class Itself(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn, self.dense = keras.layers.BatchNormalization(), keras.layers.Dense(3)

        def call(self, x):
            y = self.dense(self.bn(x))
            self.add_loss(keras.ops.mean((y - x) ** 2))
            return y

    model = Itself()
    model.compile("sgd")
    callback, tracker = (make() for make in callbacks(X))
    history = model.fit(X, callbacks=[tracker, callback], verbose=0).history
    assert np.isfinite(history["val_loss_population"]).all()
    assert np.isfinite(callback.validation["loss"]).all()


def test_tracker_of_a_model_built_by_the_first_step():
    model = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    tracker = tfbn.StatsTracker(X, validation_data=(X, Y))
    history = model.fit(X, Y, epochs=2, callbacks=[tracker], verbose=0).history
    assert len(history["val_loss_population"]) == 2
    [stats] = tracker.stats.values()
    np.testing.assert_allclose(stats.mean, X.mean(0), rtol=1e-5)


def test_tracker_refuses_bad_data_of_an_unbuilt_model_before_the_first_step():
    model = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="endless"):
        model.fit(
            X,
            Y,
            callbacks=[tfbn.StatsTracker(dataset().repeat(), validation_data=(X, Y))],
            verbose=0,
        )
    assert model.optimizer.iterations == 0
