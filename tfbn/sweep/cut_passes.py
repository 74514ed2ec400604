"""Passes over a network that is cut at its levels: each computes the next level of a batch."""

import collections
from collections.abc import Callable, Mapping
from typing import NamedTuple

import keras
import tensorflow as tf

from tfbn.graphs.subgraphs import sources
from tfbn.sweep.batches import Batch
from tfbn.sweep.frontiers import Frontier
from tfbn.sweep.loops import feeding_themselves
from tfbn.sweep.network import Network, Trace, UnobservableError, flatten, traces_of
from tfbn.sweep.observation import Call, CallMoments
from tfbn.sweep.state import Site

# A call, and the moments of the values that entered it.
SiteMoments = tuple[Site, list[CallMoments]]
# By path, or by site where a call has its own, mean and variance, of shape (2, channels).
Populations = Mapping[str | Site, tf.Tensor]

# The types of operations that draw random numbers of their own. Those behind `tf.random.normal`,
# `uniform` and `truncated_normal`, and Keras's, do not come here: see `tfbn.sweep.inference`.
_DRAWS = ("Random", "Multinomial", "ParameterizedTruncatedNormal", "Stateful", "Rng")
_DRAWS_NOT = ("StatefulPartitionedCall",)


class Shown(NamedTuple):
    """What a batch has shown of the network.

    Attributes:
        random: Whether it draws random numbers.
        by_batch: See `tfbn.sweep.observation.Run`.
    """

    random: bool
    by_batch: frozenset[str]


class CutPasses:
    """The passes of a sweep, one for each level of batch norm layers.

    Args:
        network: A `tfbn.sweep.network.Network`.
        static: See `Network.trace`.
    """

    def __init__(self, network: Network, static: bool):
        self._network = network
        self._static = static

    def start(self, batch: Batch) -> Frontier:
        """The frontier of level 0 of a batch."""
        trace = self._network.trace(batch.inputs, settled=True, static=self._static)
        return Frontier(trace, 0, [*flatten(batch.inputs), batch.number])

    def levels(self, frontier: Frontier) -> dict[str, int] | None:
        """By path the levels of the layers, or `None` if the network cannot be cut there."""
        return levels_of(_trace_of(frontier)).of_path

    def looping(self, frontier: Frontier) -> frozenset[str]:
        """The paths of the layers in loops that feed themselves."""
        return feeding_themselves(_trace_of(frontier))

    def not_nan(self, frontier: Frontier) -> list[int]:
        """The places of the inputs in which NaN would be an error."""
        return _trace_of(frontier).not_nan

    def advance(
        self, frontier: Frontier, level: int, populations: Populations
    ) -> tuple[list[SiteMoments], Frontier, Shown]:
        """Take a batch to a level.

        Args:
            frontier: Its `Frontier` at a lower level.
            level: The level.
            populations: By path the mean and variance of the layers of all lower levels, a
                tensor of shape (2, channels).

        Returns:
            For every call of the level its site and the moments of the values that enter, a list
            of (count, mean, variance); the frontier of the level; and whether the network draws
            random numbers.
        """
        trace = _trace_of(frontier)
        levels = levels_of(trace)
        shown = Shown(trace.random, trace.by_batch)
        if level > levels.depth:  # Another signature has more levels.
            return [], frontier, shown
        if frontier.level < level - 1 and levels.drawn is not None:
            raise UnobservableError(
                "Expected random numbers that can be drawn again. Received: operation "
                f"{levels.drawn!r}, in a sweep that has to compute a batch several times. Draw "
                "with keras.random and a SeedGenerator, raise `memory_limit`, or use "
                "method='pooled'."
            )
        values = frontier.values
        for number in range(frontier.level + 1, level + 1):
            entered, values = levels.run_segment(number, values, populations)
        return entered, Frontier(trace, level, values), shown


def _trace_of(frontier: Frontier) -> Trace:
    assert frontier.trace is not None  # As in whole passes.
    return frontier.trace


