"""Compare `StatsTracker` with Keras, NumPy and training without it."""

import csv

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.callbacks.tracker import WAYS, StatsTracker

EPOCHS = 2
BATCH = 8
rng = np.random.default_rng(0)
X = rng.normal(2, 3, (44, 6)).astype("float32")
Y = (X.sum(1) > 10).astype("int32")
X_VAL = rng.normal(2, 3, (20, 6)).astype("float32")
Y_VAL = (X_VAL.sum(1) > 10).astype("int32")


class Sampled(layers.Layer):
    """A layer that adds noise and counts its calls, in inference too."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(7)

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.generator)


def network(bn=layers.BatchNormalization, extra=(), **options):
    """Build two batch norm layers with `extra`, layers without weights, between them."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5),
            bn(name="first", **options),
            layers.ReLU(),
            *extra,
            layers.Dense(4),
            bn(name="second", **options),
            layers.Dense(2, "softmax"),
        ]
    )


def compiled(model, **options):
    """Compile the model."""
    options = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"], **options}
    model.compile(keras.optimizers.SGD(0.3), **options)
    return model


def fit(model, callbacks=(), epochs=EPOCHS, **options):
    """Train briefly with Keras's validation, and return the history."""
    keras.utils.set_random_seed(1)
    return model.fit(
        X,
        Y,
        epochs=epochs,
        batch_size=BATCH,
        validation_data=(X_VAL, Y_VAL),
        validation_batch_size=BATCH,
        callbacks=list(callbacks),
        verbose=0,
        **options,
    ).history


def tracker(**options):
    """Return a tracker whose sweep has all data as one batch."""
    options = {"batch_size": len(X), "validation_batch_size": BATCH, **options}
    return StatsTracker(X, validation_data=(X_VAL, Y_VAL), **options)


class Weights(keras.callbacks.Callback):
    """A callback that stores the weights at the end of every epoch."""

    def on_train_begin(self, logs=None):
        self.stored = []

    def on_epoch_end(self, epoch, logs=None):
        self.stored.append(self.model.get_weights())


def twin(weights):
    """Build Keras's layers with these weights, and momentum 0."""
    model = network(momentum=0.0)
    model.set_weights(weights)
    return model


def metrics(probabilities):
    """Compute loss and accuracy of the validation data with NumPy in float64."""
    probabilities = np.asarray(probabilities, np.float64)
    right = probabilities[np.arange(len(Y_VAL)), Y_VAL]
    return -np.log(right).mean(), (probabilities.argmax(1) == Y_VAL).mean()


def with_population(weights):
    """Compute metrics after a step in training mode over all training data as one batch."""
    model = twin(weights)
    model(X, training=True)
    return metrics(model(X_VAL, training=False))


def with_mini_batches(weights, size=BATCH):
    """Compute metrics in training mode, batch by batch."""
    model = twin(weights)
    batches = [X_VAL[start : start + size] for start in range(0, len(X_VAL), size)]
    return metrics(np.concatenate([model(batch, training=True) for batch in batches]))


