"""Tests of `tfbn.collect` and `tfbn.update_population_stats`."""

import copy
import gc
import os
import pickle
import random
import signal
import threading
import time
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn
from tfbn.models.keras_models import batch_norm_layers

BN = [tfbn.BatchNormalization, layers.BatchNormalization]


SAMPLES = 37


@pytest.mark.quick(2)
@pytest.mark.parametrize("build", networks.NETWORKS)
def test_exact_is_one_batch_in_training_mode_for_any_batch_size(build):
    model = build(tfbn.BatchNormalization)
    x = networks.data(model, SAMPLES)
    [expected] = networks.in_training(build, model, x, [slice(None)])
    for batch_size, memory_limit in [(8, 0), (1, None), (2, 3000)]:
        stats = tfbn.collect(
            model, x, method="exact", batch_size=batch_size, memory_limit=memory_limit, verbose=0
        )
        networks.assert_statistics(stats, expected, model=model)
        assert stats.samples == SAMPLES


def test_exact_does_not_depend_on_the_order():
    model = networks.residual(layers.BatchNormalization)
    x = networks.data(model, SAMPLES)
    order = np.random.default_rng(1).permutation(SAMPLES)
    shuffled = keras.tree.map_structure(lambda a: a[order], x)
    a = tfbn.collect(model, x, method="exact", batch_size=5, verbose=0)
    b = tfbn.collect(model, shuffled, method="exact", batch_size=11, verbose=0)
    for path, drift in a.compare(b).items():
        assert drift["mean_shift_max"] < 1e-5, path
        assert drift["std_ratio_max"] < 1 + 1e-5, path


@pytest.mark.quick(2)
@pytest.mark.parametrize("build", networks.NETWORKS)
def test_pooled_and_algorithm2_to_their_definitions(build):
    model = build(layers.BatchNormalization)
    x = networks.data(model, SAMPLES)
    starts = range(0, SAMPLES, 16)
    batches = networks.in_training(build, model, x, [slice(s, s + 16) for s in starts])
    sizes = [16, 16, 5]
    stats = tfbn.collect(model, x, method="pooled", batch_size=16, verbose=0)
    per_layer = list(zip(*batches, strict=True))
    networks.assert_statistics(
        stats, [networks.pooled(sizes, layer) for layer in per_layer], rtol=1e-5, model=model
    )

    stats2 = tfbn.collect(model, x, method="algorithm2", batch_size=16, verbose=0)
    path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
    expected = []
    for layer, actual in zip(networks.batch_norms(model), per_layer, strict=True):
        positions = stats2[path_of[id(layer)]].count // SAMPLES
        m = np.array(sizes)[:, None] * positions
        weights = np.array(sizes) / SAMPLES
        means, variances = (np.stack(v) for v in zip(*actual, strict=True))
        expected.append((weights @ means, weights @ (variances * m / (m - 1))))
    networks.assert_statistics(stats2, expected, rtol=1e-5, model=model)
    assert (stats.batches, stats.batch_size, stats.samples) == (3, 16, SAMPLES)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    with networks.dtype_policy(policy):
        model = keras.Sequential(
            [keras.Input((3,)), tfbn.BatchNormalization(), layers.BatchNormalization()]
        )
    x = np.random.default_rng(0).normal(3, 2, size=(50, 3)).astype("f")
    first, second = tfbn.collect(model, x, method="exact", batch_size=8, verbose=0).values()
    rounded = tf.cast(x, policy.removeprefix("mixed_")).numpy().astype(np.float64)
    networks.assert_layer(first, rounded.mean(0), rounded.var(0))
    np.testing.assert_allclose(second.variance, rounded.var(0) / (rounded.var(0) + 1e-3), rtol=1e-2)


class Counter(layers.Layer):
    """Counts its calls in any mode, and scales by the count."""

    def build(self, _):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs * self.calls


