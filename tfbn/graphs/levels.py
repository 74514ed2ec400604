"""Cut a traced graph into segments at the calls of layers.

The level of a layer is one more than the highest level among the layers that its calls depend on.
Segment l is the part of the graph between the frontiers of levels l - 1 and l. It computes the
inputs of the layers of level l, and frontier l.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import tensorflow as tf

from tfbn.graphs.walks import Sources

# Prefixes of operation types that draw random numbers. `tf.random.normal`, `uniform`,
# `truncated_normal` and Keras's are patched before a trace, see `tfbn.sweep.inference`.
_DRAWS = ("Random", "Multinomial", "ParameterizedTruncatedNormal", "Stateful", "Rng")
_DRAWS_NOT = ("StatefulPartitionedCall",)


class LayerCall(Protocol):
    """A call of a layer in a graph.

    Attributes:
        path: The layer.
        inputs: The input tensors.
        outputs: The output tensor.
        fetches: The tensors to fetch for its statistics; empty or `None` if it is not observed.
    """

    @property
    def path(self) -> str: ...
    @property
    def inputs(self) -> list[tf.Tensor]: ...
    @property
    def outputs(self) -> tf.Tensor: ...
    @property
    def fetches(self) -> list[tf.Tensor] | None: ...


@dataclasses.dataclass(frozen=True)
class Cut:
    """A graph that is cut at the levels of its layers.

    Attributes:
        depth: The highest level.
        fetches: Level -> the fetches of its calls.
        frontiers: Level -> the tensors of this or an earlier level that later levels read. Frontier
            0 is the inputs of the graph.
        run_at: Operation that depends on the inputs -> the level whose segment runs it. Operations
            that depend on weights only run in every segment, which is cheaper than storing them.
        drawn: The name of an operation that draws random numbers, or `None`.
    """

    depth: int
    fetches: list[list[tf.Tensor]]
    frontiers: list[list[tf.Tensor]]
    run_at: dict[tf.Operation, int]
    drawn: str | None


def dependencies(sources: Sources, calls: Sequence[LayerCall]) -> dict[str, list[str]]:
    """Return path -> the layers that reach observed calls of a layer without another in between."""
    paths = list(dict.fromkeys(call.path for call in calls))
    bit = {path: 1 << index for index, path in enumerate(paths)}
    call_at = {call.outputs.op: call for call in calls}
    before = dict.fromkeys(paths, 0)  # Path -> layers, a bit each.
    reaching: dict[tf.Operation, int] = {}
    for op, waits_for in sources.items():
        mask = 0
        for source in waits_for:
            mask |= reaching[source]
        reaching[op] = mask
        if call := call_at.get(op):
            reaching[op] = bit[call.path]
            if call.fetches:
                for tensor in call.inputs:
                    before[call.path] |= reaching[tensor.op]
    return {path: [other for other in paths if mask & bit[other]] for path, mask in before.items()}


def recurrent(before: Mapping[str, Collection[str]], calls: Sequence[LayerCall]) -> frozenset[str]:
    """Return the layers whose calls depend on calls of the same layer, like an RNN cell.

    Args:
        before: See `dependencies`.
        calls: The calls of layers.
    """
    counts = collections.Counter(call.path for call in calls)

    def is_recurrent(path: str) -> bool:
        seen: set[str] = set()
        pending = list(before[path])
        while pending:
            other = pending.pop()
            if other not in seen:
                seen.add(other)
                pending += before[other]
        return path in seen

    return frozenset(path for path in before if counts[path] > 1 and is_recurrent(path))


def levels(before: Mapping[str, Collection[str]]) -> dict[str, int]:
    """Return path -> level, for layers that are not `recurrent`.

    Args:
        before: See `dependencies`.
    """
    result: dict[str, int] = {}
    for path in before:
        pending = [path]
        while pending:
            missing = [other for other in before[pending[-1]] if other not in result]
            if missing:
                pending.append(missing[0])
                continue
            done = pending.pop()
            result[done] = 1 + max((result[other] for other in before[done]), default=0)
    return result


def cut(
    sources: Sources,
    inputs: Sequence[tf.Tensor],
    calls: Sequence[LayerCall],
    levels: Mapping[str, int],
) -> Cut:
    """Cut a graph.

    Args:
        sources: The `Sources` of the graph.
        inputs: The tensors to feed data to.
        calls: The calls of layers.
        levels: Path -> level.
    """
    fetches = _fetches(calls, levels)
    first = _first_levels(sources, inputs, fetches)
    run_at = {op: first[op] for op in _depending(sources, inputs) if op in first}
    last = _last_levels(first, fetches)
    frontiers: list[list[tf.Tensor]] = [list(inputs), *([] for _ in fetches[1:])]
    for op, level in run_at.items():
        for tensor in op.outputs:
            for between in range(max(level, 1), last.get(id(tensor), 0)):
                frontiers[between].append(tensor)
    drawn = [op.name for op in run_at if _draws(op)]
    return Cut(len(fetches) - 1, fetches, frontiers, run_at, drawn[-1] if drawn else None)


def _fetches(calls: Sequence[LayerCall], levels: Mapping[str, int]) -> list[list[tf.Tensor]]:
    by_level: dict[int, list[tf.Tensor]] = collections.defaultdict(list)
    for call in calls:
        by_level[levels[call.path]] += call.fetches or ()
    return [by_level[level] for level in range(max(levels.values(), default=0) + 1)]


def _depending(sources: Sources, inputs: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """Return the operations that depend on the inputs, or draw, which must run only once."""
    depending = {tensor.op: None for tensor in inputs}
    for op, waits_for in sources.items():
        if _draws(op) or not depending.keys().isdisjoint(waits_for):
            depending[op] = None
    return [op for op in sources if op in depending]


def _first_levels(
    sources: Sources, inputs: Sequence[tf.Tensor], fetches: Sequence[Sequence[tf.Tensor]]
) -> dict[tf.Operation, int]:
    """Return operation -> the first level that requires it; 0 for the inputs."""
    first = {tensor.op: 0 for tensor in inputs}
    for level, fetched in enumerate(fetches):
        pending = [tensor.op for tensor in fetched]
        while pending:
            op = pending.pop()
            if op not in first:
                first[op] = level
                pending += sources[op]
    return first


def _last_levels(
    first: Mapping[tf.Operation, int], fetches: Sequence[Sequence[tf.Tensor]]
) -> dict[int, int]:
    """Return id of a tensor -> the last level that reads it."""
    last = {id(tensor): level for level, fetched in enumerate(fetches) for tensor in fetched}
    for op, level in first.items():
        for tensor in op.inputs:
            last[id(tensor)] = max(last.get(id(tensor), 0), level)
    return last


def _draws(op: tf.Operation) -> bool:
    """Whether an operation draws random numbers."""
    return op.type.startswith(_DRAWS) and op.type not in _DRAWS_NOT
