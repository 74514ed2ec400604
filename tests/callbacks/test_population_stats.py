"""Tests of `tfbn.PopulationStatsCallback`."""

import itertools

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

EPOCHS = 3


def build(bn=tfbn.BatchNormalization, **compile_options):
    """Build a small network from a seed, and compile it."""
    keras.utils.set_random_seed(0)
    model = networks.plain(bn)
    model.add(layers.Dense(3, "softmax"))
    options = {"optimizer": "adam", "loss": "sparse_categorical_crossentropy", **compile_options}
    model.compile(**options)
    return model


def fit(model, callbacks, **options):
    """Train on 64 samples in batches of 16, with validation."""
    x, y = training_data(model)
    options = {"epochs": EPOCHS, "validation_data": (x[:40], y[:40]), **options}
    return model.fit(x, y, batch_size=16, callbacks=callbacks, verbose=0, **options).history


def training_data(model):
    """Return inputs and labels."""
    x = networks.data(model, 64)
    return x, np.arange(64) % 3


def statistics(model):
    """Return the inference statistics of the batch norm layers."""
    return [
        np.array(v)
        for bn in networks.batch_norms(model)
        for v in (bn.moving_mean, bn.moving_variance)
    ]


def population(model):
    """Compute population statistics with Keras alone: all data as one batch, in training mode."""
    x, _ = training_data(model)

    def build_twin(bn):
        twin = networks.plain(bn)
        twin.add(layers.Dense(3, "softmax"))
        return twin

    [actual] = networks.in_training(build_twin, model, x, [slice(None)])
    return [value for pair in actual for value in pair]


