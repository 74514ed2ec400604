"""Tests of running a model under observation, in one thread and without side effects."""

import threading

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import custom_gradient, gen_random_ops

import tfbn
from tfbn.sweep import network
from tfbn.sweep.inference import Draws, inference


def draws(number=0):
    """Return the draws of a batch."""
    return Draws(tf.constant(number, tf.int64))


def places():
    """Return all attributes that the context replaces."""
    return (
        type(tf.function(lambda: None)).__dict__["__call__"],
        keras.random.SeedGenerator.__dict__["next"],
        tf.random.Generator.__dict__["skip"],
        custom_gradient.__dict__["_graph_mode_decorator"],
        random_seed.__dict__["get_seed"],
        keras.Layer.__dict__["add_loss"],
        keras.Layer.__dict__["_clear_losses"],
        layers.BatchNormalization.__dict__["call"],
        *(
            gen_random_ops.__dict__[name]
            for name in (
                "random_standard_normal",
                "truncated_normal",
                "random_uniform",
                "random_uniform_int",
            )
        ),
    )


def test_everything_private_that_is_replaced_exists_and_is_put_back():
    before = places()
    with inference({}, None, draws()):
        assert all(a is not b for a, b in zip(places(), before, strict=True))
    assert all(a is b for a, b in zip(places(), before, strict=True))
    try:
        with inference({}, None, draws()):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(a is b for a, b in zip(places(), before, strict=True))


FUNCTIONS = {
    "normal": lambda: tf.random.normal([5]),
    "truncated": lambda: tf.random.truncated_normal([5]),
    "uniform": lambda: tf.random.uniform([5], 2.0, 3.0),
    "integers": lambda: tf.random.uniform([50], 4, 9, tf.int32),
    "dropout": lambda: tf.nn.dropout(tf.ones([50]), 0.5),
    "keras": lambda: keras.random.normal([5]),
    "generator": tf.random.Generator.from_seed(1).normal,
}


def drawn(function, number):
    """Return two draws of a function for a batch."""
    arguments = [[5]] if function is FUNCTIONS["generator"] else []
    with inference({}, None, draws(number)):
        return [np.asarray(function(*arguments)) for _ in range(2)]


def test_draws_follow_from_the_batch_and_from_nothing_else():
    for name, function in FUNCTIONS.items():
        one, again, other = drawn(function, 3), drawn(function, 3), drawn(function, -4)
        np.testing.assert_array_equal(one, again, name)
        assert not np.array_equal(one[0], one[1]), name
        assert not np.array_equal(one[0], other[0]), name


def test_draws_have_their_distributions():
    with inference({}, None, draws()):
        integers = tf.random.uniform([9000], 4, 9, tf.int64, seed=3).numpy()
        uniform = tf.random.uniform([9000], -1.0, 3.0, tf.float64).numpy()
        truncated = tf.random.truncated_normal([9000], 5.0, 2.0).numpy()
        normal = tf.random.normal([9000], 5.0, 2.0, tf.float16).numpy().astype("f")
        generator = tf.random.Generator.from_seed(1).normal([9000]).numpy()
    assert integers.dtype == np.int64 and set(integers) == {4, 5, 6, 7, 8}
    assert -1 <= uniform.min() < -0.9 and 2.9 < uniform.max() < 3
    np.testing.assert_allclose([uniform.mean(), uniform.var()], [1, 16 / 12], atol=0.06)
    assert np.abs(truncated - 5).max() <= 4
    np.testing.assert_allclose([normal.mean(), normal.std()], [5, 2], atol=0.08)
    np.testing.assert_allclose([generator.mean(), generator.std()], [0, 1], atol=0.04)


@pytest.mark.parametrize("how", ["generator", "tensorflow", "tf generator"])
def test_iterations_of_a_loop_draw_anew(how):
    """Sums of n independent draws have variance n, sums of n equal ones n^2."""
    noise = networks.Drawing(how)

    def walk(inner):
        def body(i, x):
            return i + 1, tf.ensure_shape(noise(inner(x)), [4000])

        return lambda x: tf.while_loop(lambda i, x: i < 4, body, [0, x])[1]

    @tf.function(autograph=False)
    def run():
        with inference({}, None, draws()):
            return walk(walk(lambda x: x))(tf.zeros([4000]))

    assert abs(np.var(run()) - 20) < 2


