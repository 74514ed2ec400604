"""The tensors that batches have at a level, kept from one pass to the next."""

from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf

from tfbn.sweep.batches import Batch, nbytes
from tfbn.sweep.trace import Trace


class Frontier(NamedTuple):
    """The tensors of one batch that later levels need of the network up to a level.

    Attributes:
        trace: The trace that they belong to.
        level: The level; 0 for the batch itself.
        values: The tensors.
    """

    trace: Trace
    level: int
    values: list


class Frontiers:
    """The frontiers of as many batches as there is room for, by the batches' keys.

    A batch that comes again, in any place, finds its frontier. A batch that was not there before
    finds none.

    Args:
        room: How many bytes the tensors may take.
    """

    def __init__(self, room: int):
        self._room = room
        # Key -> the batch without its inputs, its frontier, and how many bytes that takes.
        self._kept: dict[int, tuple[Batch, Frontier, int]] = {}
        self._used: set[int] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are kept, in the order of the first pass."""
        return (batch for batch, _, _ in list(self._kept.values()))

    def get(self, batch: Batch) -> Frontier | None:
        """The frontier of a batch, or `None`."""
        self._used.add(batch.key)
        _, frontier, _ = self._kept.get(batch.key, (None, None, 0))
        return frontier

    def put(self, batch: Batch, frontier: Frontier | None) -> None:
        """Keep a frontier in place of the batch's last one, if there is room for it."""
        if frontier is None or not frontier.level or not _can_keep(frontier):
            return
        _, _, before = self._kept.get(batch.key, (None, None, 0))
        size = nbytes(frontier.values)
        if size - before <= self._room:
            with tf.device("CPU"):  # Main memory has more room than an accelerator.
                values = [tf.identity(value) for value in frontier.values]
            # The inputs themselves need not be kept: they are in the frontier where they matter.
            self._kept[batch.key] = (
                batch._replace(inputs=None),
                frontier._replace(values=values),
                size,
            )
            self._room -= size - before
            self._used.add(batch.key)

    def end_pass(self) -> None:
        """Drop the frontiers of batches that the pass did not meet: they are of other data."""
        for key in self._kept.keys() - self._used:
            _, _, size = self._kept.pop(key)
            self._room += size
        self._used.clear()


def _can_keep(frontier: Frontier) -> bool:
    """Whether all its tensors have a size that is known."""
    return all(value.dtype not in (tf.variant, tf.resource) for value in frontier.values)
