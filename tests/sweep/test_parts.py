"""Tests of statistics in the making."""

import keras
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn import moments
from tfbn.keras_models import Site, batch_norm_layers
from tfbn.sweep import parts

FIRST, AGAIN, SECOND = Site("a", 0), Site("a", 1), Site("b", 0)


@pytest.fixture
def model():
    """Two batch norm layers, a and b."""
    bns = [layers.BatchNormalization(name=name) for name in "ab"]
    return keras.Sequential([keras.Input((2,)), *bns])


@pytest.fixture
def begun(model):
    """The statistics of no level."""
    return parts.start(model, batch_norm_layers(model), "exact")


def of(values):
    """The moments of some values, by NumPy."""
    count = np.full(values.shape[1], float(len(values)))
    return moments.Moments(count, values.mean(0), values.var(0) * count)


def values(n, seed):
    """Values of two channels."""
    return np.random.default_rng(seed).normal(seed, 2, size=(n, 2))


def level(begun, number, *batches):
    """A part of a level from batches of (site, values)."""
    part = begun.replace(level=number)
    for batch in batches:
        size = len(batch[0][1])
        part = parts.add(part, size, [(site, of(entered)) for site, entered in batch], 2)
    return part


def test_nothing_has_been_swept_at_the_start(model, begun):
    assert (begun.level, begun.complete, len(begun), begun.samples) == (0, False, 0, 0)
    assert list(begun.previous) == ["a", "b"]
    assert begun.fingerprint == tfbn.PopulationStats.read(model).fingerprint


def test_batches_add_up_and_calls_of_a_layer_are_joined(begun):
    x, y, z = values(3, 0), values(5, 1), values(5, 2)
    one = level(begun, 1, [(FIRST, x)])
    two = parts.add(one, 5, [(FIRST, of(y)), (AGAIN, of(z))], 2)
    assert (one.samples, one.batches, len(one.calls)) == (3, 1, 1)  # It is as it was.
    assert (two.samples, two.batches, two.batch_size, two.levels) == (8, 2, 5, 2)
    both = np.concatenate([x, y, z])
    assert two["a"].count == 13
    np.testing.assert_allclose(two["a"].mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(two["a"].variance, both.var(0), rtol=1e-12)


def test_what_is_on_top_counts_for_a_call_that_was_swept_before(begun):
    x, y, z = values(4, 0), values(4, 1), values(4, 2)
    below = parts.above(begun, level(begun, 1, [(FIRST, x), (SECOND, x)]))
    stats = parts.above(below, level(begun, 2, [(SECOND, y), (AGAIN, z)]))
    both = np.concatenate([x, z])
    np.testing.assert_allclose(stats["a"].mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["b"].mean, y.mean(0), rtol=1e-12)
    assert (stats.samples, stats.level) == (4, 2)
    # What is two levels down is not carried any further.
    third = parts.above(stats, level(begun, 3, [(SECOND, y)]))
    assert sorted(number for number, site in third.calls if site == SECOND) == [2, 3]


@pytest.mark.parametrize(
    ("found", "settled"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 1e-7), True),
        (lambda x: x + np.array([0, 0.01]), False),
        (lambda x: x.mean(0) + 1.01 * (x - x.mean(0)), False),
        (lambda x: x * [0, 1], False),
    ],
)
def test_a_call_that_moves_at_the_last_level_has_not_settled(begun, found, settled):
    x = values(50, 1)
    below = parts.above(begun, level(begun, 1, [(FIRST, x), (SECOND, x)]))
    stats = parts.above(below, level(begun, 2, [(SECOND, found(x))]))
    if settled:
        parts.check_settled(below, stats)
    else:
        with pytest.raises(ValueError, match=r"'b'.*loop that feeds"):
            parts.check_settled(below, stats)


def test_a_constant_channel_settles_but_for_rounding(begun):
    x = np.full((4, 2), 1 / 3)
    below = parts.above(begun, level(begun, 1, [(FIRST, x)]))
    parts.check_settled(below, parts.above(below, level(begun, 2, [(FIRST, x * (1 + 1e-9))])))
    with pytest.raises(ValueError, match="loop that feeds"):
        parts.check_settled(below, parts.above(below, level(begun, 2, [(FIRST, x + 0.1)])))


def test_what_is_finished_holds_every_layer(model, begun):
    x = values(4, 0)
    done = parts.above(begun, level(begun, 1, [(SECOND, x), (FIRST, x)]))
    stats = parts.finish(done, model, begun.previous)
    assert list(stats) == ["a", "b"] and stats.calls is None
    with pytest.raises(ValueError, match="at least one batch"):
        parts.finish(begun, model, begun.previous)
    with pytest.raises(ValueError, match="call its batch norm layer 'b'"):
        parts.finish(level(begun, 1, [(FIRST, x)]), model, begun.previous)
    none = moments.Moments(*np.zeros((3, 2)))
    masked = parts.add(begun.replace(level=1), 4, [(FIRST, of(x)), (SECOND, none)], 1)
    with pytest.raises(ValueError, match="values for layer 'b'"):
        parts.finish(masked, model, begun.previous)