def test_no_seed_moves():
    own, generator = keras.random.SeedGenerator(5), tf.random.Generator.from_seed(1)
    state = own.state.numpy(), generator.state.numpy()
    with inference({}, None, draws()):
        keras.random.normal([2], seed=own)
        generator.uniform([2])
        generator.make_seeds(2)
    np.testing.assert_array_equal(own.state, state[0])
    np.testing.assert_array_equal(generator.state, state[1])


def test_other_threads_keep_the_originals():
    tf.random.set_seed(3)
    expected = [tf.random.normal([3]).numpy() for _ in range(3)]
    own = keras.random.SeedGenerator(5)
    tf.random.set_seed(3)
    actual, seeds = [], []

    def work():
        actual.append(tf.random.normal([3]).numpy())
        seeds.append(own.next().numpy())

    for _ in range(3):
        with inference({}, None, draws()):
            tf.random.normal([3])
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    np.testing.assert_array_equal(actual, expected)
    assert len(set(map(tuple, seeds))) == 3


def test_calls_of_the_layers_are_observed_and_no_gradient_is_registered():
    first, second = layers.BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), first, second])
    seen = []

    def observe(call):
        seen.append((call.path, call.layer, call.training))
        return call.run()

    @tf.custom_gradient
    def squared(x):
        return x * x, lambda dy: dy

    def run(x):
        with inference({"one": first}, observe, draws(0)):
            return model(x, training=False), squared(x)

    graph = tf.compat.v1.wrap_function(run, [tf.TensorSpec([2, 3])]).graph
    assert not [op for op in graph.get_operations() if op.type == "IdentityN"]
    assert seen == [("one", first, False)]


def test_variables_and_losses_keep_their_values():
    class Counting(layers.Layer):
        def build(self, _):
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            self.add_loss(tf.reduce_sum(x))
            return x * self.calls

    layer = Counting()
    layer(tf.ones([2]))
    losses = layer.losses
    with inference({}, None, draws()) as scope:
        np.testing.assert_array_equal(layer(tf.ones([2])), [2, 2])
        assert scope.get_current_value(layer.calls) == 2
    assert layer.calls == 1 and layer.losses == losses and float(losses[0]) == 2


def test_dropout_is_inactive():
    bn = layers.BatchNormalization()
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dropout(0.9),
            layers.GaussianNoise(1.0),
            bn,
        ]
    )
    x = networks.data(model, 40)
    [stats] = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)


def test_global_seed_sequence_is_not_consumed():
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 20)
    draws = []
    for sweep in (False, True):
        tf.random.set_seed(7)
        if sweep:
            tfbn.collect(model, x, batch_size=20, verbose=0)
        draws.append(tf.random.normal([3]).numpy())
    np.testing.assert_array_equal(*draws)


DRAWS = ["generator", "global", "tensorflow", "uniform", "truncated", "tf generator"]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("how", "memory_limit"), [("generator", 10**9), *((how, 0) for how in DRAWS)]
)
def test_every_batch_draws_anew_and_two_sweeps_agree(how, memory_limit):
    drawing = networks.Drawing(how)
    model = keras.Sequential(
        [keras.Input((8,)), drawing, layers.BatchNormalization(), layers.BatchNormalization()]
    )
    x = np.zeros((4000, 8), "f")  # All batches are equal except for their noise.
    options = {"batch_size": 100, "memory_limit": memory_limit, "verbose": 0}
    seeds = drawing.seeds.state.numpy(), drawing.generator.state.numpy()
    one = tfbn.collect(model, x, **options)
    two = tfbn.collect(model, x, **options)
    pooled = tfbn.collect(model, x, method="pooled", batch_size=100, verbose=0)
    assert one == two
    first, second = one.values()
    np.testing.assert_allclose(first.mean, 0, atol=0.08)
    np.testing.assert_allclose(first.variance, 1, atol=0.12)
    # Both layers get the same draws.
    networks.assert_layer(second, 0, first.variance / (first.variance + 1e-3))
    np.testing.assert_allclose(next(iter(pooled.values())).variance, first.variance, rtol=1e-5)
    np.testing.assert_array_equal(drawing.seeds.state, seeds[0])
    np.testing.assert_array_equal(drawing.generator.state, seeds[1])


