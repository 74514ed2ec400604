"""Draw items, or batches of several shards, in a random order that needs no memory."""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 8


class RandomOrder:
    """A pseudorandom permutation of the numbers below `number`, computed position by position.

    A Feistel network permutes the numbers below the smallest power of 4 that is at least `number`;
    a value that is too large is permuted again until it is below `number` ("cycle walking": Black &
    Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        number: Number of items.
        seed: The same seed gives the same order; other seeds give unrelated orders.
    """

    def __init__(self, number: int, seed: int):
        self._number = number
        self._bits = np.uint64(max((number - 1).bit_length() + 1, 2) // 2)  # Bits of each half.
        self._mask = np.uint64(2 ** int(self._bits) - 1)
        self._keys = np.random.default_rng(seed).integers(0, 2**64, _ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the items at consecutive positions, as int64."""
        values = np.arange(*positions.indices(self._number), dtype=np.uint64)
        values = self._permute(values)
        while (large := values >= self._number).any():
            values[large] = self._permute(values[large])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_hash(right ^ key) & self._mask)
        return left << self._bits | right


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


def _hash(values: np.ndarray) -> np.ndarray:
    """Compute the finalizer of SplitMix64 (Steele, Lea & Flood 2014), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
