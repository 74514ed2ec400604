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
_MOVED_AND_BACK = 40


class Frontiers:
    """Cache: batch key -> the frontier that the batch has reached.

    A frontier stays on the device that computed it while there is room. On an accelerator without
    room it moves to main memory if that is faster than to compute it again: if the frontiers up to
    its level have 40 times its bytes. Otherwise the next pass starts from the last frontier that
    was kept, or from the batch. The factor is an estimate, not measured: passing over memory, with
    the computation, an H200 takes 1 ms for 1 GB of frontiers of ResNet-50, and to main memory and
    back they take 40 ms (`tests/benchmarks/sweep_gpu.py`).

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
        self._level_bytes: dict[int, int] = {}

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
        sizes = self._sizes(frontier)
        self._level_bytes[frontier.level] = sum(sizes.values())
        if self._keep(batch, frontier, sizes) or sizes.keys() == {_MAIN}:
            return
        if self._moving_pays(frontier.level):
            with tf.device("CPU"):
                moved = frontier._replace(values=list(map(tf.identity, frontier.values)))
            self._keep(batch, moved, self._sizes(moved))

    def end_pass(self) -> None:
        """Drop the frontiers of batches that the pass did not meet: they are of other data."""
        for key in self._kept.keys() - self._used:
            _, _, sizes = self._kept.pop(key)
            self._room |= {name: self._room[name] + size for name, size in sizes.items()}
        self._used.clear()

    def _keep(self, batch: Batch, frontier: Frontier, sizes: dict[str, int]) -> bool:
        """Keep a frontier if there is room; return whether there was."""
        _, _, before = self._kept.get(batch.key, (None, None, {}))
        left = {
            name: self._room[name] + before.get(name, 0) - sizes.get(name, 0)
            for name in {*before, *sizes}
        }
        if min(left.values(), default=0) < 0:
            return False
        self._room |= left
        # The inputs themselves need not be kept: they are in the frontier where they matter.
        self._kept[batch.key] = batch._replace(inputs=None), frontier, sizes
        self._used.add(batch.key)
        return True

    def _moving_pays(self, level: int) -> bool:
        below = sum(size for other, size in self._level_bytes.items() if other <= level)
        return below >= _MOVED_AND_BACK * self._level_bytes[level]

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