@pytest.mark.parametrize("eager", [False, True])
def test_global_seeds_are_left_alone(eager):
    draws = []
    for sweep in (False, True):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                networks.Drawing("global"),
                networks.Drawing("tensorflow"),
                tfbn.BatchNormalization(),
            ]
        )
        model.run_eagerly = eager
        keras.utils.clear_session()  # Before Keras 3.13 a seed does not reset the generator.
        keras.utils.set_random_seed(5)
        if sweep:
            tfbn.collect(model, np.zeros((20, 3), "f"), verbose=0)
        draws.append([keras.random.normal([3]).numpy(), tf.random.normal([3]).numpy()])
    np.testing.assert_array_equal(*draws)


class Dropping(keras.Model):
    """Monte Carlo dropout: dropout is active in inference too."""

    def __init__(self):
        super().__init__()
        self.drop = layers.Dropout(0.5, seed=1)
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(self.drop(x, training=True), training=training)


def test_dropout_called_with_training_true():
    model = Dropping()
    x = np.ones((4000, 4), "f")
    model(x[:1])
    seed = model.drop.seed_generator.state.numpy()
    options = {"batch_size": 100, "memory_limit": 0, "verbose": 0}
    [actual] = tfbn.collect(model, x, **options).values()
    np.testing.assert_allclose(actual.mean, 1, atol=0.1)  # 0 or 2, with equal probability.
    np.testing.assert_allclose(actual.variance, 1, atol=0.02)
    [again] = tfbn.collect(model, x, **options).values()
    np.testing.assert_array_equal(actual.mean, again.mean)
    np.testing.assert_array_equal(model.drop.seed_generator.state, seed)


def traced_paths(model):
    """Return the layer paths in the cached traces of a model."""
    _, traces = network._traces[model]
    return {call.site.path for kept in traces.values() for trace in kept for call in trace.calls}


@pytest.mark.slow
def test_another_thread_keeps_its_numbers_and_the_sweep_its_own():
    def build(bn=layers.BatchNormalization):
        return keras.Sequential(
            [keras.Input((6, 4)), layers.GRU(5, return_sequences=True), bn(), layers.Dense(3), bn()]
        )

    model = build()
    x = networks.normal(30, 6, 4, loc=2, scale=3)
    expected = tfbn.collect(model, x, verbose=0)
    alone = model.predict(x, verbose=0), model(x).numpy(), tf.function(model)(x).numpy()
    wrong, rounds, done = [], [], threading.Event()

    def work():
        try:
            while not done.is_set():
                actual = (
                    model.predict(x, verbose=0),
                    model(x).numpy(),
                    tf.function(model)(x).numpy(),
                )
                wrong.extend(
                    i for i in range(3) if not np.allclose(actual[i], alone[i], 1e-4, 1e-5)
                )
                rounds.append(1)
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(4):
            model.layers[-1].name = f"last_{number}"  # A new path requires a new trace.
            assert not any(f"last_{number}" in path for path in traced_paths(model))
            stats = tfbn.collect(model, x, verbose=0)
            for one, two in zip(stats.values(), expected.values(), strict=True):
                networks.assert_layer(one, two.mean, two.variance)
    finally:
        done.set()
        thread.join(120)
    assert not wrong
    assert rounds and not tf.config.functions_run_eagerly()


@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("eager", [False, True])
def test_losses_of_the_last_call_are_kept(method, eager):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, kernel_regularizer="l2"),
            layers.ActivityRegularization(l1=0.1),
            layers.BatchNormalization(),
        ]
    )
    model.run_eagerly = eager
    x = networks.normal(20, 3)
    model(x, training=True)
    before = [float(loss) for loss in model.losses]
    tfbn.collect(model, x, method=method, verbose=0)
    assert [float(loss) for loss in model.losses] == before and len(before) == 2
