"""Tests of extracting functions from a graph."""

import numpy as np
import pytest
import tensorflow as tf

from tfbn.graphs.subgraphs import Subgraphs
from tfbn.graphs.walks import ancestors


def traced(function, *specs):
    """Return a wrapped function and its graph."""
    wrapped = tf.compat.v1.wrap_function(function, specs)
    return wrapped, wrapped.graph


SPEC = tf.TensorSpec([None, 3], tf.float32)
X = np.arange(6, dtype="f").reshape(2, 3)


def named(graph, name):
    """Return the first output of an operation."""
    return graph.get_tensor_by_name(f"{name}:0")


def subgraphs(graph):
    """Return the subgraphs of a graph that captures variables."""
    return Subgraphs(graph, {inner.name: outer for outer, inner in graph.captures})


def test_only_what_lies_between_is_taken():
    def run(x):
        a = tf.square(x, "a")
        b = tf.add(a, 1.0, "b")
        tf.debugging.Assert(False, ["not between"])
        return tf.multiply(b, 2.0, "c")

    _, graph = traced(run, SPEC)
    function, needed = subgraphs(graph).function([named(graph, "a")], [], [named(graph, "c")])
    assert needed == []
    [actual] = function(tf.constant(X))
    np.testing.assert_array_equal(actual, (X + 1) * 2)


def test_weights_are_read_when_it_runs():
    weight = tf.Variable(2.0)
    _, graph = traced(lambda x: tf.multiply(x, weight, "y"), SPEC)
    [x] = [op.outputs[0] for op in graph.get_operations() if op.type == "Placeholder"][:1]
    function, _ = subgraphs(graph).function([x], [], [named(graph, "y")])
    np.testing.assert_array_equal(function(tf.constant(X))[0], 2 * X)
    weight.assign(5.0)
    np.testing.assert_array_equal(function(tf.constant(X))[0], 5 * X)


def test_second_outputs_feeds_that_are_fetched_and_optional_tensors():
    def run(x):
        first, second = tf.unstack(tf.stack([x, x + 1], name="s"), name="u")
        with tf.name_scope("given"):
            population = tf.compat.v1.placeholder(tf.float32, [], "p")
            other = tf.compat.v1.placeholder(tf.float32, [], "q")
        return tf.add(first * 1.0, second * population, "y"), tf.add(first, other, "z")

    _, graph = traced(run, SPEC)
    feeds = [graph.get_tensor_by_name("u:1"), graph.get_tensor_by_name("u:0")]
    offered = [named(graph, "given/p"), named(graph, "given/q")]
    fetches = [named(graph, "y"), feeds[0]]
    function, needed = subgraphs(graph).function(feeds, offered, fetches)
    assert [tensor.name for tensor in needed] == ["given/p:0"]
    y, same = function(tf.constant(X), tf.constant(10 * X), tf.constant(3.0))
    np.testing.assert_array_equal(y, 10 * X + 3 * X)
    np.testing.assert_array_equal(same, X)


def test_control_flow_and_functions_come_along():
    @tf.function
    def inner(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, v: (i + 1, v * 2), [0, x])[1]

    def run(x):
        a = tf.identity(x, "a")
        return tf.identity(tf.cond(tf.reduce_sum(a) > 0, lambda: inner(a), lambda: -a), "y")

    _, graph = traced(run, SPEC)
    function, _ = subgraphs(graph).function([named(graph, "a")], [], [named(graph, "y")])
    np.testing.assert_array_equal(function(tf.constant(X))[0], 8 * X)
    np.testing.assert_array_equal(function(tf.constant(-X))[0], X)


def test_effects_that_ran_before_are_not_waited_for():
    counter = tf.Variable(0.0)

    def run(x):
        counted = counter.assign_add(1.0)
        with tf.control_dependencies([counted]):
            a = tf.identity(x, "a")
        with tf.control_dependencies([counted]):
            return tf.square(a, "y")

    _, graph = traced(run, SPEC)
    a, y = named(graph, "a"), named(graph, "y")
    function, _ = subgraphs(graph).function([a], [], [y])
    function(tf.constant(X))
    assert counter == 1
    ran = ancestors([a])
    function, _ = subgraphs(graph).function([a], [], [y], already_run=ran.__contains__)
    [actual] = function(tf.constant(X))
    np.testing.assert_array_equal(actual, X**2)
    assert counter == 1


@pytest.mark.parametrize("activation", [tf.nn.relu, tf.nn.relu6])
@pytest.mark.parametrize("bias", [False, True])
def test_nan_comes_through_a_convolution_and_its_activation(activation, bias):
    kernel = tf.Variable(tf.ones([2, 2, 1, 4]))

    def run(x):
        y = tf.nn.conv2d(x, kernel, 1, "VALID")
        y = tf.nn.bias_add(y, tf.ones([4])) if bias else y
        return tf.identity(activation(y), "y")

    _, graph = traced(run, tf.TensorSpec([None, 8, 8, 1], tf.float32))
    [x] = [op.outputs[0] for op in graph.get_operations() if op.type == "Placeholder"][:1]
    function, _ = subgraphs(graph).function([x], [], [named(graph, "y")])
    values = np.ones([2, 8, 8, 1], "f")
    values[1, 3, 3] = np.nan
    actual, *_ = function(tf.constant(values))
    assert np.isnan(actual).sum() == 4 * 4
