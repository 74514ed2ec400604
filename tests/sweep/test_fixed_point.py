"""Tests of passes over networks that cannot be cut into levels."""

import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from states import FIRST, SECOND, begun, swept, values

import tfbn
from tfbn.sweep.fixed_point import FixedPoint


@pytest.mark.parametrize(
    ("actual", "settled"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 1e-7), True),
        (lambda x: x + np.array([0, 0.01]), False),
        (lambda x: x.mean(0) + 1.01 * (x - x.mean(0)), False),
        (lambda x: x * [0, 1], False),
    ],
)
def test_passes_go_on_until_nothing_moves(actual, settled):
    x = values(50, 1)
    state = swept(begun(fixed_point=FixedPoint()), [(FIRST, x), (SECOND, x)]).next_level()
    assert not state.complete
    state = swept(state, [(FIRST, x), (SECOND, actual(x))]).next_level()
    assert state.complete is settled


def test_passes_that_never_settle_are_an_error():
    x = values(50, 1)
    state = begun(fixed_point=FixedPoint())
    with pytest.raises(ValueError, match=r"'b'.*loop that feeds"):
        for number in range(9):
            state = swept(state, [(FIRST, x), (SECOND, x + number)]).next_level()
    assert state.level >= 3  # As many passes as calls have to pass.


def test_a_constant_channel_settles_but_for_rounding():
    x = np.full((4, 2), 1 / 3)
    state = swept(begun(fixed_point=FixedPoint()), [(FIRST, x)]).next_level()
    assert swept(state, [(FIRST, x * (1 + 1e-9))]).next_level().complete
    assert not swept(state, [(FIRST, x + 0.1)]).next_level().complete


def test_exact_for_a_layer_that_is_called_on_its_own_output():
    shared = layers.BatchNormalization()
    inputs = keras.Input((3,))
    x = shared(inputs)
    model = keras.Model(inputs, shared(x * x))
    values = np.random.default_rng(0).normal(1, 2, size=(21, 3)).astype("f")
    stats = tfbn.collect(model, values, method="exact", batch_size=4, verbose=0)
    first = values.astype(np.float64)
    second = ((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-3)) ** 2
    both = np.concatenate([first, second])
    networks.assert_layer(stats[shared.name], both.mean(0), both.var(0))


@pytest.mark.parametrize("eager", [False, True])
def test_exact_where_the_graph_cannot_be_cut(eager):
    model = networks.Looped()
    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("f")
    model(x)
    model.compile(run_eagerly=eager)
    stats = tfbn.collect(model, x, method="exact", batch_size=3, verbose=0)
    first = x.astype(np.float64)
    mean, variance = first.mean((0, 1)), first.var((0, 1))
    networks.assert_layer(stats[model.first.name], mean, variance)
    second = (first - mean) / np.sqrt(variance + 1e-3)
    assert stats[model.bn.name].count == 60
    networks.assert_layer(stats[model.bn.name], second.mean((0, 1)), second.var((0, 1)))


class Recurrent(keras.Model):
    """Batch norm in a while loop that feeds the output back into the next input."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()

    def call(self, inputs, training=None):
        """Compute h = bn(relu(h) + part) over three parts."""

        def body(i, h):
            return i + 1, self.bn(tf.nn.relu(h) + inputs[:, i], training=training)

        return tf.while_loop(lambda i, _: i < 3, body, [0, tf.zeros_like(inputs[:, 0])])[1]


def test_a_loop_that_feeds_a_layers_output_back_to_it_has_no_exact_statistics():
    model = Recurrent()
    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("f")
    model(x)
    with pytest.raises(ValueError, match=rf"{model.bn.name}'.*loop that feeds.*method='pooled'"):
        tfbn.collect(model, x, method="exact", verbose=0)
    h, seen = np.zeros((20, 4)), []
    for i in range(3):
        seen.append(np.maximum(h, 0) + x[:, i])
        h = (seen[-1] - seen[-1].mean(0)) / np.sqrt(seen[-1].var(0) + 1e-3)
    [stats] = tfbn.collect(model, x, method="pooled", verbose=0).values()
    networks.assert_layer(stats, np.mean(seen, (0, 1)), np.concatenate(seen).var(0))


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_loop_keeps_precision_far_from_zero(method, eager):
    model = networks.Looped()
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 3, 4)) + 1e4).astype("f")
    model(x)
    model.run_eagerly = eager
    model.first.trainable = False  # Scales its input by 1 - 1/2000.
    [stats] = tfbn.collect(model, x, method=method, batch_size=50, verbose=0).values()
    entered = x.astype("d") / np.sqrt(1 + 1e-3)
    networks.assert_layer(stats, entered.mean((0, 1)), entered.var((0, 1)), 1e-3)


class Cell(layers.Layer):
    """A recurrent cell with batch norm over its input and its state."""

    def __init__(self, bn=layers.BatchNormalization, **options):
        super().__init__(**options)
        self.state_size = 3
        self.kernel, self.bn = layers.Dense(3), bn()

    def build(self, shape):
        self.kernel.build(shape)
        self.bn.build((None, 3))

    def call(self, x, states, training=None):
        h = ops.tanh(self.bn(self.kernel(x) + states[0], training=training))
        return h, [h]


@pytest.mark.parametrize("unroll", [True, False])
def test_batch_norm_in_a_recurrent_cell(unroll):
    model = keras.Sequential([keras.Input((3, 4)), layers.RNN(Cell(), unroll=unroll)])
    x = networks.normal(50, 3, 4, loc=1)
    if not unroll:
        with pytest.raises(ValueError, match="loop that feeds its output back"):
            tfbn.collect(model, x, verbose=0)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # The calls differ.
        [actual] = tfbn.collect(model, x, batch_size=7, verbose=0).values()
    cell = model.layers[0].cell
    kernel, bias = (w.numpy().astype("d") for w in cell.kernel.weights)
    h, seen = np.zeros((50, 3)), []
    for i in range(3):
        seen.append(x[:, i].astype("d") @ kernel + bias + h)
        h = np.tanh((seen[-1] - seen[-1].mean(0)) / np.sqrt(seen[-1].var(0) + 1e-3))
    values = np.concatenate(seen)
    assert actual.count == 150
    networks.assert_layer(actual, values.mean(0), values.var(0), rtol=1e-4)