class Levels:
    """The graph of a trace, cut at the levels of its batch norm layers.

    A layer's level is one more than the highest level among the layers that any of its calls
    depends on. Segment l is the piece of the graph between the frontiers of levels l - 1 and l. It
    gives the tensors that enter the layers of level l, and frontier l.

    Args:
        trace: A settled `tfbn.sweep.network.Trace`.

    Attributes:
        of_path: By path the level of a layer; `None` if the network cannot be cut, because a
            layer is called in a loop or branch or depends on its own output.
        depth: The highest level.
        drawn: The name of an operation that draws random numbers of its own, or `None`.
    """

    def __init__(self, trace: Trace):
        self._trace = trace
        # By level its function, and the sites whose populations that takes.
        self._segments: dict[int, tuple[Callable[..., list[tf.Tensor]], list[Site]]] = {}
        self.of_path = _levels(trace) if trace.cuttable else None
        self.drawn = None
        if self.of_path is None:
            return
        self._calls: dict[int, list[Call]] = collections.defaultdict(list)
        for call in trace.calls:
            if call.fetches:
                self._calls[self.of_path[call.site.path]].append(call)
        self.depth = max(self.of_path.values(), default=0)
        self._find_frontiers(self.depth)

    def run_segment(
        self, level: int, values: list[tf.Tensor], populations: Populations
    ) -> tuple[list[SiteMoments], list[tf.Tensor]]:
        """Run a batch from the frontier of a level to that of the next.

        Args:
            level: The level whose calls are observed.
            values: The tensors of the frontier of the level before.
            populations: See `CutPasses.advance`.

        Returns:
            For every call of the level its site and moments; and the tensors of its frontier.
        """
        function, sites = self._segment(level)
        outputs = function(*values, *(_population(populations, site) for site in sites))
        entered = len(outputs) - len(self._frontiers[level])
        fetched = iter(outputs[:entered])
        site_moments = [
            (call.site, call.measure(*(next(fetched) for _ in call.fetches or ())))
            for call in self._calls[level]
        ]
        return site_moments, outputs[entered:]

    def _segment(self, level: int) -> tuple[Callable[..., list[tf.Tensor]], list[Site]]:
        with self._trace.lock:
            if level not in self._segments:
                sites = {id(p): site for site, p in self._trace.populations.items()}
                fetches = [tensor for call in self._calls[level] for tensor in call.fetches or ()]

                def ran(op: tf.Operation) -> bool:
                    return self._first.get(id(op), level) < level and id(op) in self._from_data

                function, needed = self._trace.extraction.function(
                    self._frontiers[level - 1],
                    list(self._trace.populations.values()),
                    [*fetches, *self._frontiers[level]],
                    ran,
                )
                self._segments[level] = function, [sites[id(tensor)] for tensor in needed]
        return self._segments[level]

    def _find_frontiers(self, levels: int) -> None:
        operations = self._trace.graph.get_operations()  # Inputs come before their users.
        # Weights, and all that follows from them alone, are cheaper to read again than to keep.
        # A random draw may not be made again.
        from_data = {id(tensor.op) for tensor in self._trace.inputs}
        for op in operations:
            if _draws(op) or any(id(source) in from_data for source in sources(op)):
                from_data.add(id(op))
        # The first level that needs an operation; the inputs are there before any.
        first = {id(tensor.op): 0 for tensor in self._trace.inputs}
        last: dict[int, int] = {}  # By tensor the last level that reads it.
        for level in range(1, levels + 1):
            entering = [tensor for call in self._calls[level] for tensor in call.fetches or ()]
            last.update((id(tensor), level) for tensor in entering)
            pending = [tensor.op for tensor in entering]
            while pending:
                op = pending.pop()
                if id(op) not in first:
                    first[id(op)] = level
                    pending += sources(op)
        self._frontiers = [list(self._trace.inputs), *([] for _ in range(levels))]
        for op in operations:
            if id(op) in first:
                for tensor in op.inputs:
                    last[id(tensor)] = max(last.get(id(tensor), 0), first[id(op)])
                if _draws(op):
                    self.drawn = op.name
        for op in operations:
            if id(op) in first and id(op) in from_data:
                for tensor in op.outputs:
                    for level in range(max(first[id(op)], 1), last.get(id(tensor), 0)):
                        self._frontiers[level].append(tensor)
        self._first, self._from_data = first, from_data


