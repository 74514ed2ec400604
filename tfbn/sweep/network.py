"""The inference network of a model, traced once for all sweeps of one signature.

A trace belongs to its model: it dies with it, and is made anew when the model's layers change.
Weights are read whenever it runs.
"""

import collections
import contextlib
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn.graphs.subgraphs import Extraction, ancestors, kept_apart
from tfbn.models import keras_models
from tfbn.models.keras_models import Structure
from tfbn.sweep.observation import Call, Observer, UnobservableError
from tfbn.sweep.state import Site

# Traces that a model keeps: a few signatures for each of two methods.
_KEPT_TRACES = 8

_LOOKS_FOR_NAN = {"IsNan", "IsInf", "IsFinite", "MulNoNan"}
# Ops that never propagate NaN.
_WITHOUT_NAN = {"Bucketize", "Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
# Ops that may leave NaN out, because they choose among the values of their data. (`boolean_mask`
# gathers.) The values that enter layers are checked in any case.
_WITHOUT_NAN |= {"Select", "SelectV2", "Where"}
_CHOOSING = {"Gather", "GatherV2", "GatherNd", "Slice", "StridedSlice", "DynamicPartition"}
_CHOOSING |= {"Split", "SplitV", "Unpack"}

_HARMLESS = {"Placeholder", "ReadVariableOp", "VarHandleOp"}

_building = threading.RLock()
# By model: its structure, and traces by key.
_traces: "weakref.WeakKeyDictionary[keras.Model, tuple[tuple, Traces]]"
_traces = weakref.WeakKeyDictionary()


class Trace:
    """One trace of an observed model, for batches of one signature.

    Args:
        observer: The `Observer` of the model.
        structure: A structure of `tf.TypeSpec`, as the model takes it.
        settled: Whether every layer normalises with the population that it is given when the
            graph runs, or else with the moments of the batch, as in training.

    Attributes:
        specs: The specs of the dense tensors of a batch, which may leave dimensions open.
        graph: The `tf.Graph`.
        inputs: The placeholders of the batch's dense tensors, and that of its number.
        measured: The tensors that the moments of a batch follow from: the fetches of all calls,
            and the model's outputs where calls are in loops or branches.
        function: The function from `inputs` to `measured`, and more.
        populations: By site the placeholder of the population that it normalises with.
        calls: The calls of observed layers in their order.
        by_batch: See `tfbn.sweep.observation.Run`.
        random: Whether the network draws random numbers.
        lock: To be held while `pieces` changes, and while the graph runs with calls in loops.
        pieces: Objects that passes make of the graph once, by the name of their kind.

    Raises:
        UnobservableError: If the inference on one batch depends on the batch before.
    """

    def __init__(
        self, observer: Observer, structure: Structure, specs: list[tf.TensorSpec], *, settled: bool
    ):
        self.specs = specs
        self.populations: dict[Site, tf.Tensor] = {}
        self.lock = threading.Lock()
        self.pieces: dict[str, Any] = {}
        self.calls: list[Call] = []
        updates: dict[int, tf.Tensor] = {}

        def run(*flat: tf.Tensor) -> list[tf.Tensor]:
            *tensors, number = flat
            graph = tf.compat.v1.get_default_graph()

            def population(site: Site, channels: int) -> list[tf.Tensor] | None:
                if not settled:
                    return None
                with graph.as_default():  # Not in the body of a loop around the call.
                    placeholder = tf.compat.v1.placeholder(tf.float64, [2, channels])
                self.populations[site] = placeholder
                return tf.unstack(placeholder)

            inputs = tf.nest.pack_sequence_as(structure, tensors, expand_composites=True)
            outputs, self.calls, self.by_batch, draws, updated = observer.run(
                inputs, number, population
            )
            self.random = draws > 0
            updates.update(updated)
            self.measured = [tensor for call in self.calls for tensor in call.fetches or ()]
            if not self.cuttable:
                leaves = tf.nest.flatten(outputs, expand_composites=True)
                self.measured += [leaf for leaf in leaves if tf.is_tensor(leaf)]
            guards = [] if settled else kept_apart(graph.get_operations())
            return [*self.measured, *guards]

        # A wrapped function has no automatic control dependencies, which would tie the calls to
        # everything else in the model that has an effect.
        self.function = tf.compat.v1.wrap_function(run, [*specs, tf.TensorSpec([], tf.int64)])
        self.graph = self.function.graph
        self.inputs = self.function.inputs[: len(specs) + 1]
        _refuse_state(self, observer, updates)

    @functools.cached_property
    def extraction(self) -> Extraction:
        """The functions that can be taken out of the graph."""
        return Extraction(self.graph)

    @property
    def has_effects(self) -> bool:
        """Whether the graph has operations that change anything, which a function would run."""
        return any(
            op.op_def.is_stateful and op.type not in _HARMLESS for op in self.graph.get_operations()
        )

    @property
    def cuttable(self) -> bool:
        """Whether no call is in the body of a loop or branch."""
        return all(call.fetches is not None for call in self.calls)

    @functools.cached_property
    def not_nan(self) -> list[int]:
        """The places of those inputs among `inputs` in which NaN would be an error.

        A batch norm layer does not show every NaN: pooling and fused kernels hide some. A
        network that looks for NaN by itself may take it.
        """
        if any(map(_looks_for_nan, ancestors(self.measured))):
            return []
        read = _carrying_nan(self.measured)
        return [
            place
            for place, tensor in enumerate(self.inputs)
            if tensor.dtype.is_floating and id(tensor) in read
        ]

    @property
    def vectorized(self) -> bool:
        """Whether `tf.vectorized_map` vectorizes a function around a call.

        Such a function is traced for one of its elements, the first, whose number is the default
        of a placeholder. Only this one would be seen.
        """
        entered = [tensor for call in self.calls for tensor in call.inputs]
        return any(op.type == "PlaceholderWithDefault" for op in ancestors(entered))


def _looks_for_nan(op: tf.Operation) -> bool:
    unequal_to_itself = op.type in ("Equal", "NotEqual") and op.inputs[0] is op.inputs[1]
    return op.type in _LOOKS_FOR_NAN or unequal_to_itself


def _carrying_nan(tensors: Iterable[tf.Tensor]) -> set[int]:
    """The ids of the tensors whose NaN reaches others: not through a comparison or a choice."""
    seen, pending = set(), list(tensors)
    while pending:
        tensor = pending.pop()
        if id(tensor) not in seen and tensor.dtype != tf.bool:
            seen.add(id(tensor))
            if tensor.op.type in _CHOOSING:
                pending += [source for source in tensor.op.inputs if not source.dtype.is_floating]
            elif tensor.op.type not in _WITHOUT_NAN:
                pending += tensor.op.inputs
    return seen


def _refuse_state(trace: Trace, observer: Observer, updates: Mapping[int, tf.Tensor]) -> None:
    """Raise `UnobservableError` if values that are measured depend on what the sweep changes.

    That is a variable which carries data from one batch to the next, for a sweep takes batches in
    any order and each several times; or a statistic that is read past its layer, where the sweep
    does not know of it.
    """
    data = {id(tensor.op) for tensor in trace.inputs[:-1]}
    read = set(map(id, ancestors(trace.measured)))
    outer = {id(inner.op): id(captured) for captured, inner in trace.graph.captures}
    handles = {outer[key] for key in read if key in outer}
    for handle, statistic in observer.statistics().items():
        if handle in handles:
            raise UnobservableError(
                "Expected a network in which no layer but a batch norm layer itself reads its "
                f"statistics. Received: {statistic}, on which values depend that enter batch norm "
                "layers. Set trainable=False for that layer, to sweep the others with the "
                "statistics that it holds."
            )

    def carries(values: Iterable[tf.Tensor]) -> bool:
        return any(id(op) in data for op in ancestors(values))

    for variable, value in updates.items():
        if handles & observer.handles(variable) and carries([value]):
            raise UnobservableError(
                "Expected a network whose inference on one batch does not depend on the batch "
                f"before. Received: layer {observer.owner(variable)!r}, which keeps a state that "
                "batch norm layers depend on. Sweep a copy of the model with stateful=False."
            )
    for op in trace.graph.get_operations():
        writes = op.type.startswith(("Assign", "ResourceScatter")) and op.inputs
        if writes and id(op.inputs[0].op) in read and carries(op.inputs[1:]):
            raise UnobservableError(
                "Expected a network whose inference on one batch does not depend on the batch "
                f"before. Received: operation {op.name!r} ({op.type}), which writes data into a "
                "variable that batch norm layers depend on. Leave it out in inference."
            )


# By key those of one signature but for its shapes; the latest used last.
Traces = collections.OrderedDict[tuple, list[Trace]]


class Network:
    """A model as its sweeps see it, on one device.

    Args:
        model: A built model. Nothing in it is changed.
        layers: The layers to observe, by path.
        ignored: See `Observer`.
        device: The device to run on, whose replica of the weights is used; TensorFlow's choice
            if `None`.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Mapping[str, keras.Layer],
        ignored: frozenset[Site] = frozenset(),
        device: str | None = None,
    ):
        self.model = model
        self.observer = Observer(model, layers, ignored)
        self._key = tuple(layers), ignored, device
        self._device = device
        structure = keras_models.structure(model)
        with _building:
            known, traces = _traces.get(model, (None, None))
            if traces is None or known != structure:  # The model's layers have changed since.
                traces = Traces()
                _traces[model] = structure, traces
        self._traces = traces

    def trace(self, inputs: Structure, *, settled: bool, static: bool = False) -> Trace:
        """The trace for batches like `inputs`, made if there is none that fits.

        Args:
            inputs: A batch, or specs of one.
            settled: See `Trace`.
            static: Whether the size of the batch is part of its signature.

        Raises:
            Exception: Whatever the model raises on such a batch.
        """
        opened = tf.nest.map_structure(_open, inputs)
        flat = [tf.TensorSpec(value.shape, value.dtype) for value in flatten(inputs)]
        with _building:
            key = (*self._key, settled, repr(tf.nest.map_structure(_kind, inputs)))
            traces = self._traces.setdefault(key, [])
            self._traces.move_to_end(key)
            for trace in traces:
                if all(map(tf.TensorSpec.is_compatible_with, trace.specs, flat)):
                    return trace
            traces.append(self._new_trace(opened, flat, traces, settled, static))
            del traces[:-_KEPT_TRACES]
            while len(self._traces) > _KEPT_TRACES:
                self._traces.popitem(last=False)
            return traces[-1]

    def placed(self) -> contextlib.AbstractContextManager:
        """A scope in which operations run on the network's device."""
        return contextlib.nullcontext() if self._device is None else tf.device(self._device)

    def _new_trace(
        self,
        opened: Structure,
        flat: list[tf.TensorSpec],
        traces: list[Trace],
        settled: bool,
        static: bool,
    ) -> Trace:
        # One trace for all batch sizes, and where other dimensions turn out to differ, one for
        # all of these, unless that makes Keras vectorize: TimeDistributed does, where the number
        # of steps is open. Where the model wants the size of the batch, one for each size.
        specs = flatten(opened)
        attempts = [flat] if static else [specs, flat]
        if traces and not static and self._declares(specs):
            attempts.insert(0, list(map(_relaxed, specs, traces[-1].specs)))
        failure = None
        for attempt in attempts:
            try:
                with self._traced_for():
                    trace = Trace(self.observer, opened, attempt, settled=settled)
            except UnobservableError:
                raise
            except Exception as error:
                failure = failure or error
                continue
            if not trace.vectorized:
                return trace
        raise failure or UnobservableError(
            "Expected batch norm layers whose every call can be observed. Received: a batch norm "
            "layer that is called in tf.vectorized_map. Use tf.map_fn there."
        )

    def _declares(self, specs: list[tf.TensorSpec]) -> bool:
        """Whether the model's recorded input shapes, as far as they are known, allow these."""
        declared = flatten(keras_models.input_specs(self.model) or [])
        pairs = zip(declared, specs, strict=False)  # None are recorded of many a subclass.
        return all(
            a.shape.rank != b.shape.rank or a.shape.is_compatible_with(b.shape) for a, b in pairs
        )

    @contextlib.contextmanager
    def _traced_for(self) -> Iterator[None]:
        with contextlib.ExitStack() as scope:
            if self._device is not None:
                # Only within the scope of its strategy is a mirrored variable read on that device.
                scope.enter_context(self.model.distribute_strategy.scope())
                scope.enter_context(tf.device(self._device))
            yield


def traces_of(model: keras.Model) -> list[Trace]:
    """The traces that sweeps of a model have made, and that still fit its layers."""
    with _building:
        known, traces = _traces.get(model, (None, None))
        if traces is None or known != keras_models.structure(model):
            return []
        return [trace for of_key in traces.values() for trace in of_key]


def flatten(structure: Structure) -> list:
    """The dense tensors, or their specs, of a structure that may have ragged and sparse ones."""
    return tf.nest.flatten(structure, expand_composites=True)


def _open(value: Any) -> tf.TypeSpec:
    """The type of a batch's leaf, with a batch axis of any size."""
    spec = value if isinstance(value, tf.TypeSpec) else tf.type_spec_from_value(value)
    if not spec.shape.rank:
        return tf.TensorSpec([], spec.dtype)
    shape = [None, *spec.shape[1:]]
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    return tf.TensorSpec(shape, spec.dtype)


def _kind(value: Any) -> tuple[str, str]:
    spec = _open(value)
    return type(spec).__name__, spec.dtype.name


def _relaxed(a: tf.TensorSpec, b: tf.TensorSpec) -> tf.TensorSpec:
    if a.shape.rank != b.shape.rank:
        return a
    pairs = zip(a.shape, b.shape, strict=True)
    return tf.TensorSpec([m if m == n else None for m, n in pairs], a.dtype)
