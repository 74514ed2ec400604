"""The lists of callbacks that people write: what is saved, chosen, restored, deleted and said."""

import os
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import tfbn

X = np.random.default_rng(0).normal(3, 2, (48, 6)).astype("float32")
Y = X[:, :1] - X[:, 1:2]
VALIDATION = X[:20] + 0.1, Y[:20]


def build(**options):
    """A small network whose moving averages lag."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, "tanh"), layers.BatchNormalization(), layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    return model


def fit(model, callbacks, epochs=4, **options):
    """The history of a short training with validation."""
    options = {"validation_data": VALIDATION, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, batch_size=8, callbacks=callbacks, **options).history


def sweep(**options):
    """The callback under test."""
    return tfbn.PopulationStatsCallback(X, **options)


def loss_of(model):
    """The loss of the validation data, by NumPy in float64."""
    predicted = np.asarray(model(VALIDATION[0], training=False), "float64")
    return np.mean((predicted - VALIDATION[1]) ** 2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_the_usual_list(tmp_path, options):
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
    wanted = min(history["val_loss"])
    assert len(rates) == 4
    for found in (loss_of(keras.models.load_model(best)), loss_of(model)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    # The file for resuming has the moving averages, which give something else.
    training = keras.models.load_model(tmp_path / "train.keras")
    assert abs(loss_of(training) / history["val_loss"][-1] - 1) > 0.01
    assert not os.path.exists(tmp_path / "backup")


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (lambda: keras.callbacks.EarlyStopping(patience=9), "EarlyStopping"),
        (lambda: keras.callbacks.ReduceLROnPlateau(), "ReduceLROnPlateau"),
        (
            lambda: keras.callbacks.ModelCheckpoint(
                "unused.keras", "val_loss", save_best_only=True, initial_value_threshold=-1.0
            ),
            "ModelCheckpoint",
        ),
    ],
)
def test_choosing_by_moving_averages_is_said(callback, name):
    model = build()
    with pytest.warns(UserWarning, match=rf"{name}: choosing by val_loss.*every_epoch=True"):
        fit(model, [sweep(), Stops(), callback()], epochs=1)


class Stops(keras.callbacks.Callback):
    """Ends training before anything is saved."""

    def on_train_batch_begin(self, batch, logs=None):
        """End it."""
        self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Leave nothing to choose by."""
        logs.clear()
        logs["val_loss"] = np.inf


@pytest.mark.slow
def test_nothing_is_said_where_nothing_is_wrong(tmp_path):
    monitors = {"monitor": "val_loss_population", "mode": "min"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for callbacks in (
            [keras.callbacks.EarlyStopping("loss"), sweep()],
            [keras.callbacks.BackupAndRestore(tmp_path / "backup"), sweep()],
            [keras.callbacks.ModelCheckpoint(tmp_path / "model.keras"), sweep()],
            [keras.callbacks.EarlyStopping(), sweep(every_epoch=True)],
            [
                tfbn.StatsTracker(X, validation_data=VALIDATION),
                keras.callbacks.EarlyStopping(**monitors),
                sweep(),
            ],
        ):
            fit(build(), callbacks, epochs=1)
    assert not [w for w in caught if "PopulationStatsCallback" in str(w.message)]


def test_a_checkpoint_for_resuming_only_is_named(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "train.keras")
    with pytest.warns(UserWarning, match="ModelCheckpoint before .* another one after it"):
        fit(build(), [checkpoint, sweep(every_epoch=True)], epochs=1)


@pytest.mark.parametrize("after", [False, True])
def test_the_backup_outlives_the_sweep(tmp_path, after, monkeypatch):
    folder = tmp_path / "backup"
    found = []
    callback = sweep()
    original = tfbn.callbacks.population_stats.run

    def collect(*args, **options):
        found.append(os.path.exists(folder))
        if len(found) == 1:
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
    again = build()
    fit(again, callbacks, epochs=2)  # It only sweeps.
    assert found == [True, True] and not os.path.exists(folder)
    assert "on_train_end" not in vars(backup)
    for a, b in zip(expected[:2], again.weights, strict=False):
        np.testing.assert_array_equal(a, b.numpy())
    np.testing.assert_allclose(again.layers[1].moving_mean, np.asarray(again.layers[0](X)).mean(0),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
