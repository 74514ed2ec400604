"""Tests of walks through a graph."""

import pytest
import tensorflow as tf

from tfbn.graphs import walks


def graph_of(build):
    """Return a graph, its input, and the result of `build`."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 3], "x")
        return graph, x, build(x)


def test_sources_come_before_what_waits_for_them():
    def build(x):
        with tf.control_dependencies([tf.no_op("first")]):
            return tf.negative(x, "y")

    graph, _, y = graph_of(build)
    sources = walks.sources_of(graph)
    assert [op.name for op in sources[y.op]] == ["x", "first"]
    order = list(sources)
    assert all(order.index(s) < order.index(op) for op, waits in sources.items() for s in waits)
    assert {op.name for op in walks.ancestors([y])} == {"x", "first", "y"}


@pytest.mark.parametrize(
    ("build", "spreads"),
    [
        (lambda x: x + 1.0, True),
        (lambda x: tf.where(x > 0, 1.0, 2.0), False),
        (lambda x: tf.where(tf.math.is_nan(x), 0.0, x), False),
        (lambda x: tf.where(x != x, 0.0, x), False),
        (lambda x: tf.cast(tf.shape(x), tf.float32), False),
    ],
)
def test_nan_spreads_unless_the_graph_looks_for_it_or_reads_no_value(build, spreads):
    _, x, y = graph_of(build)
    assert walks.spreading_nan([x], [y]) == ([0] if spreads else [])


@pytest.mark.parametrize("feeds", [False, True])
def test_a_loop_feeds_itself_if_a_call_depends_on_its_last_output(feeds):
    actual = []

    def body(i, state):
        entered = tf.identity(state if feeds else tf.ones([3]))
        left = tf.tanh(entered)
        actual.append((entered, left))
        return i + 1, left

    def loop():
        return tf.while_loop(lambda i, state: i < 3, body, [0, tf.ones([3])])

    tf.function(loop).get_concrete_function()
    entered, left = actual[-1]
    assert walks.feeds_itself([entered], left) is feeds
    outside = tf.compat.v1.wrap_function(tf.tanh, [tf.TensorSpec([3])])
    assert not walks.feeds_itself(outside.inputs, outside.outputs[0])


def test_a_vectorized_function_is_noticed():
    actual = []

    def note(row):
        actual.append(row)
        return row

    function = tf.function(lambda x: tf.vectorized_map(note, x))
    function.get_concrete_function(tf.TensorSpec([None, 3]))
    assert walks.is_vectorized(actual)
    _, x, y = graph_of(tf.tanh)
    assert not walks.is_vectorized([x, y])
