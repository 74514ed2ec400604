"""The tensors that batches have at a level, kept from one pass to the next."""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import tensorflow as tf

from tfbn.sweep import memory
from tfbn.sweep.batches import Batch
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


_MAIN = "main memory"


class Frontiers:
    """Cache: batch key -> the frontier that the batch has reached.

    A frontier stays in the memory of the device that computed it, if there is room. Where there is
    none, the next pass computes it again. It never moves from an accelerator to main memory: on the
    way there and back it takes longer than the levels below take to compute (an estimate for
    ResNet-50 is in `tests/benchmarks/README.md`).

    A batch that comes again finds its frontier, even in another order of the batches.

    Args:
        limit: Bytes that the tensors may take in main memory, and at most on each accelerator.
        accelerator_limit: Device -> bytes that they may take there, `None` for main memory; by
            default `memory.accelerator_limit`.
    """

    def __init__(
        self,
        limit: int,
        accelerator_limit: Callable[[str], int | None] | None = None,
    ):
        self._limit = limit
        self._accelerator_limit = accelerator_limit or memory.accelerator_limit
        # Device -> its memory.
        self._memories: dict[str, str] = {}
        # Memory -> bytes left. All logical CPUs share main memory.
        self._room = {_MAIN: limit}
        # Key -> the batch without its inputs, its frontier, and the bytes it takes in each memory.
        self._kept: dict[int, tuple[Batch, Frontier, dict[str, int]]] = {}
        self._used: set[int] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are kept, in the order of the first pass."""
        return iter([batch for batch, _, _ in self._kept.values()])

    def get(self, batch: Batch) -> Frontier | None:
        """The frontier of a batch, or `None`."""
        self._used.add(batch.key)
        kept = self._kept.get(batch.key)
        return None if kept is None else kept[1]

    def put(self, batch: Batch, frontier: Frontier | None) -> None:
        """Keep a frontier in place of the batch's last one, if there is room for it."""
        if frontier is None or not frontier.level or not _has_size(frontier):
            return
        _, _, before = self._kept.get(batch.key, (None, None, {}))
        sizes = self._sizes(frontier)
        left = {
            name: self._room[name] + before.get(name, 0) - sizes.get(name, 0)
            for name in {*before, *sizes}
        }
        if min(left.values(), default=0) < 0:
            return
        self._room |= left
        # The inputs themselves need not be kept: they are in the frontier where they matter.
        self._kept[batch.key] = batch._replace(inputs=None), frontier, sizes
        self._used.add(batch.key)

    def end_pass(self) -> None:
        """Drop the frontiers of batches that the pass did not meet: they are of other data."""
        for key in self._kept.keys() - self._used:
            _, _, sizes = self._kept.pop(key)
            self._room |= {name: self._room[name] + size for name, size in sizes.items()}
        self._used.clear()

    def _sizes(self, frontier: Frontier) -> dict[str, int]:
        """Memory -> bytes of the tensors in it."""
        sizes: collections.Counter[str] = collections.Counter()
        for value in frontier.values:
            sizes[self._memory(value.device)] += value.dtype.size * value.shape.num_elements()
        return dict(sizes)

    def _memory(self, device: str) -> str:
        if device not in self._memories:
            limit = self._accelerator_limit(device)
            self._memories[device] = _MAIN if limit is None else device
            if limit is not None:
                self._room[device] = min(limit, self._limit)
        return self._memories[device]


def _has_size(frontier: Frontier) -> bool:
    return all(value.dtype not in (tf.variant, tf.resource) for value in frontier.values)
