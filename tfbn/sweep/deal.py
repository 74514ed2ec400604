"""A random order over the batches of several shards."""

from collections.abc import Sequence

import numpy as np

from tfbn.sweep.random_order import RandomOrder


class Deal:
    """Draws batches at random from those of all shards, each once.

    A window of the order says only how many batches each shard gives: it gives its next ones.

    Args:
        sizes: The number of batches of every shard.
    """

    def __init__(self, sizes: Sequence[int]):
        self._ends = np.cumsum(sizes)
        self._order = RandomOrder(int(self._ends[-1]) if len(self._ends) else 0, seed=0)

    def __len__(self) -> int:
        return len(self._order)

    def counts(self, start: int, stop: int) -> dict[int, int]:
        """Shard -> how many of the batches from `start` to `stop` it gives, if any."""
        owners = np.searchsorted(self._ends, self._order[start:stop], side="right")
        numbers, counts = np.unique(owners, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
