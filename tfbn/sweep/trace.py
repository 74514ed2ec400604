"""Trace an observed model: its graph, facts, and parts of the graph as functions."""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfbn.graphs import levels as cuts
from tfbn.graphs import walks
from tfbn.graphs.levels import Cut
from tfbn.graphs.subgraphs import Subgraphs
from tfbn.models.keras_models import Structure
from tfbn.sweep.observation import Call, Observer, Run, UnobservableError
from tfbn.sweep.state import NetworkFacts, Site

# (call, moments of its input).
SiteMoments = tuple[Site, list[tf.Tensor]]

_HARMLESS = {"Placeholder", "ReadVariableOp", "VarHandleOp"}


class Part(NamedTuple):
    """A part of the network as a function.

    Attributes:
        function: Function from values, and the populations of `sites`, to the fetches of `calls`,
            the tensors of the frontier, and more.
        sites: Sites of the population arguments.
        calls: The observed calls.
        outputs: Number of outputs of the function up to its frontier.
    """

    function: Callable[..., list[tf.Tensor]]
    sites: list[Site]
    calls: list[Call]
    outputs: int

    def run(
        self, values: Sequence[tf.Tensor], populations: Callable[[Site], tf.Tensor]
    ) -> tuple[list[SiteMoments], list[tf.Tensor]]:
        """Return the moments of each call, and the tensors of the frontier."""
        outputs = iter(self.function(*values, *map(populations, self.sites))[: self.outputs])
        observed = [
            (call.site, call.measure(*itertools.islice(outputs, len(call.fetches or ()))))
            for call in self.calls
        ]
        return observed, list(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One trace of an observed model, for batches of one signature.

    Attributes:
        specs: The specs of the dense tensors of a batch, which may leave dimensions open.
        function: The function from `inputs` to `measured`, and more.
        inputs: The placeholders of the batch's dense tensors, and of its number.
        measured: The tensors that the moments of a batch require: the fetches of all calls, and
            the model's outputs if calls are in loops or branches.
        populations: Site -> the placeholder of the population that the call normalizes with.
        calls: The calls of observed layers in their order.
        by_batch: See `tfbn.sweep.observation.Run`.
        random: Whether the network draws random numbers.
        lock: Locked while parts are built, and while a graph with calls in loops runs.
    """

    specs: list[tf.TensorSpec]
    function: Any
    inputs: list[tf.Tensor]
    measured: list[tf.Tensor]
    populations: dict[Site, tf.Tensor]
    calls: list[Call]
    by_batch: frozenset[str]
    random: bool
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _segments: dict[int, Part] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> tf.Graph:
        """The graph."""
        return self.function.graph

    @property
    def cuttable(self) -> bool:
        """Whether all calls are outside of loops and branches."""
        return all(call.fetches is not None for call in self.calls)

    @property
    def vectorized(self) -> bool:
        """Whether `tf.vectorized_map` vectorizes a function around a call."""
        return walks.is_vectorized([tensor for call in self.calls for tensor in call.inputs])

    @functools.cached_property
    def facts(self) -> NetworkFacts:
        """The facts about the network."""
        before = cuts.dependencies(self._sources, self.calls)
        recurrent = cuts.recurrent(before, self.calls)
        looping = [
            call.path for call in self.calls if walks.feeds_itself(call.inputs, call.outputs)
        ]
        return NetworkFacts(
            levels=cuts.levels(before) if self.cuttable and not recurrent else None,
            recurrent=recurrent,
            looping=frozenset(looping),
            random=self.random,
            by_batch=self.by_batch,
            # A batch norm layer does not show every NaN: pooling and fused kernels hide some.
            not_nan=walks.spreading_nan(self.inputs, self.measured),
        )

    @functools.cached_property
    def cut(self) -> Cut:
        """The graph cut at its levels, if any."""
        return cuts.cut(self._sources, self.inputs, self.calls, self.facts.levels or {})

    def segment(self, level: int) -> Part:
        """Build the part from the frontier of the level before to the calls of a level."""
        with self.lock:
            if level not in self._segments:
                cut, levels = self.cut, self.facts.levels or {}
                calls = [c for c in self.calls if c.fetches and levels[c.path] == level]
                self._segments[level] = self._part(
                    cut.frontiers[level - 1],
                    [*cut.fetches[level], *cut.frontiers[level]],
                    calls,
                    lambda op: cut.run_at.get(op, level) < level,
                )
            return self._segments[level]

    @functools.cached_property
    def whole(self) -> Part:
        """The whole network, from a batch to all calls."""
        with self.lock:
            # A function runs all operations with side effects in its graph, used or not.
            if not self.populations and not self._has_effects:
                return Part(self.function, [], self.calls, len(self.measured))
            return self._part(self.inputs, self.measured, self.calls)

    def _part(
        self,
        feeds: list[tf.Tensor],
        fetches: list[tf.Tensor],
        calls: list[Call],
        already_run: Callable[[tf.Operation], bool] = lambda op: False,
    ) -> Part:
        populations = list(self.populations.values())
        function, needed = self._subgraphs.function(feeds, populations, fetches, already_run)
        site_of = {id(placeholder): site for site, placeholder in self.populations.items()}
        sites = [site_of[id(placeholder)] for placeholder in needed]
        return Part(function, sites, calls, len(fetches))

    @functools.cached_property
    def _sources(self) -> walks.Sources:
        return walks.sources_of(self.graph)

    @functools.cached_property
    def _subgraphs(self) -> Subgraphs:
        return Subgraphs(self.graph, {inner.name: outer for outer, inner in self.graph.captures})

    @property
    def _has_effects(self) -> bool:
        operations = self.graph.get_operations()
        return any(op.op_def.is_stateful and op.type not in _HARMLESS for op in operations)


def trace_model(
    observer: Observer, structure: Structure, specs: list[tf.TensorSpec], *, settled: bool
) -> Trace:
    """Trace an observed model.

    Args:
        observer: The `Observer` of the model.
        structure: A structure of `tf.TypeSpec`, as the model takes it.
        specs: The specs of the dense tensors in it.
        settled: Whether every layer normalizes with a population argument of the graph; otherwise
            with the moments of the batch, as in training.

    Raises:
        UnobservableError: If the inference on one batch depends on the batch before.
    """
    populations: dict[Site, tf.Tensor] = {}
    runs: list[tuple[Run, list[tf.Tensor]]] = []

    def run(*flat: tf.Tensor) -> list[tf.Tensor]:
        *tensors, number = flat
        graph = tf.compat.v1.get_default_graph()

        def population(site: Site, channels: int) -> list[tf.Tensor] | None:
            if not settled:
                return None
            with graph.as_default():  # Outside of a loop around the call.
                placeholder = tf.compat.v1.placeholder(tf.float64, [2, channels])
            populations[site] = placeholder
            return tf.unstack(placeholder)

        inputs = tf.nest.pack_sequence_as(structure, tensors, expand_composites=True)
        made = observer.run(inputs, number, population)
        measured = [tensor for call in made.calls for tensor in call.fetches or ()]
        if any(call.fetches is None for call in made.calls):
            leaves = tf.nest.flatten(made.outputs, expand_composites=True)
            measured += [leaf for leaf in leaves if tf.is_tensor(leaf)]
        runs.append((made, measured))
        # Tensors without values that are fetched, so that no kernel hides NaN.
        guards = [] if settled else walks.hiding_nan(graph.get_operations())
        return [*measured, *(tensor[:0] for tensor in guards)]

    # A wrapped function has no automatic control dependencies, which would make calls depend on all
    # side effects in the model.
    function = tf.compat.v1.wrap_function(run, [*specs, tf.TensorSpec([], tf.int64)])
    [(made, measured)] = runs
    inputs = function.inputs[: len(specs) + 1]
    _refuse_state(function.graph, inputs[:-1], measured, observer, made.updates)
    return Trace(
        specs, function, inputs, measured, populations, made.calls, made.by_batch, made.draws > 0
    )


def _refuse_state(
    graph: tf.Graph,
    data: list[tf.Tensor],
    measured: list[tf.Tensor],
    observer: Observer,
    updates: Mapping[int, tf.Tensor],
) -> None:
    """Raise `UnobservableError` if values that are measured depend on what the sweep changes.

    That is a variable which carries data from one batch to the next, for a sweep takes batches in
    any order and each several times; or a statistic that is read past its layer, where the sweep
    cannot replace it.
    """
    fed = {tensor.op for tensor in data}
    read = set(walks.ancestors(measured))
    handles = {id(captured) for captured, inner in graph.captures if inner.op in read}
    for handle, statistic in observer.statistics().items():
        if handle in handles:
            raise UnobservableError(
                "Expected only the batch norm layer to read its statistics. Received: "
                f"{statistic}, read by others. Set trainable=False for that layer."
            )

    def carries(values: Sequence[tf.Tensor]) -> bool:
        return not fed.isdisjoint(walks.ancestors(values))

    for variable, value in updates.items():
        if handles & observer.handles(variable) and carries([value]):
            raise UnobservableError(
                "Expected inference that does not depend on the batch before. Received: layer "
                f"{observer.owner(variable)!r}, which keeps a state. Sweep a copy with "
                "stateful=False."
            )
    for op in graph.get_operations():
        writes = op.type.startswith(("Assign", "ResourceScatter")) and op.inputs
        if writes and op.inputs[0].op in read and carries(op.inputs[1:]):
            raise UnobservableError(
                "Expected inference that does not depend on the batch before. Received: operation "
                f"{op.name!r} ({op.type}), which writes data into a variable. Disable it."
            )
