"""Tests of running a model observed, in one thread and without effect."""

import threading

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import custom_gradient, gen_random_ops

from tfbn.sweep.inference import Draws, inference


def draws(number=0):
    """The draws of a batch."""
    return Draws(tf.constant(number, tf.int64))


def places():
    """What a context replaces."""
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
    """What a function draws for a batch, twice."""
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
    found, seeds = [], []

    def work():
        found.append(tf.random.normal([3]).numpy())
        seeds.append(own.next().numpy())

    for _ in range(3):
        with inference({}, None, draws()):
            tf.random.normal([3])
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    np.testing.assert_array_equal(found, expected)
    assert len(set(map(tuple, seeds))) == 3


def test_calls_of_the_layers_are_observed_and_no_gradient_is_registered():
    first, second = layers.BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), first, second])
    seen = []

    def observe(path, layer, call, x, training, mask):
        seen.append((path, layer, training))
        return call(x, training=training, mask=mask)

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
