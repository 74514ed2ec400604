"""Hours of use in minutes: memory stays flat, and nothing stays of what is gone."""

import concurrent.futures
import contextlib
import gc
import multiprocessing
import threading
import weakref

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import ops as framework_ops

import tfbn

MIB = 2**20


def resident():
    """The memory that this process holds, in bytes."""
    for _ in range(3):  # Objects with finalizers are freed in a later round.
        gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def gradients():
    """How many gradients are registered in the process, for good."""
    return len(framework_ops.gradient_registry._registry)  # Private: TensorFlow does not say.


@contextlib.contextmanager
def others_at_work():
    """Predict with another model in a second thread; assert at the end that it never failed."""
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 8)
    expected = model.predict(x, verbose=0)
    done, wrong = threading.Event(), []

    def work():
        try:
            while not done.wait(0.05):
                if not np.allclose(model.predict(x, verbose=0), expected, 1e-4, 1e-5):
                    wrong.append("another output")
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join(60)
    assert not wrong


def sweep_one_model_200_times():
    model = networks.residual(tfbn.BatchNormalization)
    x = networks.data(model, 64)
    shuffled = tf.data.Dataset.from_tensor_slices(x).shuffle(64).batch(16)
    begun = []
    with others_at_work():
        for number in range(200):
            method = ("exact", "pooled", "exact", "algorithm2")[number % 4]
            limit = (None, 0, 20_000)[number % 3]
            tfbn.collect(model, shuffled, method=method, memory_limit=limit, verbose=0)
            if number == 4:
                begun = resident(), gradients()
    assert resident() - begun[0] < 20 * MIB
    assert gradients() == begun[1]


def graphs():
    """How many graphs are alive."""
    return sum(isinstance(thing, tf.Graph) for thing in gc.get_objects())


def growth(use):
    """The bytes by which the process grows over 20 models that are used and dropped."""
    gone, before = [], ()
    for number in range(25):
        model = networks.residual(layers.BatchNormalization)
        x = networks.data(model, 32)
        use(model, x)
        gone += [weakref.ref(model), weakref.ref(model.weights[0])]
        del model, x
        gc.collect()
        if number == 4:
            before = resident(), gradients(), graphs()
    now = resident(), gradients(), graphs()
    assert [reference() for reference in gone] == [None] * 50
    assert now[1:] == before[1:]
    return now[0] - before[0]


def make_sweep_and_drop_20_models():
    def sweep(model, x):
        for method in ("exact", "pooled"):
            tfbn.collect(model, x, method=method, batch_size=16, verbose=0)

    # TensorFlow keeps 1.7 MiB of every model that was called, without any sweep.
    called = growth(lambda model, x: model(x))
    assert growth(sweep) - called < 20 * MIB


def fit_50_epochs_with_both_callbacks():
    model = networks.residual(tfbn.BatchNormalization)
    x = networks.data(model, 64)
    y = np.arange(64) % 2
    begun = []

    def remember(epoch, logs):
        if epoch == 9:
            begun.append((resident(), gradients()))

    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    sweeps = tfbn.PopulationStatsCallback(x, every_epoch=True, verbose=0, freeze=False)
    with others_at_work():
        model.fit(
            x,
            y,
            epochs=50,
            validation_data=(x, y),
            callbacks=[
                sweeps,
                tfbn.StatsTracker(x, validation_data=(x, y)),
                keras.callbacks.LambdaCallback(on_epoch_end=remember),
            ],
            verbose=0,
        )
    assert resident() - begun[0][0] < 20 * MIB
    assert gradients() == begun[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [sweep_one_model_200_times, make_sweep_and_drop_20_models, fit_50_epochs_with_both_callbacks],
)
def test_memory_stays_flat(use):
    # In a fresh process: other tests allocate and free graphs and memory.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        process.submit(use).result()
