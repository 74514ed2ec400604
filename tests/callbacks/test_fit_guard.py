"""Compare the model after callbacks with training without them."""

import contextlib
import copy
import itertools
import pickle
import sys
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from forwards import Forwards
from keras import layers

import tfbn
from tfbn.callbacks import fit_guard, freezing, population_stats, swapping
from tfbn.models import fingerprints

rng = np.random.default_rng(0)
X = rng.normal(2, 3, (24, 4)).astype("float32")
Y = X[:, :1] - X[:, 1:2]


def build(bn=layers.BatchNormalization, **options):
    """Build and compile a small network with two levels."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            bn(name="first"),
            layers.Dense(3, "tanh"),
            bn(name="second"),
            layers.Dropout(0.2, seed=1),
            layers.Dense(1),
        ]
    )
    model.compile(**{"optimizer": keras.optimizers.SGD(0.01, 0.9), "loss": "mse", **options})
    return model


def fit(model, callbacks=(), **options):
    """Train briefly, with validation."""
    keras.utils.set_random_seed(1)
    options = {"epochs": 2, "validation_data": (X[:8], Y[:8]), "verbose": 0, **options}
    return model.fit(X, Y, batch_size=8, callbacks=list(callbacks), **options).history


def sweep(**options):
    """Return the callback under test."""
    return tfbn.PopulationStatsCallback(X, **options)


def state(model):
    """Return the whole state of training."""
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_population(model):
    """Compare with the statistics of all data as one batch, by NumPy in float64."""
    x = X.astype("float64")
    for layer in model.layers:
        weights = [w.numpy().astype("float64") for w in layer.weights]
        if isinstance(layer, layers.BatchNormalization):
            mean, variance = x.mean(0), x.var(0)
            networks.assert_layer(layer, mean, variance, 1e-4)
            x = (x - mean) / np.sqrt(variance + layer.epsilon) * weights[0] + weights[1]
        elif isinstance(layer, layers.Dense):
            x = layer.activation(x @ weights[0] + weights[1])
            x = np.asarray(x)


def previous_of(callbacks, model):
    """Return the state with the moving averages restored by the last of some callbacks."""
    callbacks[-1].unfreeze()
    callbacks[-1].stats.previous.assign(model)
    return state(model)


class Stop(keras.callbacks.Callback):
    """A callback that raises at a given moment of the second epoch."""

    def __init__(self, moment, error):
        super().__init__()
        self.error = error
        setattr(self, moment, self.stop)
        self.begun = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = epoch

    def stop(self, *args, **kwargs):
        if self.begun:
            raise self.error


def several():
    """Return callbacks that sweep, in one list."""
    return [
        sweep(every_epoch=True, method="pooled", batch_size=24),
        tfbn.StatsTracker(X, validation_data=(X, Y)),
        sweep(every_epoch=True),
        sweep(every_epoch=True, freeze=False),
    ]


@pytest.mark.slow
def test_several_sweeping_callbacks_do_not_change_training():
    plain, model, callbacks = build(), build(), several()
    alone = fit(plain)
    together = fit(model, callbacks)
    assert alone["loss"] == together["loss"]
    assert_population(model)
    assert not model.trainable  # As the first of them wanted it.
    networks.assert_same(state(plain), previous_of(callbacks, model))
    assert model.trainable


MOMENTS = [
    "on_epoch_end",
    "on_test_batch_begin",
    "on_test_begin",
    "on_test_end",
    "on_train_end",
    "on_train_batch_begin",
    "on_train_batch_end",
]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("moment", "error", "forwarded"),
    [
        *((moment, KeyboardInterrupt, False) for moment in MOMENTS),
        *((MOMENTS[0], error, True) for error in (KeyboardInterrupt, RuntimeError)),
    ],
)
def test_moving_averages_after_an_error_in_another_callback(moment, error, forwarded):
    plain, model = build(), build()
    with pytest.raises(error):
        fit(plain, [Stop(moment, error)])
    callbacks = several()
    with pytest.raises(error):
        fit(model, [*([Forwards(*callbacks)] if forwarded else callbacks), Stop(moment, error)])
    networks.assert_same(state(plain), state(model))
    assert all(layer.trainable for layer in model.layers)
    assert "evaluate" not in vars(model) and tfbn.layer.sweep_records.get(model.layers[0]) is None
    fit(plain, initial_epoch=1)
    fit(model, callbacks, initial_epoch=1)  # It can go on.
    networks.assert_same(state(plain), previous_of(callbacks, model))


@pytest.mark.slow
def test_moving_averages_after_an_error_in_validation():
    plain, model = build(), build()
    for trained, callbacks in ((plain, []), (model, [sweep(every_epoch=True)])):
        failing = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
        failing = failing.map(lambda x, y: (tf.debugging.check_numerics(x / 0.0, "no"), y))
        with pytest.raises(tf.errors.InvalidArgumentError):
            fit(trained, callbacks, validation_data=failing)
    networks.assert_same(state(plain), state(model))


class Interrupted(keras.Sequential):
    """A model with Ctrl-C in a step of the second epoch."""

    def train_step(self, data):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            raise KeyboardInterrupt
        return super().train_step(data)


@pytest.mark.quick(1)
@pytest.mark.parametrize("forwarded", [False, True])
def test_control_c_in_a_step_restores_everything(forwarded):
    models = []
    for callbacks in ([], several()):
        callbacks = [Forwards(*callbacks)] if forwarded and callbacks else callbacks
        model = Interrupted([keras.Input((4,)), *build().layers])
        model.compile("sgd", "mse", run_eagerly=True)
        with pytest.raises(KeyboardInterrupt):
            fit(model, callbacks)
        assert model.steps == 5 and "evaluate" not in vars(model)
        models.append(model)
    networks.assert_same(*map(state, models))
    assert all(layer.trainable for layer in model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swap_out", "keep"])
def test_control_c_between_the_callbacks_and_the_end_of_an_epoch(name, monkeypatch):
    plain, model = build(), build()
    finish, raised = getattr(swapping, name), []

    def interrupted(*args):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "_run" and not raised:
            raised.append(1)
            raise KeyboardInterrupt
        return finish(*args)

    monkeypatch.setattr(swapping, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [sweep(every_epoch=True)])
    assert raised
    fit(plain, epochs=1 if name == "swap_out" else 2)
    networks.assert_same(state(plain), state(model))
    assert model.trainable


def test_stop_training_is_a_regular_end():
    model = build()
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", True)
    )
    fit(model, [*several(), stop])
    assert_population(model)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_execution": 2},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"optimizer": "accumulating"},
        {"optimizer": "averaging"},
    ],
    ids=str,
)
def test_same_losses_for_every_way_to_compile(options):
    def compiled():
        optimizers = {
            "accumulating": lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
            "averaging": lambda: keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5),
        }
        made = {k: optimizers[v]() if v in optimizers else v for k, v in options.items()}
        return build(tfbn.BatchNormalization, **made)

    plain, model = compiled(), compiled()
    callback = sweep(every_epoch=True)
    for epochs in ({"epochs": 2}, {"epochs": 3, "initial_epoch": 2}):
        assert fit(plain, **epochs)["loss"] == fit(model, [callback], **epochs)["loss"]
        assert_population(model)
        networks.assert_same(state(plain), previous_of([callback], model))


@pytest.mark.slow
def test_copied_callback_sweeps_a_cloned_model():
    model = build()
    data = tf.data.Dataset.from_tensor_slices(X).batch(5)
    callback = tfbn.PopulationStatsCallback(data, validation_data=(X, Y))
    fit(model, [callback])
    copied = copy.deepcopy(callback)
    assert copied._x is data and copied.model is model
    clone = keras.models.clone_model(model)
    clone.trainable = True
    clone.compile("sgd", "mse")
    fit(clone, [copied])
    assert_population(clone)
    assert_population(model)
    assert callback.stats.mismatch(model) is None
    assert copied.stats.mismatch(clone) is None


@pytest.mark.slow
@pytest.mark.parametrize("make", [sweep, lambda: tfbn.StatsTracker(X, validation_data=(X, Y))])
def test_copies_share_the_data_and_pickles_contain_it(make):
    callback = make()
    assert copy.deepcopy(callback)._x is X
    fit(build(), [callback])
    loaded = pickle.loads(pickle.dumps(callback))
    np.testing.assert_array_equal(loaded._x, X)
    model = build()
    fit(model, [loaded])
    assert loaded.stats["first"].count == len(X)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [tfbn.PopulationStatsCallback, tfbn.StatsTracker])
@pytest.mark.parametrize("where", ["x", "validation_data"])
def test_unpicklable_data_is_refused_and_can_be_copied(cls, where):
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    callback = cls(**{"x": X, "validation_data": (X, Y), where: dataset})
    with pytest.raises(TypeError, match=rf"a {cls.__name__} with a tf.data.Dataset.*deepcopy"):
        pickle.dumps(callback)
    for copied in (copy.copy(callback), copy.deepcopy(callback)):
        assert vars(copied)[f"_{where}"] is dataset
        model = build()
        fit(model, [copied], epochs=1)
        assert copied.stats["first"].count == len(X)
    generator = tfbn.PopulationStatsCallback(iter([X]))
    with pytest.raises(TypeError, match="with an iterator"):
        pickle.dumps(generator)


def counted(monkeypatch, module, name):
    """Return a list that grows with every call of a function."""
    calls, function = [], getattr(module, name)

    def counting(*args, **options):
        calls.append(name)
        return function(*args, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize(
    ("options", "sweeps", "reuses"),
    [({}, 1, 0), ({"every_epoch": True}, 2, 3)],
)
def test_weights_are_hashed_once_for_a_sweep_and_for_a_reuse(monkeypatch, options, sweeps, reuses):
    hashed = counted(monkeypatch, fingerprints, "fingerprint")
    swept = counted(monkeypatch, population_stats, "run")
    fit(build(), [sweep(**options)])
    assert len(swept) == sweeps
    assert len(hashed) == sweeps + reuses


class Average(keras.callbacks.Callback):
    """Replaces the weights at the end of training, as averages of weights do."""

    def on_train_end(self, logs=None):
        """Halve a weight."""
        weight = self.model.weights[0]
        weight.assign(weight / 2)


def test_weights_replaced_after_the_sweep_are_reported_and_the_advice_works():
    with pytest.warns(UserWarning, match="List it before PopulationStatsCallback"):
        fit(build(), [sweep(), Average()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(build(), [Average(), sweep()])
    assert not [w for w in caught if "replaced the weights" in str(w.message)]


def resumed(path, callbacks=()):
    """Return the state of a saved model after two more epochs, with moving averages."""
    model = keras.models.load_model(path)
    fit(model, callbacks, epochs=4, initial_epoch=2)
    return previous_of(callbacks, model) if callbacks else state(model)


@pytest.mark.slow
def test_training_resumes_exactly_from_the_checkpoint_listed_before(tmp_path):
    paths = tmp_path / "plain.keras", tmp_path / "training.keras"
    for path, callbacks in zip(paths, ([], [sweep()]), strict=True):
        fit(build(), [keras.callbacks.ModelCheckpoint(path), *callbacks])
    expected = resumed(paths[0])
    networks.assert_same(expected, resumed(paths[1]))
    networks.assert_same(expected, resumed(paths[1], [sweep()]))


@pytest.mark.slow
def test_training_resumes_exactly_after_unfreezing(tmp_path):
    plain, model, callback = build(), build(), sweep()
    fit(plain)
    fit(model, [callback])
    previous_of([callback], model)
    paths = tmp_path / "plain.keras", tmp_path / "model.keras"
    plain.save(paths[0])
    model.save(paths[1])
    networks.assert_same(resumed(paths[0]), resumed(paths[1]))


@pytest.mark.slow
def test_training_a_loaded_frozen_model_is_an_error(tmp_path):
    model = build()
    fit(model, [sweep()])
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="not have any trainable"):
        fit(model)
    for callback in (sweep(), tfbn.StatsTracker(X, validation_data=(X, Y))):
        with pytest.raises(ValueError, match="of a loaded model, set trainable=False, then True"):
            fit(model, [callback])
    model.trainable = False
    model.trainable = True
    model.compile("sgd", "mse")
    callback = sweep()
    fit(model, [callback])
    assert_population(model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bn", [layers.BatchNormalization, tfbn.BatchNormalization])
def test_training_a_frozen_model_is_an_error(bn):
    model = build(bn)
    callback = sweep()
    fit(model, [callback])
    before = [w.numpy() for w in model.weights]
    with pytest.warns(UserWarning, match="not have any trainable"):
        fit(model)
    networks.assert_same(before[:6], [w.numpy() for w in model.weights][:6])
    assert_population(model)
    callback.unfreeze()
    fit(model)
    with pytest.raises(AssertionError):
        assert_population(model)


@pytest.mark.slow
def test_another_callback_unfreezes_with_a_message(capsys):
    model, plain = build(), build()
    first = sweep()
    fit(model, [first])
    previous_of([first], model)
    fit(model, [sweep(freeze=True)], verbose=2)
    said = capsys.readouterr().out
    assert "The model is now frozen. To train it further, call `unfreeze()`" in said
    assert "off by" in said and "'first'" in said
    another = sweep()
    fit(model, [another], verbose=2)
    assert "7 layers left frozen by an earlier fit will train" in capsys.readouterr().out
    fit(plain)
    tracker = tfbn.StatsTracker(X, validation_data=(X, Y))
    with pytest.raises(ValueError, match="callback that froze them has `unfreeze"):
        fit(model, [tracker])
    another.unfreeze()
    fit(model, [tracker])
    first = next(iter(tracker.stats.values()))
    assert first.count == len(X)


@pytest.mark.slow
def test_flags_set_after_the_freeze_stay():
    model, callback = build(), sweep()
    fit(model, [callback])
    model.trainable = True
    model.layers[1].trainable = False
    model.compile("sgd", "mse")
    fit(model, [callback])
    callback.unfreeze()
    assert [layer.trainable for layer in model.layers] == [True, False, True, True, True]


@pytest.mark.slow
def test_loss_before_and_after_is_printed(capsys):
    plain, model = build(metrics=["mae"]), build(metrics=["mae"])
    fit(plain)
    before = plain.evaluate(X, Y, verbose=0, return_dict=True)
    callback = sweep(validation_data=(X, Y))
    fit(model, [callback], verbose=2)
    after = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert callback.validation == {name: (before[name], after[name]) for name in before}
    line = f"Validation before and after: loss {before['loss']:.4g} -> {after['loss']:.4g}, mae"
    assert line in capsys.readouterr().out


class Gan(keras.Model):
    """A container without `call`, with a custom step."""

    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(0)
        self.generator = keras.Sequential(
            [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)]
        )
        self.built = True

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.generator(x, training=True) - y) ** 2)
        weights = self.generator.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def test_network_inside_a_container():
    model = Gan()
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"has no `call`.*model=gan.generator"):
        model.fit(X, Y, callbacks=[sweep()], verbose=0)
    callback = sweep(model=model.generator)
    model.fit(X, Y, callbacks=[callback], verbose=0)
    assert_population(model.generator)
    assert not model.generator.trainable_weights
    weights = [w.numpy() for w in model.generator.weights]
    model.fit(X, Y, callbacks=[callback], verbose=0)  # It trains on.
    assert not np.array_equal(weights[0], model.generator.weights[0])


class TwoViews(keras.Model):
    """A model built in its first step, which calls it on other inputs than its data."""

    def __init__(self):
        super().__init__()
        self.dense, self.bn = layers.Dense(3), layers.BatchNormalization(name="bn")

    def call(self, inputs, training=None):
        return self.bn(self.dense(inputs), training=training)

    def train_step(self, data):
        """Train two views of each sample to agree."""
        x, _ = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x + 0.1, training=True) - self(x, training=True)) ** 2)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


@pytest.mark.slow
def test_model_built_by_its_first_step():
    model = TwoViews()
    model.compile("sgd")
    callback = sweep()
    model.fit(X, Y, batch_size=8, callbacks=[callback], verbose=0)
    inputs = X.astype("float64") @ model.dense.kernel.numpy() + model.dense.bias.numpy()
    np.testing.assert_allclose(callback.stats["bn"].mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    model = TwoViews()
    model.compile("sgd")
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    bad = tfbn.PopulationStatsCallback(np.ones((8, 3), "float32"))
    with pytest.raises(ValueError, match="Expected batches that model"):
        model.fit(X, Y, batch_size=8, epochs=9, callbacks=[count, bad], verbose=0)
    assert len(steps) == 1


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", ["array", "dataset", "generator"])
def test_bad_data_is_refused_before_the_first_epoch(kind):
    def given(x):
        if kind == "dataset":
            return tf.data.Dataset.from_tensor_slices(x).batch(4)
        return (x[i : i + 4] for i in range(0, 8, 4)) if kind == "generator" else x

    model = build()
    before = [w.numpy() for w in model.weights]
    with pytest.raises(ValueError, match="Expected batches that model"):
        fit(model, [tfbn.PopulationStatsCallback(given(X[:8, :3]))], epochs=9)
    networks.assert_same(before, [w.numpy() for w in model.weights])
    model = build()
    callback = tfbn.PopulationStatsCallback(given(X[:8]))
    fit(model, [callback])
    assert callback.stats.samples == 8  # The check has taken nothing away.


def test_generators_cannot_be_swept_repeatedly():
    for options in ({"every_epoch": True}, {"every_epoch": True}):
        with pytest.raises(ValueError, match="Received: a generator"):
            fit(build(), [tfbn.PopulationStatsCallback(iter([X]), **options)])
    rows = tf.data.Dataset.from_tensor_slices(X).batch(8)
    for x, steps in [(rows, None), (itertools.cycle([X]), 1)]:  # The advice.
        model = build()
        fit(model, [tfbn.PopulationStatsCallback(x, steps=steps, every_epoch=True)])
        assert_population(model)


def test_custom_loop_without_callback_list():
    plain, model = build(), build()
    callback = sweep(every_epoch=True)
    callback.set_model(model)
    callback.on_train_begin()
    for trained in (plain, model):
        for epoch in range(2):
            if trained is model:
                callback.on_epoch_begin(epoch)
            trained.train_on_batch(X, Y)
            if trained is model:
                callback.on_epoch_end(epoch)
                assert_population(model)
    callback.on_train_end()
    assert_population(model)
    assert swapping.swap_out(model) is None  # It is final.
    networks.assert_same(state(plain)[:4], previous_of([callback], model)[:4])


class ControlC:
    """A tracer that raises at the n-th executed line of some modules, or counts lines for n = 0."""

    files = tuple(module.__file__ for module in (fit_guard, freezing, swapping))

    def __init__(self, at=0):
        self.at, self.count, self.raised = at, 0, False

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        """Trace the functions of these modules only."""
        return self.line if frame.f_code.co_filename in self.files else None

    def line(self, frame, event, argument):
        """Count a line, or raise."""
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.raised = True
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize(
    "every",
    [pytest.param(1, marks=pytest.mark.exhaustive), pytest.param(23, marks=pytest.mark.slow)],
)
def test_control_c_at_any_line_restores_training_state(every):
    """The state equals a state of training without callbacks."""
    model = build()
    fit(model)  # Now the optimizer has its variables.
    moments = [state(model)]

    def run(*callbacks):
        model.trainable = True
        variables = [*model.variables, *model.optimizer.variables]
        for variable, value in zip(variables, moments[0], strict=True):
            variable.assign(value)
        fit(model, callbacks)

    run(
        keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: moments.append(state(model))
        )
    )
    for _ in range(2):  # The first run has lines that no later one has.
        with ControlC() as lines:
            run(sweep(every_epoch=True))
    assert_population(model)
    assert lines.count > 100
    for at in range(1, lines.count + 1, every):
        control = ControlC(at)
        with contextlib.suppress(KeyboardInterrupt), control:
            run(sweep(every_epoch=True))
        if not control.raised:  # What the interrupted run before left made this one shorter.
            assert lines.count / 2 < control.count < at, at
            assert_population(model)
            continue
        current = state(model)
        if not any(all(map(np.array_equal, current, moment)) for moment in moments):
            assert at > 0.9 * lines.count, at
            assert_population(model)  # All callbacks have reached the end of training.
