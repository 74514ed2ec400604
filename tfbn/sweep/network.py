"""An observed model as functions of a batch, level by level."""

import contextlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn import moments
from tfbn.sweep.observe import Observation
from tfbn.sweep.trace import Trace


class Frontier(NamedTuple):
    """How far a batch has come: what later levels need of it. Level 0 is the raw batch."""

    trace: Trace | None
    level: int
    values: list


class Network:
    """The inference network of a model with some of its batch norm layers observed.

    It holds no statistics: what has been found of lower levels goes in, and what enters the
    calls of the next level comes out. A one-pass method has one level. `"exact"` has one for
    every batch norm layer on the longest path. Where the network cannot be cut there (a model
    that runs eagerly, or that calls a batch norm layer in the body of a loop or branch), every
    level is a run of all of it, and how many there are is not known before the first of
    them: one that normalises as in training, to give the others something sound to hold, and
    one for every call, after which the calls up to that depth have settled.

    Args:
        model: A built model. Nothing in it is changed.
        layers: The layers to observe, by path.
        method: How moments accumulate, see `tfbn.moments`.
        device: The device to run on, whose replica of the weights is used; TensorFlow's choice
            if `None`.

    Methods that take a `name` call the batch so in what they raise: `ValueError` if the
    model cannot run on the batch, or if what enters a layer is not finite.
    """

    def __init__(self, model, layers, method, device=None):
        self._model = model
        self._method = method
        self._device = device
        self._observation = Observation(model, layers)
        self._met = {}  # Every site met so far, in order.
        self._traces = {False: [], True: []}
        self._vectorizes = False

    @property
    def levels(self):
        """How many levels there are, as far as the batches so far tell; 0 before the first."""
        if self._method != "exact":
            return 1
        traces = self._traces[True]
        if self._model.run_eagerly or any(trace.levels is None for trace in traces):
            return 1 + len(self._met)
        return max((trace.levels for trace in traces), default=0)

    @property
    def depth(self):
        """The most observed calls on a path, or a bound where that is not known."""
        levels = [trace.levels for traces in self._traces.values() for trace in traces]
        return len(self._met) if not levels or None in levels else max(levels)

    def settle(self, found):
        """The populations for `advance`, from the `tfbn.population.latest` moments of each site."""
        with self._placed():
            return {
                site: tf.constant(np.stack([population.mean, moments.variance(population)]))
                for site, (_, population) in found.items()
            }

    def enter(self, name, inputs, level):
        """The frontier from which `advance` takes a batch to a level.

        Specs of a batch do as well where only `levels` is wanted.
        """
        if self._model.run_eagerly:
            return Frontier(None, 0, inputs)
        with self._traced_for(), _says_which(self._model, name, inputs):
            trace = self._trace(inputs, settled=self._method == "exact")
            if trace.levels is None and level == 1:
                trace = self._trace(inputs, settled=False)
        return Frontier(trace, 0, inputs)

    def advance(self, name, frontier, level, populations, *, keep):
        """Take a batch to a level.

        Args:
            name: What to call the batch.
            frontier: From `enter`, or from `advance` to an earlier level.
            level: Number of the level, from 1.
            populations: What `settle` made of all earlier levels; empty for level 1.
            keep: Whether the frontier at this level is wanted.

        Returns:
            For every call of the level its site and the moments of what entered; and the
            frontier, or `None` if it is not kept.
        """
        trace, start, values = frontier
        kept = None
        with self._placed():
            with _says_which(self._model, name, values):
                if trace is None:
                    found = self._run_eagerly(values, populations)
                elif self._method != "exact" or trace.levels is None:
                    found = trace.run(values, populations)
                elif level > trace.levels:  # Its signature makes for fewer calls than another's.
                    return [], frontier if keep else None
                else:
                    keep = keep and trace.can_keep(level)
                    found, kept = trace.part(level, start, values, populations, keep)
            checked = [
                (site, self._moments(name, values, site, part))
                for site, parts in found
                for part in parts
            ]
        if kept is None or not keep:
            return checked, None
        with tf.device("CPU"):  # Main memory has more room than an accelerator.
            return checked, Frontier(trace, level, [tf.identity(value) for value in kept])

    def _run_eagerly(self, inputs, populations):
        met = []
        self._observation.run(
            inputs,
            population=None if not populations else lambda site, _: populations[site],
            met=met,
        )
        self._met |= dict.fromkeys(call.site for call in met)
        return [(call.site, call.measure(*(call.fetches or ()))) for call in met]

    def _trace(self, inputs, settled):
        flat = [tf.TensorSpec(v.shape, v.dtype) for v in _flatten(inputs)]
        traces = self._traces[settled]
        for trace in traces:
            if all(map(tf.TensorSpec.is_compatible_with, trace.specs, flat)):
                return trace
        # One trace for all batch sizes, and when other dimensions turn out to differ, one
        # for all of these, unless that makes Keras vectorize: TimeDistributed does, where the
        # number of steps is open.
        structure = tf.nest.map_structure(_type_spec, inputs)
        specs = [tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) for spec in flat]
        attempts = [specs]
        if traces and not self._vectorizes:
            pairs = zip(specs, traces[-1].specs, strict=True)
            attempts.insert(0, [_relaxed(*pair) for pair in pairs])
        for attempt in attempts:
            trace = Trace(self._observation, structure, attempt, settled=settled)
            if not trace.vectorized:
                break
            self._vectorizes = True
        else:
            raise ValueError(
                "a batch norm layer that is called in tf.vectorized_map cannot be observed"
            )
        traces.append(trace)
        self._met |= dict.fromkeys(trace.sites)
        return trace

    def _traced_for(self):
        scope = contextlib.ExitStack()
        if self._device is not None:
            # Only within the scope of its strategy is a mirrored variable read on that device.
            scope.enter_context(self._model.distribute_strategy.scope())
            scope.enter_context(tf.device(self._device))
        return scope

    def _placed(self):
        return contextlib.nullcontext() if self._device is None else tf.device(self._device)

    def _moments(self, name, inputs, site, part):
        count, mean, variance = map(np.asarray, part)
        found = moments.of_batch(count, mean, variance, method=self._method)
        finite = moments.finite(found)
        if finite.all():
            return found
        if self._method == "algorithm2" and np.isfinite(variance).all() and count.min() == 1:
            raise ValueError(
                "Expected at least two values per channel in every batch, because "
                "method='algorithm2' divides by m - 1. Received: m = 1 for layer "
                f"{site.path!r}, in {name}. Use another batch size, or method='pooled'."
            )
        channel = int(np.argmin(finite))
        raise ValueError(
            f"Expected finite values to enter layer {site.path!r}. Received: in {name}, channel "
            f"{channel}, values with mean {mean[channel]} and variance {variance[channel]}; "
            f"{_reason(inputs)}"
        )


def _reason(inputs):
    finite = (tf.reduce_all(tf.math.is_finite(v)) for v in _flatten(inputs) if v.dtype.is_floating)
    if all(finite):
        return (
            "what was put into the network is finite, so the values overflow inside it. Look at "
            "its weights and dtypes."
        )
    return "what was put into the network holds NaN or Inf. Clean the data."


def _flatten(structure):
    return tf.nest.flatten(structure, expand_composites=True)


def _type_spec(value):
    return value if isinstance(value, tf.TypeSpec) else tf.type_spec_from_value(value)


def _relaxed(a, b):
    if a.shape.rank != b.shape.rank:
        return a
    pairs = zip(a.shape, b.shape, strict=True)
    return tf.TensorSpec([m if m == n else None for m, n in pairs], a.dtype)


@contextlib.contextmanager
def _says_which(model, name, inputs):
    try:
        yield
    except Exception as error:
        shapes = keras.tree.map_structure(lambda value: f"{value.dtype.name}{value.shape}", inputs)
        raise ValueError(
            f"Expected batches that model {model.name!r} takes. Received: {name} with inputs "
            f"{shapes}, on which it raised {type(error).__name__}: {error}"
        ) from error
