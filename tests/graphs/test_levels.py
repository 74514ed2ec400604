"""Tests of cutting a graph into levels."""

from typing import NamedTuple

import pytest
import tensorflow as tf

from tfbn.graphs import levels, walks


class Call(NamedTuple):
    """A call of a layer. Its input tensor is observed."""

    path: str
    inputs: list
    outputs: tf.Tensor
    fetches: list


def traced(network):
    """Return a graph, its input and its layer calls. `network` adds a call with `call(path, x)`."""
    calls = []

    def call(path, x):
        calls.append(Call(path, [x], tf.identity(x, f"{path}{len(calls)}"), [x]))
        return calls[-1].outputs

    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 3], "x")
        network(x, call)
    return graph, x, calls


def levels_of(network):
    """Return path -> level, or the layers that depend on their own output."""
    graph, _, calls = traced(network)
    before = levels.dependencies(walks.sources_of(graph), calls)
    return levels.recurrent(before, calls) or levels.levels(before)


def residual(x, call):
    """Build a skip connection with one layer, next to a branch with two."""
    skip = call("skip", x)
    y = call("second", tf.nn.relu(call("first", x)))
    call("last", skip + y)


def shared(x, call):
    """Call a layer twice: on the input, then after another layer."""
    y = call("shared", x)
    call("behind", call("shared", call("other", x) + 1.0) + y)


def fed_back(x, call):
    """Call a layer on its own output."""
    call("behind", call("cell", tf.tanh(call("cell", x))))


def around(x, call):
    """Call a layer between two calls of another."""
    call("cell", call("between", call("cell", x)))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (residual, {"skip": 1, "first": 1, "second": 2, "last": 3}),
        (shared, {"other": 1, "shared": 2, "behind": 3}),
        (fed_back, {"cell"}),
        (around, {"cell"}),
    ],
)
def test_a_level_is_one_more_than_the_highest_before(network, expected):
    assert levels_of(network) == expected


def test_a_frontier_has_what_later_levels_read_of_the_data():
    def network(x, call):
        weights = tf.constant([[1.0], [2.0], [3.0]]) * 2.0  # Cheaper to recompute than to keep.
        skip = tf.identity(x, "keep")
        y = tf.nn.relu(call("first", tf.identity(x, "enter")), "between")
        call("second", tf.matmul(y, weights, name="entering"))
        tf.add(skip, 1.0, "unused")
        call("third", tf.add(tf.matmul(skip, weights), call("second", y[:, :1]), "last"))

    graph, x, calls = traced(network)
    sources = walks.sources_of(graph)
    by_path = levels.levels(levels.dependencies(sources, calls))
    cut = levels.cut(sources, [x], calls, by_path)
    assert (cut.depth, cut.drawn, cut.frontiers[0]) == (3, None, [x])
    names = [sorted(tensor.op.name for tensor in frontier) for frontier in cut.frontiers]
    # Level 1 needs neither the skip connection nor the weights. The input is kept for the skip.
    assert names[1] == ["enter", "x"]
    assert names[2] == ["strided_slice", "x"]
    assert [t.op.name for t in cut.fetches[2]] == ["entering", "strided_slice"]
    assert graph.get_operation_by_name("unused") not in cut.run_at
    assert cut.run_at[graph.get_operation_by_name("between")] == 2


def test_a_random_draw_is_part_of_the_data():
    def network(x, call):
        noise = tf.random.normal([3], name="noise")
        call("second", call("first", x + noise) * noise)

    graph, x, calls = traced(network)
    sources = walks.sources_of(graph)
    by_path = levels.levels(levels.dependencies(sources, calls))
    cut = levels.cut(sources, [x], calls, by_path)
    assert cut.drawn == "noise/RandomStandardNormal"
    assert any("noise" in tensor.op.name for tensor in cut.frontiers[1])
