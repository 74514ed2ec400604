"""One random order over the batches of several shards: how many each of them draws next."""

from collections.abc import Sequence

import numpy as np

from tfbn.sweep.random_order import RandomOrder


class Deal:
    """Draw batches of all shards at random, each once.

    A window of the order determines the number of batches from each shard, which are its next ones.

    Args:
        sizes: The number of batches of every shard.
    """

    def __init__(self, sizes: Sequence[int]):
        self._ends = np.cumsum(sizes)
        self._order = RandomOrder(int(self._ends[-1]) if len(self._ends) else 0, seed=0)

    def __len__(self) -> int:
        return len(self._order)

    def counts(self, start: int, stop: int) -> dict[int, int]:
        """Return shard -> number of its batches from `start` to `stop`, without zeros."""
        owners = np.searchsorted(self._ends, self._order[start:stop], side="right")
        numbers, counts = np.unique(owners, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
