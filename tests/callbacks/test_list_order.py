"""Common lists of callbacks: saved files, chosen epochs, restored weights and messages."""

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
def test_choosing_by_moving_averages_warns(callback, name):
    model = build()
    with pytest.warns(UserWarning, match=rf"{name}: choosing by val_loss.*every_epoch=True"):
        fit(model, [sweep(), Stops(), callback()], epochs=1)


class Stops(keras.callbacks.Callback):
    """A callback that ends training before anything is saved."""

    def on_train_batch_begin(self, batch, logs=None):
        """Stop training."""
        self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Log no useful metric."""
        logs.clear()
        logs["val_loss"] = np.inf


@pytest.mark.slow
def test_no_warning_for_correct_lists(tmp_path):
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


def test_checkpoint_for_resuming_only_warns(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "train.keras")
    with pytest.warns(UserWarning, match="ModelCheckpoint before .* another one after it"):
        fit(build(), [checkpoint, sweep(every_epoch=True)], epochs=1)


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