def assert_close(actual, expected, rtol=2e-4):
    """Compare within the rounding of float32."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4)


def sweep(model, **options):
    """Return the callback under test, over the training data as one batch."""
    options = {"batch_size": 64, **options}
    return tfbn.PopulationStatsCallback(training_data(model)[0], **options)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bn", [tfbn.BatchNormalization, layers.BatchNormalization])
def test_model_has_population_statistics_after_fit(bn):
    model = build(bn)
    callback = sweep(model)
    fit(model, [callback])
    assert_close(statistics(model), population(model))
    assert callback.stats.samples == 64
    assert not model.trainable_weights
    # The model is frozen, so training mode does not change the statistics.
    before = statistics(model)
    model(training_data(model)[0], training=True)
    networks.assert_same(before, statistics(model))


@pytest.mark.slow
def test_ema_weights_are_swept():
    model = build(optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9))
    fit(model, [sweep(model)])
    for weight, average in zip(
        model.layers[0].weights, model.optimizer._model_variables_moving_average, strict=False
    ):
        np.testing.assert_array_equal(weight, average)
    assert_close(statistics(model), population(model))


def on_devices(strategy):
    """Build the network on two devices, and a function that returns the statistics of each."""
    with strategy.scope():
        model = build()

    def on_each():
        return [
            [
                strategy.experimental_local_results(variable.value)[replica].numpy()
                for bn in networks.batch_norms(model)
                for variable in (bn.moving_mean, bn.moving_variance)
            ]
            for replica in range(2)
        ]

    return model, on_each


# Batches of 24 leave a remainder of 16; one batch of 64 leaves a device without data.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "batch_size"), [("pooled", 64), ("algorithm2", 24), ("exact", 24)]
)
def test_under_a_strategy_of_two_devices(method, batch_size, two_devices):
    model, on_each = on_devices(two_devices)
    callback = sweep(model, method=method, batch_size=batch_size, every_epoch=True)
    fit(model, [callback], epochs=1)
    alone = build()
    alone.set_weights(model.get_weights())
    x, _ = training_data(model)
    expected = tfbn.collect(alone, x, method=method, batch_size=batch_size, verbose=0)
    values = [v for stats in expected.values() for v in (stats.mean, stats.variance)]
    for actual in on_each():
        for a, b in zip(actual, values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        if method == "exact":
            assert_close(actual, population(model))


@pytest.mark.slow
def test_every_device_continues_from_its_moving_averages(two_devices):
    results = []
    for options in [{}, {"every_epoch": True}]:
        model, on_each = on_devices(two_devices)
        callback, values = sweep(model, **options), []
        log = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs, f=on_each, values=values: values.append(f())
        )
        fit(model, [callback, log])
        results.append(values)
    assert not np.array_equal(results[0][1][0][0], results[0][1][1][0])  # They do differ.
    for without, with_sweeps in zip(*results, strict=True):
        for a, b in zip(without, with_sweeps, strict=True):
            networks.assert_same(a, b)


def test_freeze_and_unfreeze():
    model = build()
    frozen_before = model.layers[0]
    frozen_before.trainable = False
    flags = [layer.trainable for layer in model._flatten_layers()]
    callback = sweep(model)
    fit(model, [callback])
    assert not any(layer.trainable for layer in model._flatten_layers())
    before = statistics(model)
    callback.unfreeze()
    assert [layer.trainable for layer in model._flatten_layers()] == flags
    networks.assert_same(before, statistics(model))
    callback.unfreeze()
    assert [layer.trainable for layer in model._flatten_layers()] == flags


def test_freeze_false_leaves_the_model_trainable():
    model = build()
    flags = [layer.trainable for layer in model._flatten_layers()]
    fit(model, [sweep(model, freeze=False)])
    assert [layer.trainable for layer in model._flatten_layers()] == flags


@pytest.mark.slow
def test_frozen_model_is_frozen_after_saving_and_loading(tmp_path):
    model = build()
    fit(model, [sweep(model)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not loaded.trainable_weights
    networks.assert_same(statistics(model), statistics(loaded))
    lines = []
    loaded.summary(print_fn=lambda line, **_: lines.append(line))
    assert any("Trainable params: 0 " in line for line in "\n".join(lines).splitlines())


@pytest.mark.slow
def test_fit_again_with_the_same_callback():
    model = build()
    callback = sweep(model)
    fit(model, [callback])
    first = statistics(model)
    kernel = model.layers[0].kernel.numpy()
    fit(model, [callback])
    assert not np.array_equal(kernel, model.layers[0].kernel)
    assert not np.array_equal(first[0], statistics(model)[0])
    assert_close(statistics(model), population(model))
    assert not model.trainable_weights


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "options",
    [{}, {"every_epoch": True}, {"method": "pooled", "every_epoch": True}],
    ids=str,
)
def test_sweeps_do_not_change_training(options):
    plain, swept = build(), build()
    alone = fit(plain, [])
    callback = sweep(swept, **options)
    with_sweeps = fit(swept, [callback])
    assert alone["loss"] == with_sweeps["loss"]
    if "every_epoch" in options:
        assert alone["val_loss"] != with_sweeps["val_loss"]
    else:
        assert alone["val_loss"] == with_sweeps["val_loss"]
    # The last sweep replaced the moving averages of a training without sweeps.
    callback.unfreeze()
    callback.stats.previous.assign(swept)
    networks.assert_same(plain.get_weights(), swept.get_weights())


def test_validation_with_population_statistics():
    model = build()
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            seen.append((statistics(self.model), population(self.model)))

        def on_epoch_end(self, epoch, logs=None):
            assert_close(statistics(self.model), population(self.model))

        def on_epoch_begin(self, epoch, logs=None):
            after = statistics(self.model)[1] - population(self.model)[1]
            assert np.abs(after).max() > 0.01  # The moving averages are back.

    fit(model, [sweep(model, every_epoch=True), Look()])
    assert len(seen) == 3 * EPOCHS  # 40 samples in batches of 16
    for actual, expected in seen:
        assert_close(actual, expected)


@pytest.mark.slow
def test_evaluate_outside_fit_does_not_sweep():
    model = build()
    callback = sweep(model, every_epoch=True)
    fit(model, [callback])
    callback.unfreeze()
    callback.stats.previous.assign(model)
    before = statistics(model)
    x, y = training_data(model)
    model.evaluate(x, y, callbacks=[callback], verbose=0)
    networks.assert_same(before, statistics(model))


@pytest.mark.slow
@pytest.mark.parametrize("validation_freq", [1, 2])
def test_checkpoints_listed_after_have_population_statistics(tmp_path, validation_freq):
    model = build()
    path = str(tmp_path / "{epoch}.keras")
    callbacks = [sweep(model, every_epoch=True), keras.callbacks.ModelCheckpoint(path)]
    fit(model, callbacks, validation_freq=validation_freq)
    for epoch in range(1, EPOCHS + 1):
        saved = keras.models.load_model(tmp_path / f"{epoch}.keras")
        assert_close(statistics(saved), population(saved))


@pytest.mark.slow
@pytest.mark.parametrize("on_epoch", [False, True])
def test_averaged_weights_are_swept(on_epoch):
    model = build(optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9))
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            if not on_epoch:
                seen.append((statistics(self.model), population(self.model)))

        def on_epoch_end(self, epoch, logs=None):
            if on_epoch:
                seen.append((statistics(self.model), population(self.model)))

    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
    fit(model, [swap, sweep(model, every_epoch=True), Look()])
    assert len(seen) == EPOCHS
    for actual, expected in seen:
        assert_close(actual, expected)
    assert_close(statistics(model), population(model))


@pytest.mark.slow
def test_early_stopping_listed_before_restores_first():
    model = build()
    stop = keras.callbacks.EarlyStopping("loss", patience=0, mode="max", restore_best_weights=True)
    fit(model, [stop, sweep(model)], epochs=9)
    assert stop.stopped_epoch == 1
    assert_close(statistics(model), population(model))


@pytest.mark.slow
def test_data_that_fails_at_the_end_leaves_the_moving_averages():
    plain, model = build(), build()
    fit(plain, [])
    x, _ = training_data(model)

    def batches():
        yield x[:32]
        raise OSError("the disk is gone")

    with pytest.raises(RuntimeError, match=r"batch 1 .*the disk is gone"):
        fit(model, [tfbn.PopulationStatsCallback(batches())])
    networks.assert_same(plain.get_weights(), model.get_weights())
    assert model.trainable


def test_bad_input_is_refused_before_the_first_epoch():
    model = build()
    before = model.get_weights()
    x, _ = training_data(model)
    endless = tf.data.Dataset.from_tensors(x).repeat()
    for bad in (endless, x[:0], "data"):
        with pytest.raises(ValueError, match="Received"):
            fit(model, [tfbn.PopulationStatsCallback(bad)])
    without = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    without.compile("sgd", "mse")
    with pytest.raises(ValueError, match="which has none"):
        without.fit(np.ones((4, 3)), np.ones((4, 2)), callbacks=[sweep(model)], verbose=0)
    networks.assert_same(before, model.get_weights())


@pytest.mark.parametrize(
    "options", [{"method": "best"}, {"every_epoch": 2}, {"every_epoch": "yes"}], ids=str
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="Received"):
        tfbn.PopulationStatsCallback(np.ones((2, 2)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dataset", "generator"])
def test_data_with_its_own_batches(kind):
    model = build()
    x, y = training_data(model)
    if kind == "dataset":
        source, steps = tf.data.Dataset.from_tensor_slices((x, y)).batch(32).repeat(), 2
    else:
        source, steps = itertools.cycle([(x[:32], y[:32]), (x[32:], y[32:])]), 2
    fit(model, [tfbn.PopulationStatsCallback(source, steps=steps, method="exact")])
    assert_close(statistics(model), population(model))


@pytest.mark.slow
def test_report_at_the_end(capsys):
    model = build()
    x, y = training_data(model)
    model.fit(x, y, verbose=2, callbacks=[sweep(model, freeze=False)])
    assert "Population statistics, exact: 3 passes, " in capsys.readouterr().out
    model.fit(x, y, verbose=0, callbacks=[sweep(model, freeze=False)])
    assert capsys.readouterr().out == ""


class Nothing:
    """Data without a batch and of unknown length."""

    def __iter__(self):
        return iter(())


def test_refused_fit_leaves_the_model_frozen():
    model = build()
    x, _ = training_data(model)
    fit(model, [tfbn.PopulationStatsCallback(x, verbose=0)])
    before = model.get_weights()
    with pytest.raises(ValueError, match="yields nothing"):
        fit(model, [tfbn.PopulationStatsCallback(Nothing(), verbose=0)])
    assert not any(layer.trainable for layer in networks.batch_norms(model))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_callback_inside_another_callback():
    model = build()
    x, _ = training_data(model)
    inner = tfbn.PopulationStatsCallback(x, verbose=0)
    hooks = ("on_train_begin", "on_train_batch_begin", "on_epoch_end", "on_train_end")
    outer = keras.callbacks.LambdaCallback()
    outer.on_train_begin = lambda logs=None: (inner.set_model(model), inner.on_train_begin(logs))
    for hook in hooks[1:]:
        setattr(outer, hook, getattr(inner, hook))
    fit(model, [outer])
    for actual, expected in zip(statistics(model), population(model), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True])
def test_dataset_of_unknown_shapes(eager):
    model = build(run_eagerly=eager)
    x, _ = training_data(model)
    batches = [x[:16], x[16:]]
    for known in (False, True):
        signature = tf.TensorSpec([None, *x.shape[1:]] if known else None, tf.float32)
        dataset = tf.data.Dataset.from_generator(lambda: batches, output_signature=signature)
        fit(model, [tfbn.PopulationStatsCallback(dataset, verbose=0)])
        for actual, expected in zip(statistics(model), population(model), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_custom_evaluate_is_restored_after_fit():
    model = build()
    x, _ = training_data(model)
    calls, original = [], model.evaluate

    def evaluate(*args, **options):
        calls.append(1)
        return original(*args, **options)

    model.evaluate = evaluate
    fit(model, [tfbn.PopulationStatsCallback(x, every_epoch=True, verbose=0)])
    assert len(calls) == EPOCHS and model.evaluate is evaluate


def test_memory_limit():
    bns = [layers.BatchNormalization(), layers.Dense(3), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((None, 2)), layers.Masking(), *bns])
    model.compile("sgd", "mse")
    sequences = tf.data.Dataset.range(1, 41).map(lambda i: tf.ones((1 + i % 9, 2)))
    padded = sequences.shuffle(40).padded_batch(8)  # In other batches in every pass.
    x, y = np.ones((8, 3, 2), "float32"), np.zeros((8, 3, 3), "float32")
    callback = tfbn.PopulationStatsCallback(padded, memory_limit=0)
    with pytest.raises(ValueError, match="Raise `memory_limit`"):
        model.fit(x, y, callbacks=[callback], verbose=0)
    callback = tfbn.PopulationStatsCallback(padded, memory_limit=2**20)
    model.fit(x, y, callbacks=[callback], verbose=0)
    assert callback.stats.samples == 40