def _draws(op: tf.Operation) -> bool:
    """Whether an operation draws random numbers of its own."""
    return op.type.startswith(_DRAWS) and op.type not in _DRAWS_NOT


def levels_of(trace: Trace) -> Levels:
    """The `Levels` of a trace, made once."""
    with trace.lock:
        if "levels" not in trace.pieces:
            trace.pieces["levels"] = Levels(trace)
        return trace.pieces["levels"]


def first_level(model: keras.Model) -> dict[str, int]:
    """Path -> number of calls of the layers of level 1, in all traces that sweeps have made.

    It is empty before the first trace, and without the layers of networks that cannot be cut.
    """
    calls: collections.Counter[str] = collections.Counter()
    above: set[str] = set()
    for trace in traces_of(model):
        levels = levels_of(trace).of_path or {}
        calls |= collections.Counter(call.site.path for call in trace.calls if call.fetches)
        above |= {call.site.path for call in trace.calls if levels.get(call.site.path) != 1}
    return {path: calls[path] for path in calls if path not in above}


def depth(trace: Trace) -> int:
    """The most observed layers on a path through a network, or how many there are in a loop."""
    if "depth" not in trace.pieces:
        levels = _levels(trace) if trace.cuttable else None
        called = {call.site.path for call in trace.calls}
        trace.pieces["depth"] = len(called) if levels is None else max([0, *levels.values()])
    return trace.pieces["depth"]


def _population(populations: Populations, site: Site) -> tf.Tensor:
    path = site.path
    if path not in populations:
        raise UnobservableError(
            "Expected the same data in every pass. Received: a batch that reaches layer "
            f"{path!r}, which no batch of an earlier pass did. Seed the pipeline, or use "
            "method='pooled'."
        )
    return populations[path]


def _levels(trace: Trace) -> dict[str, int] | None:
    """By path the level of a layer, or `None` if a layer depends on its own output."""
    before = _dependencies(trace)
    levels: dict[str, int] = {}
    if recurrent(trace):
        return None
    for path in before:
        pending = [path]
        while pending:
            missing = [other for other in before[pending[-1]] if other not in levels]
            if missing:
                pending.append(missing[0])
                continue
            done = pending.pop()
            levels[done] = 1 + max((levels[other] for other in before[done]), default=0)
    return levels


def recurrent(trace: Trace) -> frozenset[str]:
    """The paths of the layers whose calls depend on their own output: a cell at every step."""
    before = _dependencies(trace)

    def reaches_itself(path: str) -> bool:
        seen, pending = set(), list(before[path])
        while pending:
            other = pending.pop()
            if other not in seen:
                seen.add(other)
                pending += before[other]
        return path in seen

    several = {call.site.path for call in trace.calls if call.site.call}
    return frozenset(path for path in several if reaches_itself(path))


def _dependencies(trace: Trace) -> dict[str, list[str]]:
    """By path the layers whose outputs reach a call of a layer past no other layer."""
    if "dependencies" not in trace.pieces:
        trace.pieces["dependencies"] = _find_dependencies(trace)
    return trace.pieces["dependencies"]


def _find_dependencies(trace: Trace) -> dict[str, list[str]]:
    paths = list(dict.fromkeys(call.site.path for call in trace.calls))
    bit = {path: 1 << i for i, path in enumerate(paths)}
    call_at = {id(call.outputs.op): call for call in trace.calls}
    # By operation, and by path, the layers whose outputs reach it, a bit each.
    reaching: dict[int, int] = {}
    before = dict.fromkeys(paths, 0)
    for op in trace.graph.get_operations():  # Inputs come before their users.
        mask = 0
        for source in sources(op):
            mask |= reaching[id(source)]
        reaching[id(op)] = mask
        call = call_at.get(id(op))
        if call is not None:
            reaching[id(op)] = bit[call.site.path]
            if call.fetches:
                for tensor in call.inputs:
                    before[call.site.path] |= reaching[id(tensor.op)]
    return {path: [other for other in paths if mask & bit[other]] for path, mask in before.items()}
