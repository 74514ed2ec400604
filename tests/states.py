"""States of a sweep over two layers, `a`, which is called twice, and `b` behind it."""

import numpy as np

from tfbn.stats import moments
from tfbn.sweep.batches import Batch
from tfbn.sweep.state import NetworkFacts, Site, SweepState

FIRST, AGAIN, SECOND = Site("a", 0), Site("a", 1), Site("b", 0)
LEVELS = {"a": 1, "b": 2}


def begun(**options):
    """The state at the beginning of a sweep."""
    return SweepState("exact", "weights", ("a", "b"), **options)


def of(values):
    """The moments of some values, by NumPy."""
    count = np.full(values.shape[1], float(len(values)))
    return moments.of_values(count, values.mean(0), values.var(0) * count)


def values(n, seed):
    """Values of two channels."""
    return np.random.default_rng(seed).normal(seed, 2, size=(n, 2))


def batch(size, number=0):
    """A batch whose digests are its number."""
    return Batch(number, None, size, number, number + 100)


def swept(state, *batches, levels=LEVELS):
    """A state after batches of (site, values)."""
    for number, actual in enumerate(batches):
        size = len(actual[0][1])
        sites = [(site, of(entered)) for site, entered in actual]
        state = state.note(NetworkFacts(levels)).add(batch(size, number), sites)
    return state
