"""Trace the network of a model, once for all sweeps of one signature.

Traces are stored per model, deleted with the model, and replaced when the layers of the model
change. A trace reads the weights in every run.
"""

import collections
import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.models.keras_models import Structure
from tfbn.sweep.batches import flatten
from tfbn.sweep.observation import Observer, UnobservableError
from tfbn.sweep.state import Site
from tfbn.sweep.trace import Trace, trace_model

# Largest number of stored traces per model: a few signatures for each of two methods.
_KEPT_TRACES = 8

_building = threading.RLock()
# Model -> (structure, traces).
_traces: "weakref.WeakKeyDictionary[keras.Model, tuple[tuple, Traces]]"
_traces = weakref.WeakKeyDictionary()


# LRU cache: signature without shapes -> its traces.
Traces = collections.OrderedDict[tuple, list[Trace]]


class Network:
    """The network of a model on one device, and its traces.

    Args:
        model: A built model. It does not change.
        layers: The layers to observe, by path.
        ignored: See `Observer`.
        device: The device, whose replica of the weights is used; `None` for TensorFlow's choice.
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
        structure = keras_models.trace_key(model)
        with _building:
            known, traces = _traces.get(model, (None, None))
            if traces is None or known != structure:  # The layers of the model have changed.
                traces = Traces()
                _traces[model] = structure, traces
        self._traces = traces

    def trace(self, inputs: Structure, *, settled: bool, static: bool = False) -> Trace:
        """Return the trace for batches like `inputs`; create it if none matches.

        Args:
            inputs: A batch, or its specs.
            settled: See `tfbn.sweep.trace.trace_model`.
            static: Whether the size of the batch is part of its signature.

        Raises:
            Exception: Any error that the model raises on such a batch.
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

    def _new_trace(
        self,
        opened: Structure,
        flat: list[tf.TensorSpec],
        traces: list[Trace],
        settled: bool,
        static: bool,
    ) -> Trace:
        # One trace for all batch sizes, and for all sizes of other dimensions that differ, unless
        # that makes Keras vectorize: TimeDistributed does for an open number of steps. One trace
        # per batch size if the model requires that size.
        specs = flatten(opened)
        attempts = [flat] if static else [specs, flat]
        if traces and not static and self._declares(specs):
            attempts.insert(0, list(map(_relaxed, specs, traces[-1].specs)))
        failure = None
        for attempt in attempts:
            try:
                with self._traced_for():
                    trace = trace_model(self.observer, opened, attempt, settled=settled)
            except UnobservableError:
                raise
            except Exception as error:
                failure = failure or error
                continue
            if not trace.vectorized:
                return trace
        raise failure or UnobservableError(
            "Cannot observe a batch norm layer called in tf.vectorized_map. Use tf.map_fn."
        )

    def _declares(self, specs: list[tf.TensorSpec]) -> bool:
        """Return whether the recorded input shapes of the model, if any, allow these specs."""
        declared = flatten(keras_models.input_specs(self.model) or [])
        pairs = zip(declared, specs, strict=False)  # Many subclassed models record none.
        return all(
            a.shape.rank != b.shape.rank or a.shape.is_compatible_with(b.shape) for a, b in pairs
        )

    @contextlib.contextmanager
    def _traced_for(self) -> Iterator[None]:
        with contextlib.ExitStack() as scope:
            if self._device is not None:
                # A mirrored variable is read on that device only within the scope of its strategy.
                scope.enter_context(self.model.distribute_strategy.scope())
                scope.enter_context(tf.device(self._device))
            yield


def traces_of(model: keras.Model) -> list[Trace]:
    """Return the traces of a model's sweeps that still match its layers."""
    with _building:
        known, traces = _traces.get(model, (None, None))
        if traces is None or known != keras_models.trace_key(model):
            return []
        return [trace for of_key in traces.values() for trace in of_key]


def first_level(model: keras.Model) -> dict[str, int]:
    """Return path -> number of calls of the layers of level 1, in all traces of sweeps.

    Returns an empty dict before the first trace. Skips networks that cannot be cut.
    """
    counts: collections.Counter[str] = collections.Counter()
    above: set[str] = set()
    for trace in traces_of(model):
        levels = trace.facts.levels or {}
        counts |= collections.Counter(call.path for call in trace.calls if call.fetches)
        above |= {call.path for call in trace.calls if levels.get(call.path) != 1}
    return {path: counts[path] for path in counts if path not in above}


def devices(model: keras.Model) -> list[str | None]:
    """Return the devices of this process that hold a replica of a model.

    Returns `[None]`, TensorFlow's choice, without a mirrored strategy.
    """
    mirrored = tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy
    strategy = model.distribute_strategy
    if model.run_eagerly or not isinstance(strategy, mirrored):
        return [None]
    return list(strategy.extended.worker_devices)


def _open(value: Any) -> tf.TypeSpec:
    """Return the spec of a batch's leaf, with a batch axis of any size."""
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
