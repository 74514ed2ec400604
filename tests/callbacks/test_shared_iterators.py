"""Tests of `tfbn.callbacks.shared_iterators`."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn.callbacks.shared_iterators import iterators_in, warn_of_shared_shuffle

X = np.random.default_rng(0).normal(3, 2, (64, 3)).astype("float32")
SPEC = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))


def network():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    return model


def batches(size=8, length=64):
    for i in range(0, length, size):
        yield X[i : i + size], X[i : i + size, :1]


def endless():
    while True:
        yield from batches()


class Batches:
    """An iterator class."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.source)


def dataset(generator):
    return tf.data.Dataset.from_generator(lambda: generator, output_signature=SPEC).prefetch(1)


# Ways to read the iterator of `fit`.
SHARED = {
    "the same": lambda one: one,
    "an expression": lambda one: (batch for batch in one),
    "map": lambda one: map(tuple, one),
    "zip": lambda one: ((x, y) for ((x, y),) in zip(one)),
    "filter": lambda one: filter(None, one),
    "enumerate": lambda one: (batch for _, batch in enumerate(one)),
    "islice of chain": lambda one: itertools.islice(itertools.chain(one, batches()), 9),
    "class": Batches,
    "dataset": dataset,
    "iterator of a dataset": lambda one: iter(dataset(one)),
    "batches of a dataset": lambda one: (batch for batch in dataset(one).map(lambda x, y: (x, y))),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("make", [batches, endless])
def test_iterators_shared_with_fit_are_refused(name, make):
    one = make()
    model = network()
    callback = tfbn.PopulationStatsCallback(SHARED[name](one), steps=8)
    with pytest.raises(ValueError, match=r"`fit` does not read too.*an iterator \(generator\)"):
        model.fit(one, steps_per_epoch=8, callbacks=[callback], verbose=0)
    assert model.optimizer.iterations == 0


def test_iterators_shared_with_validation_are_refused():
    one = batches()
    with pytest.raises(ValueError, match="does not read too"):
        network().fit(
            X,
            X[:, :1],
            validation_data=one,
            callbacks=[tfbn.PopulationStatsCallback(one)],
            verbose=0,
        )


def test_tracker_refuses_a_dataset_of_a_shared_iterator():
    shared = dataset(endless())
    tracker = tfbn.StatsTracker(shared, validation_data=(X, X[:, :1]), steps=8)
    with pytest.raises(ValueError, match="does not read too"):
        network().fit(shared, steps_per_epoch=8, callbacks=[tracker], verbose=0)


class Sequence(keras.utils.PyDataset):
    """Batches by number."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return X[8 * i : 8 * i + 8], X[8 * i : 8 * i + 8, :1]


def twice():
    first, second = itertools.tee(batches())
    return (batch for batch in first), second


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (batches(), batches()),  # The advice of the message.
        lambda: (endless(), endless()),
        lambda: [Sequence()] * 2,
        lambda: [tf.data.Dataset.from_tensor_slices((X, X[:, :1])).shuffle(64).batch(8)] * 2,
        lambda: [tf.data.Dataset.from_generator(batches, output_signature=SPEC)] * 2,
        twice,
    ],
    ids=["generators", "endless", "PyDataset", "tf.data", "from_generator", "tee"],
)
def test_separate_data_is_swept(pair):
    trained, swept = pair()
    callback = tfbn.PopulationStatsCallback(swept, steps=8)
    network().fit(trained, steps_per_epoch=8, callbacks=[callback], verbose=0)
    [stats] = callback.stats.values()
    np.testing.assert_allclose(stats.mean, X.mean(0), rtol=1e-5)


def test_generator_shorter_than_an_epoch_is_reported():
    for validation in (None, (X, X[:, :1])):
        callback = tfbn.PopulationStatsCallback(batches(length=24))
        with pytest.warns(UserWarning, match="24 samples in 3 batches, but an epoch .* 64 samples"):
            network().fit(
                X,
                X[:, :1],
                epochs=2,
                validation_data=validation,
                callbacks=[callback],
                verbose=0,
            )
    for whole, swept in [  # The advice.
        (tfbn.PopulationStatsCallback(batches()), X),
        (tfbn.PopulationStatsCallback(batches(length=24), steps=3), X[:24]),
    ]:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*an epoch of training")
            network().fit(X, X[:, :1], callbacks=[whole], verbose=0)
        [stats] = whole.stats.values()
        np.testing.assert_allclose(stats.mean, swept.mean(0), rtol=1e-5)


def test_generator_with_another_batch_size_is_not_reported(recwarn):
    callback = tfbn.PopulationStatsCallback(batches(size=32))
    network().fit(X, X[:, :1], batch_size=4, callbacks=[callback], verbose=0)
    assert not [warning for warning in recwarn if "an epoch of training" in str(warning.message)]


def test_iterators_are_found_in_functions_and_running_generators():
    one = batches()

    def closed_over():
        yield from one

    started = closed_over()
    next(started)
    for source in (closed_over, started, [{"a": (one,)}]):
        assert one in iterators_in(source)
    assert iterators_in([X, Sequence(), network(), itertools.count(), "text"]) == []


def shuffled():
    data = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).cache().shuffle(64, seed=3)
    return data.batch(8).prefetch(1)


def every_epoch(x):
    return tfbn.PopulationStatsCallback(x, every_epoch=True)


def tracker(x):
    return tfbn.StatsTracker(x, validation_data=(X, X[:, :1]))


def losses(callbacks=()):
    keras.utils.set_random_seed(2)
    data = shuffled()
    callbacks = [callback(data) for callback in callbacks]
    options = {"validation_data": (X, X[:, :1]), "verbose": 0}
    return network().fit(data, epochs=3, callbacks=callbacks, **options).history["loss"]


ORDER = "the next epoch has another order"


@pytest.mark.parametrize("callback", [every_epoch, tracker])
def test_shuffle_shared_with_fit_is_reported_and_the_advice_works(callback):
    plain = losses()
    with pytest.warns(UserWarning, match=ORDER):
        assert losses(callbacks=[callback]) != plain
    apart = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*" + ORDER)
        assert losses(callbacks=[lambda data: callback(apart)]) == plain


class Fitting(keras.Model):
    """Checks data inside `fit`, without training."""

    def fit(self, x=None, y=None, validation_data=None, ours=None):
        """See `keras.Model.fit`."""
        warn_of_shared_shuffle(ours)


ROWS = tf.data.Dataset.from_tensor_slices((X, X[:, :1]))
SEEDED, UNSEEDED = ROWS.shuffle(64, seed=3), ROWS.shuffle(64)
FIXED = ROWS.shuffle(64, seed=3, reshuffle_each_iteration=False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (SEEDED, SEEDED),
        (SEEDED.cache().batch(8).prefetch(1), SEEDED.batch(4)),
        (SEEDED, SEEDED.map(lambda x, y: x)),
        (SEEDED, tf.data.Dataset.zip(ROWS, SEEDED)),
        (SEEDED, SEEDED.take(2).concatenate(SEEDED.skip(2))),
    ],
)
def test_a_seeded_shuffle_in_two_pipelines_is_reported(theirs, ours):
    with pytest.warns(UserWarning, match=ORDER):
        Fitting().fit(theirs, ours=ours)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (UNSEEDED, UNSEEDED),
        (FIXED, FIXED),
        (SEEDED, ROWS.shuffle(64, seed=3)),
        (SEEDED, ROWS),
        (X, SEEDED),
        (SEEDED, X),
    ],
)
def test_shuffles_that_change_no_order_are_not_reported(theirs, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fitting().fit(theirs, ours=ours)
        Fitting().fit(X, validation_data=ours, ours=ours)
        warn_of_shared_shuffle(ours)


@pytest.mark.parametrize("ours", [lambda data: data, lambda data: data.map(lambda x, y: (x, y))])
def test_sweep_at_the_end_changes_no_order(ours):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*" + ORDER)
        assert losses(callbacks=[lambda data: tfbn.PopulationStatsCallback(ours(data))]) == losses()