def stateful(bn):
    """Build and compile a network with all kinds of state."""
    inputs = keras.Input((3,))
    normalization = layers.Normalization(mean=[1.0, 2, 3], variance=[1.0, 2, 3])
    x = Counter()(normalization(inputs))
    x = layers.Dropout(0.3, seed=3)(layers.Dense(4)(x))
    x = networks.Compiled(bn)(x)
    x = layers.GaussianNoise(0.1, seed=4)(layers.Dense(4)(x))
    model = keras.Model(inputs, layers.Dense(2, "softmax")(bn()(x)))
    model.compile(
        keras.optimizers.Adam(use_ema=True), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def state(model):
    """Return the whole state of a model and its optimizer, and all random states."""
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    values = [np.array(v.numpy()) for v in variables]
    flags = [layer.trainable for layer in model._flatten_layers()]
    generator = tf.random.get_global_generator().state.numpy()
    return [*values, flags, generator, np.random.get_state()[1], random.getstate()[1]]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("bn", "eager", "method"),
    [
        (layers.BatchNormalization, False, "pooled"),
        (tfbn.BatchNormalization, True, "exact"),
        (tfbn.BatchNormalization, False, "exact"),
        (layers.BatchNormalization, True, "algorithm2"),
    ],
)
def test_a_sweep_changes_nothing(bn, eager, method):
    model = stateful(bn)
    x, y = networks.data(model, 64), np.arange(64) % 2
    model.fit(x, y, epochs=1, verbose=0)
    predicted = model.predict(x, verbose=0)
    functions = model.train_function, model.test_function, model.predict_function
    model.run_eagerly = eager
    before = state(model)
    tfbn.collect(model, x, method=method, verbose=0)
    networks.assert_same(before, state(model))
    model.run_eagerly = False
    assert functions == (model.train_function, model.test_function, model.predict_function)
    counter = next(layer for layer in model.layers if isinstance(layer, Counter))
    counter.calls.assign(before[[v.path for v in model.variables].index(counter.calls.path)] - 2)
    model.predict(x, verbose=0)  # Two batches: the counter has its old value again.
    assert predicted.shape == (64, 2)


@pytest.mark.slow
@pytest.mark.parametrize("bn", BN)
def test_training_goes_on_as_if_no_sweep_had_been(bn):
    histories = []
    for sweep in (False, True):
        keras.utils.set_random_seed(1)
        model = stateful(bn)
        x, y = networks.data(model, 64), np.arange(64) % 2

        def collect(epoch, logs, sweep=sweep, model=model, x=x):
            if sweep:
                tfbn.collect(model, x, method="exact", batch_size=16, verbose=0)

        history = model.fit(
            x,
            y,
            epochs=3,
            validation_data=(x, y),
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=collect)],
            verbose=0,
        )
        histories.append(history.history)
    assert histories[0] == histories[1]


class Fault(Exception):
    """Raised by the data."""


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("fails_at", "method"),
    [(0, "exact"), (3, "pooled"), (6, "exact"), (0, "pooled"), (2, "exact"), (4, "exact")],
)
def test_an_error_at_any_batch_leaves_the_model_as_it_was(fails_at, method):
    model = stateful(tfbn.BatchNormalization)
    x = networks.data(model, 7 * 8)

    def batches():
        for i in range(7):
            if i == fails_at:
                raise Fault("the disk is gone")
            yield x[8 * i : 8 * i + 8]

    before = state(model)
    with pytest.raises(RuntimeError, match=f"batch {fails_at} .*Fault: the disk is gone") as caught:
        tfbn.update_population_stats(model, batches(), method=method, verbose=0)
    assert isinstance(caught.value.__cause__, Fault)
    networks.assert_same(before, state(model))


