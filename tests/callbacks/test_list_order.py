"""Common lists of callbacks: saved files, chosen epochs, restored weights and messages."""

import os
import re

import keras
import networks
import numpy as np
import pytest
from forwards import Forwards
from keras import layers

import tfbn
from tfbn.callbacks import list_order
from tfbn.callbacks.callback_lists import ListPosition

X = np.random.default_rng(0).normal(3, 2, (48, 6)).astype("float32")
Y = X[:, :1] - X[:, 1:2]
VALIDATION = X[:20] + 0.1, Y[:20]


def build(**options):
    """Build a small network whose moving averages lag."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, "tanh"), layers.BatchNormalization(), layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    return model


def fit(model, callbacks, epochs=4, **options):
    """Train briefly with validation, and return the history."""
    options = {"validation_data": VALIDATION, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, batch_size=8, callbacks=callbacks, **options).history


def sweep(**options):
    """Return the callback under test."""
    return tfbn.PopulationStatsCallback(X, **options)


def loss_of(model):
    """Compute the loss of the validation data with NumPy in float64."""
    predicted = np.asarray(model(VALIDATION[0], training=False), "float64")
    return np.mean((predicted - VALIDATION[1]) ** 2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_usual_list(tmp_path, options):
    best = tmp_path / "best.keras"
    stop = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)
    rates = []
    model = build(**options)
    history = fit(
        model,
        [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras.callbacks.ModelCheckpoint(tmp_path / "train.keras"),
            stop,
            keras.callbacks.ReduceLROnPlateau(),
            sweep(every_epoch=True),
            keras.callbacks.ModelCheckpoint(best, save_best_only=True),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: rates.append(logs)),
        ],
    )
    expected = min(history["val_loss"])
    assert len(rates) == 4
    for actual in (loss_of(keras.models.load_model(best)), loss_of(model)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    # The file for resuming has moving averages and another loss.
    training = keras.models.load_model(tmp_path / "train.keras")
    assert abs(loss_of(training) / history["val_loss"][-1] - 1) > 0.01
    assert not os.path.exists(tmp_path / "backup")


stop = keras.callbacks.EarlyStopping
checkpoint = keras.callbacks.ModelCheckpoint
BEST = checkpoint("m.keras", save_best_only=True)
NAMED = checkpoint("{epoch}-{val_loss:.2f}.keras")
EVERY, BATCHES = checkpoint("m.keras"), checkpoint("m.keras", save_freq=5)
BY_TRAINING = checkpoint("m.keras", "loss", save_best_only=True)
BACKUP, BACKUP_BY_BATCH = (keras.callbacks.BackupAndRestore("b", save_freq=n) for n in ("epoch", 5))
EMA = keras.callbacks.SwapEMAWeights()
PLATEAU, PLATEAU_2 = keras.callbacks.ReduceLROnPlateau(), keras.callbacks.ReduceLROnPlateau()
RESTORES = stop(restore_best_weights=True)
POPULATION, MINI_BATCH = (
    stop(f"val_loss_{kind}", mode="min") for kind in ("population", "mini_batch")
)


# Callbacks before and after, `every_epoch`, and the only callback that the error or warning names.
ERRORS = [
    ([BEST], [], True, "ModelCheckpoint before"),
    ([NAMED], [], True, "ModelCheckpoint before"),
    ([Forwards(BEST)], [], True, "ModelCheckpoint before"),
    ([], [RESTORES], False, "EarlyStopping after .* replaces"),
    ([], [Forwards(RESTORES)], True, "EarlyStopping after .* replaces"),
    ([], [EMA], True, "SwapEMAWeights after .* replaces"),
    ([], [BACKUP], True, "BackupAndRestore after .* resume"),
]
WARNINGS = [
    ([], [stop()], False, "EarlyStopping: choosing by val_loss,"),
    (
        [PLATEAU],
        [keras.callbacks.ReduceLROnPlateau()],
        False,
        "ReduceLROnPlateau: choosing by val_loss,",
    ),
    ([stop()], [BEST], False, "EarlyStopping, ModelCheckpoint: choosing"),
    ([EVERY], [], True, "ModelCheckpoint before .* List another one after"),
    ([Forwards(EVERY)], [BATCHES], True, "ModelCheckpoint before .* List another one after"),
]
RIGHT = [
    ([stop("loss"), BY_TRAINING, EVERY, BATCHES], [BACKUP, EMA], False),
    ([RESTORES, EMA, PLATEAU], [stop(), PLATEAU, BEST], True),
    ([EVERY, BACKUP, BY_TRAINING], [Forwards(checkpoint("n.keras"))], True),
    ([POPULATION, NAMED], [MINI_BATCH], False),
    ([BATCHES], [BACKUP_BY_BATCH], True),
]


@pytest.mark.parametrize(("before", "after", "every_epoch", "says"), ERRORS)
def test_orders_that_lose_statistics_are_errors(before, after, every_epoch, says):
    with pytest.raises(ValueError, match=rf"{says}.*Swap the two"):
        list_order.check(ListPosition(None, before, after), every_epoch)


@pytest.mark.parametrize(("before", "after", "every_epoch", "says"), WARNINGS)
def test_orders_that_choose_by_moving_averages_are_warnings(before, after, every_epoch, says):
    position = ListPosition(None, before, after)
    list_order.check(position, every_epoch)
    [sentence] = list_order.warnings(position, every_epoch)
    assert re.match(says, sentence)


@pytest.mark.parametrize(("before", "after", "every_epoch"), RIGHT)
def test_right_orders_are_silent(before, after, every_epoch):
    position = ListPosition(None, before, after)
    list_order.check(position, every_epoch)
    assert list(list_order.warnings(position, every_epoch)) == []


def test_fit_checks_the_order_at_the_beginning():
    model = build()
    before = model.get_weights()
    for wrong in ([sweep(), RESTORES], [Forwards(BEST, sweep(every_epoch=True))]):
        with pytest.raises(ValueError, match="Swap the two"):
            fit(model, wrong)
    networks.assert_same(before, model.get_weights())
    with pytest.warns(UserWarning, match="choosing by val_loss.*every_epoch=True"):
        fit(model, [sweep(), stop()], epochs=1)


@pytest.mark.parametrize("after", [False, True])
def test_backup_is_kept_until_the_sweep_is_done(tmp_path, after, monkeypatch):
    folder = tmp_path / "backup"
    kept = []
    callback = sweep()
    original = tfbn.callbacks.population_stats.run

    def collect(*args, **options):
        kept.append(os.path.exists(folder))
        if len(kept) == 1:
            raise OSError("crash")
        return original(*args, **options)

    monkeypatch.setattr(tfbn.callbacks.population_stats, "run", collect)
    backup = keras.callbacks.BackupAndRestore(folder)
    callbacks = [callback, backup] if after else [backup, callback]
    model = build()
    with pytest.raises(OSError, match="crash"):
        fit(model, callbacks, epochs=2)
    assert os.path.exists(folder)
    expected = [w.numpy() for w in model.weights]
    resumed = build()
    fit(resumed, callbacks, epochs=2)  # It only sweeps.
    assert kept == [True, True] and not os.path.exists(folder)
    assert "on_train_end" not in vars(backup)
    for a, b in zip(expected[:2], resumed.weights, strict=False):
        np.testing.assert_array_equal(a, b.numpy())
    mean = np.asarray(resumed.layers[0](X)).mean(0)
    np.testing.assert_allclose(resumed.layers[1].moving_mean, mean, rtol=1e-4, atol=1e-5)