def assert_logged(history, way, expected):
    """Compare loss and accuracy of every epoch."""
    for metric, values in zip(("loss", "accuracy"), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(history[f"val_{metric}_{way}"], values, rtol=2e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("bn", "options"),
    [
        (layers.BatchNormalization, {}),
        (tfbn.BatchNormalization, {}),
        pytest.param(tfbn.BatchNormalization, {"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param(tfbn.BatchNormalization, {"steps_per_execution": 3}, marks=pytest.mark.slow),
    ],
)
def test_metrics_three_ways(bn, options):
    """The network has dropout and noise, the oracle has not: both must be inactive."""
    model = network(bn, [layers.Dropout(0.5), layers.GaussianNoise(1.0)])
    weights = Weights()
    history = fit(compiled(model, **options), [weights, tracker()])
    assert_logged(history, "population", map(with_population, weights.stored))
    assert_logged(history, "mini_batch", map(with_mini_batches, weights.stored))
    for metric in ("loss", "accuracy"):
        assert history[f"val_{metric}_moving_average"] == history[f"val_{metric}"]
        assert len(history[f"val_{metric}"]) == EPOCHS
    # The three differ for these data.
    assert len({history[f"val_loss_{way}"][-1] for way in WAYS}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("bn", [layers.BatchNormalization, tfbn.BatchNormalization])
def test_training_is_bit_for_bit_the_same(bn):
    def trained(*callbacks):
        keras.utils.set_random_seed(0)  # For the layers that draw.
        model = compiled(network(bn, [layers.Dropout(0.5), Sampled()]))
        # A second fit shows state that was not restored.
        histories = [fit(model, callbacks, epochs=2), fit(model, callbacks, epochs=1)]
        state = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
        return histories, state, model.get_metrics_result()

    histories, state, results = trained()
    tracked_histories, tracked_state, tracked_results = trained(tracker())
    for history, tracked in zip(histories, tracked_histories, strict=True):
        assert {name: tracked[name] for name in history} == history
    for value, tracked in zip(state, tracked_state, strict=True):
        np.testing.assert_array_equal(value, tracked)
    assert {k: float(v) for k, v in results.items()} == {
        k: float(v) for k, v in tracked_results.items()
    }


@pytest.mark.slow
def test_training_on_two_devices_is_bit_for_bit_the_same(two_devices):
    """Replicas have different moving averages, and validate with them."""

    def trained(callbacks):
        keras.utils.set_random_seed(0)
        with two_devices.scope():
            model = compiled(network())
        history = fit(model, callbacks)
        local_values = two_devices.experimental_local_results
        return history, [v.numpy() for w in model.weights for v in local_values(w.value)]

    history, weights = trained([])
    tracked, tracked_weights = trained([tracker()])
    assert {name: tracked[name] for name in history} == history
    assert all((a == b).all() for a, b in zip(weights, tracked_weights, strict=True))
    assert tracked["val_loss_moving_average"] == tracked["val_loss"]


@pytest.mark.slow
def test_predictions_after_training_are_in_inference_mode():
    """The test function with mini-batch statistics is removed from the model."""
    model = compiled(network())
    fit(model, [tracker()])
    assert "test_step" not in vars(model)
    assert not any("call" in vars(layer) for layer in model.layers)
    expected = metrics(model(X_VAL, training=False))
    np.testing.assert_allclose(model.evaluate(X_VAL, Y_VAL, verbose=0), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics(model.predict(X_VAL, verbose=0)), expected, rtol=1e-5)


class Compiled(keras.Model):
    """A model with a compiled function and a custom test step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.function = tf.function(lambda x, training: self.inner(x, training=training))

    def call(self, inputs, training=None):
        return self.function(inputs, training=bool(training))

    def test_step(self, data):
        """Return only the loss, under another name."""
        x, y = data
        loss = keras.losses.sparse_categorical_crossentropy(y, self(x, training=False))
        return {"mine": tf.reduce_mean(loss)}


@pytest.mark.slow
def test_models_with_compiled_functions_and_custom_steps():
    model = Compiled(network())
    model(X[:1])
    weights = Weights()
    options = {"validation_batch_size": len(X_VAL)}
    history = fit(compiled(model), [weights, tracker(**options)])
    expected = [with_mini_batches(values, len(X_VAL))[0] for values in weights.stored]
    np.testing.assert_allclose(history["val_mine_mini_batch"], expected, rtol=2e-5)
    expected = [with_population(values)[0] for values in weights.stored]
    np.testing.assert_allclose(history["val_mine_population"], expected, rtol=2e-5)
    np.testing.assert_allclose(
        metrics(model(X_VAL)), metrics(model.inner(X_VAL, training=False)), rtol=1e-5
    )


@pytest.mark.slow
def test_frozen_layers_use_their_moving_averages():
    """They do so in training too."""
    model = network()
    model.get_layer("first").trainable = False
    weights = Weights()
    history = fit(compiled(model), [weights, tracker()])

    def expected(values):
        model = network(momentum=0.0)
        model.set_weights(values)  # Before the flag, which changes the order of weights.
        model.get_layer("first").trainable = False
        return metrics(
            np.concatenate([model(X_VAL[i : i + BATCH], training=True) for i in (0, 8, 16)])
        )

    frozen_weights = []
    for values in weights.stored:
        frozen = network()
        frozen.get_layer("first").trainable = False
        frozen.set_weights(values)
        frozen.get_layer("first").trainable = True
        frozen_weights.append(frozen.get_weights())
    assert_logged(history, "mini_batch", map(expected, frozen_weights))


@pytest.mark.slow
def test_datasets_and_another_metric_after_a_new_compile():
    training = tf.data.Dataset.from_tensor_slices((X, Y)).batch(len(X))
    validation = tf.data.Dataset.from_tensor_slices((X_VAL, Y_VAL)).batch(BATCH)
    watch = StatsTracker(training, validation_data=validation)
    arrays = fit(compiled(network()), [tracker()])
    model = compiled(network())
    datasets = fit(model, [watch])
    assert datasets == arrays
    model = compiled(model, metrics=["sparse_categorical_accuracy"])
    history = fit(model, [watch], epochs=1)
    assert len(history["val_sparse_categorical_accuracy_mini_batch"]) == 1


@pytest.mark.slow
def test_moving_averages_are_used_after_another_sweeping_callback():
    """The earlier callback has swapped population statistics in."""
    alone = fit(compiled(network()), [tracker()])
    swept = tfbn.PopulationStatsCallback(X, batch_size=11, every_epoch=True, verbose=0)
    model = compiled(network())

    class Held(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            current = model.get_layer("second").moving_mean.numpy()
            np.testing.assert_allclose(current, swept.stats["second"].mean, rtol=1e-6)
            assert swept.stats.mismatch(model) is None

    together = fit(model, [swept, tracker(), Held()])
    for name in ("val_loss", "val_accuracy"):  # What `fit` logs has population statistics.
        np.testing.assert_allclose(together.pop(name), together[f"{name}_population"], rtol=1e-4)
        del alone[name]
    assert together == alone


def test_callbacks_after_it_see_the_metrics(tmp_path):
    file = tmp_path / "log.csv"
    stop = keras.callbacks.EarlyStopping("val_loss_population", min_delta=1e9, mode="min")
    history = fit(compiled(network()), [tracker(), keras.callbacks.CSVLogger(file), stop], epochs=5)
    assert len(history["loss"]) == 2
    rows = list(csv.DictReader(file.read_text().splitlines()))
    for name in ("val_loss_moving_average", "val_accuracy_population", "val_loss_mini_batch"):
        assert [float(row[name]) for row in rows] == history[name]


@pytest.mark.slow
def test_stats_of_the_latest_sweep():
    watch = tracker()
    weights = Weights()
    model = compiled(network())
    fit(model, [weights, watch])
    oracle = twin(weights.stored[-1])
    oracle(X, training=True)
    for name in ("first", "second"):
        actual, right = watch.stats[name], oracle.get_layer(name)
        networks.assert_layer(
            actual, right.moving_mean.numpy(), right.moving_variance.numpy(), 1e-4
        )
        current = model.get_layer(name).moving_mean.numpy()
        np.testing.assert_array_equal(watch.stats.previous[name].mean, current)


@pytest.mark.slow
def test_errors_are_raised_before_training():
    with pytest.raises(ValueError, match=r"Expected method .* Received: method='other'"):
        StatsTracker(X, validation_data=(X_VAL, Y_VAL), method="other")
    for validation_data in (None, iter([(X_VAL, Y_VAL)])):
        with pytest.raises(ValueError, match=r"Expected validation_data .* Received: "):
            StatsTracker(X, validation_data=validation_data)
    model = compiled(network())
    before = model.get_weights()
    with pytest.raises(ValueError, match="Received: a generator"):
        fit(model, [StatsTracker((batch for batch in [X]), validation_data=(X_VAL, Y_VAL))])
    with pytest.raises(ValueError, match="no `steps`"):
        endless = tf.data.Dataset.from_tensors(X).repeat()
        fit(model, [StatsTracker(endless, validation_data=(X_VAL, Y_VAL))])
    for value, actual in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, actual)
    for x in (X, tf.data.Dataset.from_tensors(X)):  # The advice.
        tracker = StatsTracker(x, validation_data=(X_VAL, Y_VAL))
        fit(model, [tracker])
        assert tracker.stats.samples == len(X)


def test_failed_sweep_does_not_change_the_model():
    model = compiled(network())
    watch = StatsTracker(X * np.inf, validation_data=(X_VAL, Y_VAL))
    weights = Weights()
    with pytest.raises(ValueError, match="first"):
        fit(model, [weights, watch])
    for value, actual in zip(weights.stored[0], model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, actual)


class Partly(keras.Model):
    """A model that calls one layer with `training=False`, and another both ways."""

    def __init__(self):
        super().__init__()
        self.fixed = layers.BatchNormalization(name="fixed")
        self.both = layers.BatchNormalization(name="both")
        self.head = layers.Dense(2, "softmax")

    def call(self, inputs, training=None):
        """Run the second call of `both` in inference mode."""
        x = self.both(self.fixed(inputs, training=False), training=training)
        return self.head(self.both(x, training=False))


def test_mini_batch_statistics_only_in_calls_that_fit_trains():
    keras.utils.set_random_seed(0)
    model = Partly()
    model(X[:1])
    history = fit(compiled(model), [tracker()], epochs=1)

    def by_batch(x):
        w = {v.path.partition("/")[2]: v.numpy().astype("float64") for v in model.weights}

        def infer(name, x, mean, variance):
            scale = np.sqrt(variance + 1e-3)
            return (x - mean) / scale * w[f"{name}/gamma"] + w[f"{name}/beta"]

        x = infer("fixed", x, w["fixed/moving_mean"], w["fixed/moving_variance"])
        x = infer("both", x, x.mean(0), x.var(0))
        x = infer("both", x, w["both/moving_mean"], w["both/moving_variance"])
        return np.asarray(model.head(x))

    predictions = [by_batch(X_VAL[i : i + BATCH].astype("float64")) for i in (0, 8, 16)]
    loss, _ = metrics(np.concatenate(predictions))
    np.testing.assert_allclose(history["val_loss_mini_batch"][0], loss, rtol=2e-5)


@pytest.mark.slow
def test_no_global_setting_is_changed(monkeypatch):
    touched = []
    monkeypatch.setattr(tf.config, "run_functions_eagerly", touched.append)
    fit(compiled(network()), [tracker()], epochs=1)
    assert not touched


@pytest.mark.slow
def test_progress_bar_shows_keras_and_population_metrics(capsys):
    keras.utils.set_random_seed(1)
    model = compiled(network())
    options = {"validation_data": (X_VAL, Y_VAL), "callbacks": [tracker()], "verbose": 2}
    history = model.fit(X, Y, batch_size=BATCH, **options).history
    line = next(line for line in capsys.readouterr().out.splitlines() if "val_loss" in line)
    shown = {part.split(":")[0] for part in line.split(" - ") if ":" in part}
    keras_own = {"accuracy", "loss", "val_accuracy", "val_loss"}
    assert shown == keras_own | {"val_accuracy_population", "val_loss_population"}
    assert len(history) == 10


def test_diverged_training_keeps_its_history():
    """It is evaluated with the moving averages, with one warning."""
    model = network()
    model.compile(keras.optimizers.SGD(1e30), "sparse_categorical_crossentropy")
    tracker = StatsTracker(X, validation_data=(X_VAL, Y_VAL))
    with pytest.warns(UserWarning, match="training has diverged") as caught:
        history = model.fit(X, Y, epochs=3, verbose=0, callbacks=[tracker]).history
    assert sum("diverged" in str(w.message) for w in caught) == 1
    assert tracker.stats is None
    for way in WAYS:
        assert len(history[f"val_loss_{way}"]) == 3


def test_custom_attributes_are_restored_after_fit():
    model = compiled(network())
    own = {name: getattr(model, name) for name in ("test_step", "evaluate", "make_test_function")}
    for name, value in own.items():
        setattr(model, name, value)
    fit(model, [tracker()], epochs=1)
    for name, value in own.items():
        assert vars(model)[name] is value