@pytest.fixture
def listening():
    """Make Ctrl-C raise, even if the tests run as a background job of a shell, which ignores it.

    Python drops an exception raised during garbage collection, which is frequent after other tests.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_the_model_as_it_was(listening):
    model = stateful(layers.BatchNormalization)
    x = networks.data(model, 32)

    def batches():
        yield x
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            yield x
        raise TimeoutError

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        tfbn.update_population_stats(model, batches(), verbose=0)
    networks.assert_same(before, state(model))
    tfbn.collect(model, x, batch_size=32, verbose=0)  # Another sweep works.


def bad_calls():
    """Bad calls, and what the error must say."""
    x = np.ones((8, 3), "float32")
    bn = layers.BatchNormalization
    with_bn = lambda: keras.Sequential([keras.Input((3,)), bn()])  # noqa: E731

    def no_layers():
        return keras.Sequential([keras.Input((3,)), layers.Dense(2)])

    def frozen():
        model = with_bn()
        model.trainable = False
        return model

    dataset = tf.data.Dataset.from_tensor_slices(x).batch(4)
    return {
        "no layers": (no_layers, x, {}, "which has none"),
        "no model": (lambda: "model.keras", x, {}, "Expected a Keras model"),
        "unbuilt": (lambda: keras.Sequential([bn()]), x, {}, "built model.*without weights"),
        "unbuilt subclass": (
            lambda: networks.Subclassed(bn),
            x,
            {},
            "built model.*without weights",
        ),
        "frozen": (frozen, x, {}, "include_frozen=True"),
        "method": (with_bn, x, {"method": "best"}, "Received: method='best'"),
        "empty array": (with_bn, x[:0], {}, "yields nothing"),
        "empty dataset": (with_bn, dataset.take(0), {}, "yields nothing"),
        "empty generator": (with_bn, iter(()), {}, "yields nothing"),
        "endless dataset": (with_bn, dataset.repeat(), {}, "endless.*steps"),
        "endless pydataset": (with_bn, networks.Pairs(x, endless=True), {}, "endless.*steps"),
        "steps too many": (with_bn, dataset, {"steps": 3}, "steps=3.*ends after 2"),
        "steps too many, generator": (with_bn, iter([x]), {"steps": 3}, "steps=3.*ends after 1"),
        "steps": (with_bn, x, {"steps": 0}, "Received: 0"),
        "batch_size": (with_bn, dataset, {"batch_size": 4}, "only with arrays"),
        "wrong shape": (with_bn, np.ones((8, 4), "f"), {}, r"batch 0 .*\(8, 4\)"),
        "wrong rank": (with_bn, np.ones((8, 2, 3), "f"), {}, r"batch 0 .*\(8, 2, 3\)"),
        "wrong in a later batch": (with_bn, iter([x, np.ones((8, 4), "f")]), {}, r"batch 1 .*"),
        "lengths": (with_bn, {"a": x, "b": x[:4]}, {}, r"same number of samples.*\[4, 8\]"),
        "list of batches": (with_bn, [x, x], {}, "one array.*list of 2 arrays.*generator"),
        "scalar": (with_bn, np.float32(1), {}, "batch axis"),
        "no data": (with_bn, None, {}, "`model.fit` takes"),
        "endless iterable": (with_bn, networks.Endless(), {}, "an endless Endless.*steps"),
        "empty, with a tolerance": (with_bn, iter(()), {"tolerance": 0.1}, "yields nothing"),
        "a path": (with_bn, "data.npz", {}, "`model.fit` takes"),
        "once": (with_bn, iter([x]), {"method": "exact", "memory_limit": 3}, "memory_limit=3"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_gets_one_clear_error(case):
    build, x, options, message = bad_calls()[case]
    model = build()
    before = model.get_weights() if getattr(model, "built", False) else None
    with pytest.raises(ValueError, match=f"(?s)(Expected.*)?{message}") as caught:
        tfbn.update_population_stats(model, x, verbose=0, **options)
    assert "Received" in str(caught.value)
    if before is not None:
        networks.assert_same(before, model.get_weights())


@pytest.mark.parametrize("call", [tfbn.collect, tfbn.update_population_stats])
def test_a_sweep_in_a_graph_gets_one_clear_error(call):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    before, x = model.get_weights(), np.ones((4, 3), "float32")
    with pytest.raises(ValueError, match=r"Expected a sweep outside of .* while a graph is made"):
        tf.function(lambda: call(model, x, verbose=0), autograph=False)()
    with tf.Graph().as_default(), pytest.raises(ValueError, match="while a graph is made"):
        call(model, x, verbose=0)
    networks.assert_same(before, model.get_weights())


def test_layers_behind_a_shared_one_are_measured_as_inference_has_them():
    shared, behind = layers.BatchNormalization(name="shared"), layers.BatchNormalization(name="end")
    a, b = keras.Input((3,)), keras.Input((3,))
    outputs = behind(ops.tanh(layers.Concatenate(axis=1)([shared(a), shared(b)])))
    model = keras.Model([a, b], outputs)
    x = [networks.normal(40, 3), networks.normal(40, 3, seed=1, loc=4, scale=3)]
    with pytest.warns(UserWarning, match=r"'shared' is called 2 times.*differ"):
        stats = tfbn.collect(model, x, batch_size=7, verbose=0)
    both = np.concatenate(x).astype("d")
    networks.assert_layer(stats["shared"], both.mean(0), both.var(0))
    normed = [(v - both.mean(0)) / np.sqrt(both.var(0) + 1e-3) for v in x]
    values = np.tanh(np.concatenate(normed, axis=1))
    networks.assert_layer(stats["end"], values.mean(0), values.var(0))
    # The advice: one layer per call.
    apart = keras.Model([a, b], [layers.BatchNormalization()(v) for v in (a, b)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(apart, x, batch_size=7, verbose=0)
    for actual, v in zip(stats.values(), x, strict=True):
        networks.assert_layer(actual, v.astype("d").mean(0), v.astype("d").var(0))


@pytest.mark.slow
def test_clones_copies_and_pickles():
    def build(bn=tfbn.BatchNormalization):
        return networks.plain(bn)

    model = build()
    x = networks.data(model, 20)
    stats = tfbn.update_population_stats(model, x, verbose=0)
    for twin in (
        keras.models.clone_model(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        twin.set_weights(model.get_weights())
        again = tfbn.collect(twin, x, verbose=0)
        networks.assert_statistics(again, stats, 1e-5)
    for same in (copy.deepcopy(stats), copy.copy(stats), pickle.loads(pickle.dumps(stats))):
        assert same == stats


def test_a_second_sweep_finds_nothing_to_change():
    for build in (networks.residual, networks.nested):
        model = build(layers.BatchNormalization)
        x = networks.data(model, 30)
        stats = tfbn.update_population_stats(model, x, batch_size=4, verbose=0)
        again = tfbn.collect(model, x, batch_size=9, verbose=0)
        for off in again.compare(stats).values():
            assert off["mean_shift_max"] < 1e-5 and off["std_ratio_max"] < 1 + 1e-5


def advised_calls():
    """Data and options that are refused, the advice, and what follows it."""
    x = networks.varied(40)
    parts = [x[:16], x[16:]]
    used_up = iter(parts)
    list(used_up)
    nan = x.copy()
    nan[3, 1] = np.nan
    rows = tf.data.Dataset.from_tensor_slices(x)
    small = {"memory_limit": 3}
    return {
        "used up": (used_up, {}, "Recreate a used-up generator", iter(parts), {}),
        "once, arrays": (iter(parts), small, "Pass arrays or a dataset", x, small),
        "once, dataset": (iter(parts), small, "Pass arrays or", rows.batch(8), small),
        "once, memory": (iter(parts), small, "or raise `memory_limit`", iter(parts), {}),
        "few batches": (rows.batch(8), {"steps": 6}, "Lower", rows.batch(8), {"steps": 5}),
        "endless": (rows.batch(8).repeat(), {}, "Set", rows.batch(8).repeat(), {"steps": 5}),
        "list, generator": (parts, {}, "use a generator or", (part for part in parts), {}),
        "list, dataset": (parts, {}, "or tf.data.Dataset", rows.batch(8), {}),
        "samples": (rows, {}, r"Use `dataset\.batch\(32\)`", rows.batch(32), {}),
        "NaN": (nan, {}, "NaN or Inf. Clean it", np.where(np.isnan(nan), x, nan), {}),
    }


@pytest.mark.parametrize("case", advised_calls())
def test_data_is_swept_as_the_error_advises(case):
    refused, options, advice, data, advised = advised_calls()[case]
    model = networks.three_levels()
    with pytest.raises(ValueError, match=advice):
        tfbn.collect(model, refused, verbose=0, **options)
    stats = tfbn.collect(model, data, verbose=0, **advised)
    networks.assert_exact(stats, networks.three_levels, model, networks.varied(40))


def test_an_unbuilt_model_is_swept_once_it_was_called():
    model, x = keras.Sequential([layers.BatchNormalization()]), networks.varied(40)
    with pytest.raises(ValueError, match="Call it on a batch"):
        tfbn.update_population_stats(model, x, verbose=0)
    model(x[:2])
    tfbn.update_population_stats(model, x, verbose=0)
    networks.assert_layer(model.layers[0], x.astype("d").mean(0), x.astype("d").var(0))


@pytest.mark.parametrize("how", ["include_frozen", "trainable"])
def test_frozen_layers_are_swept_as_the_error_advises(how, tmp_path):
    x = networks.varied(40)
    inner = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((4,)), inner])
    model.trainable = False
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    advice = r"set trainable=False, then True, and compile it.*include_frozen=True"
    with pytest.raises(ValueError, match=advice):
        tfbn.collect(model, x, verbose=0)
    if how == "trainable":
        model.trainable = False
        model.trainable = True
        model.compile("sgd", "mse")
    [stats] = tfbn.collect(model, x, include_frozen=how == "include_frozen", verbose=0).values()
    networks.assert_layer(stats, x.astype("d").mean(0), x.astype("d").var(0))
