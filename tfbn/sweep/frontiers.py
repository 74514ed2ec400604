"""Cache the tensors that batches have reached, from one pass to the next."""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import tensorflow as tf

from tfbn.sweep import memory
from tfbn.sweep.batches import Batch
from tfbn.sweep.trace import Trace


class Frontier(NamedTuple):
    """The tensors of one batch, computed up to a level, that later levels require.

    Attributes:
        trace: The trace of the tensors.
        level: The level; 0 for the inputs of the batch.
        values: The tensors.
    """

    trace: Trace
    level: int
    values: list


_MAIN = "main memory"
_MOVED_AND_BACK = 40


class Frontiers:
    """Cache: batch key -> the frontier that the batch has reached.

    A frontier stays on the device that computed it while there is room. From a full accelerator
    it moves to main memory if that is faster than to compute it again: if the frontiers up to its
    level have 40 times its bytes. Otherwise the next pass starts from the last stored frontier, or
    from the batch. The factor is an estimate, not measured: on an H200, 1 GB of frontiers of
    ResNet-50 takes 1 ms to compute, and 40 ms to copy to main memory and back
    (`tests/benchmarks/sweep_gpu.py`).

    Batches are identified by their keys, so their order may change.

    Args:
        limit: Largest number of bytes in main memory, and on each accelerator.
        accelerator_limit: Function from device to bytes allowed there, `None` for main memory; by
            default `memory.accelerator_limit`.
    """

    def __init__(
        self,
        limit: int,
        accelerator_limit: Callable[[str], int | None] | None = None,
    ):
        self._limit = limit
        self._accelerator_limit = accelerator_limit or memory.accelerator_limit
        # Device -> memory.
        self._memories: dict[str, str] = {}
        # Memory -> bytes left. All logical CPUs share main memory.
        self._room = {_MAIN: limit}
        # Key -> (batch without inputs, frontier, memory -> bytes).
        self._kept: dict[int, tuple[Batch, Frontier, dict[str, int]]] = {}
        self._used: set[int] = set()
        self._level_bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the stored batches in the order of the first pass."""
        return iter([batch for batch, _, _ in self._kept.values()])

    def get(self, batch: Batch) -> Frontier | None:
        """Return the frontier of a batch, or `None`."""
        self._used.add(batch.key)
        kept = self._kept.get(batch.key)
        return None if kept is None else kept[1]

    def put(self, batch: Batch, frontier: Frontier | None) -> None:
        """Store a frontier in place of the batch's last one, if there is room."""
        if frontier is None or not frontier.level or not _has_size(frontier):
            return
        sizes = self._sizes(frontier)
        self._level_bytes[frontier.level] = sum(sizes.values())
        if self._keep(batch, frontier, sizes) or sizes.keys() == {_MAIN}:
            return
        if self._moving_pays(frontier.level):
            with tf.device("CPU:0"):  # "CPU" would keep the index of an outer scope.
                moved = frontier._replace(values=list(map(tf.identity, frontier.values)))
            self._keep(batch, moved, self._sizes(moved))

    def end_pass(self) -> None:
        """Remove the frontiers of batches that the pass has not used: they belong to other data."""
        for key in self._kept.keys() - self._used:
            _, _, sizes = self._kept.pop(key)
            self._room |= {name: self._room[name] + size for name, size in sizes.items()}
        self._used.clear()

    def _keep(self, batch: Batch, frontier: Frontier, sizes: dict[str, int]) -> bool:
        """Store a frontier if there is room; return whether it was stored."""
        _, _, before = self._kept.get(batch.key, (None, None, {}))
        left = {
            name: self._room[name] + before.get(name, 0) - sizes.get(name, 0)
            for name in {*before, *sizes}
        }
        if min(left.values(), default=0) < 0:
            return False
        self._room |= left
        # The frontier contains the inputs that later levels require.
        self._kept[batch.key] = batch._replace(inputs=None), frontier, sizes
        self._used.add(batch.key)
        return True

    def _moving_pays(self, level: int) -> bool:
        below = sum(size for other, size in self._level_bytes.items() if other <= level)
        return below >= _MOVED_AND_BACK * self._level_bytes[level]

    def _sizes(self, frontier: Frontier) -> dict[str, int]:
        """Return memory -> bytes of the tensors in it."""
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
