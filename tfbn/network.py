"""An observed model as functions of a batch, whole or level by level."""

import contextlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn import moments
from tfbn.observe import Observation
from tfbn.trace import Trace


class Frontier(NamedTuple):
    """How far a batch has come: what later levels need of it. Level 0 is the raw batch."""

    trace: Trace
    level: int
    values: list


class Network:
    """The inference network of a model with some of its batch norm layers observed.

    Args:
        model: A built model. Nothing in it is changed.
        layers: The layers to observe, by path.
        method: How moments accumulate, see `tfbn.moments`.

    Methods that take an `index` number the batch in what they raise: `ValueError` if the
    model cannot run on the batch, or if what enters a layer is not finite.
    """

    def __init__(self, model, layers, method):
        self._model = model
        self._layers = layers
        self._method = method
        self._observation = Observation(model, layers, method)
        self._traces = {}

    @property
    def sites(self):
        """Every call of an observed layer, in order; known after the first batch."""
        return self._observation.sites

    @property
    def depth(self):
        """The most observed calls on a path, or a bound where that is not known."""
        levels = [trace.levels for traces in self._traces.values() for trace in traces]
        return len(self.sites) if not levels or None in levels else max(levels)

    def run(self, index, inputs, *, settled):
        """Run all of the network on a batch. For `settled` see `Observation.run`."""
        with _says_which(self._model, index, inputs):
            if self._model.run_eagerly:
                met = []
                self._observation.run(inputs, settled=settled, met=met)
                found = [(call.site, call.measure(*(call.fetches or ()))) for call in met]
            else:
                found = self._trace(inputs, settled).run(inputs)
        self._add(index, inputs, found)

    def enter(self, index, inputs):
        """The frontier from which `advance` takes a batch through the levels.

        Returns:
            `None` if the network cannot be run level by level: a model that runs eagerly,
            or one that calls a batch norm layer in the body of a loop or branch.
        """
        if self._model.run_eagerly:
            return None
        with _says_which(self._model, index, inputs):
            trace = self._trace(inputs, settled=True)
        return None if trace.levels is None else Frontier(trace, 0, inputs)

    def advance(self, index, frontier, level, *, keep):
        """Take a batch to a level, whose sites add what enters them.

        Returns:
            The batch's frontier at this level, or `None` if it is not kept.
        """
        trace, start, values = frontier
        if level > trace.levels:  # Its signature makes for fewer calls than another's.
            return frontier if keep else None
        keep = keep and trace.can_keep(level)
        with _says_which(self._model, index, values):
            found, values = trace.part(level, start, values, keep)
        self._add(index, frontier.values, found)
        if not keep:
            return None
        with tf.device("CPU"):  # Main memory has more room than an accelerator.
            return Frontier(trace, level, [tf.identity(value) for value in values])

    def settle(self, level=None):
        """Make what entered the calls of a level, or all calls, the population there."""
        sites = self.sites
        if level is not None:
            sites = {s for trace in self._traces[True] for s in trace.sites(level)}
        for site in sites:
            site.settle()

    def reset(self):
        """Forget what entered, but not what has settled."""
        for site in self.sites:
            site.reset()

    def result(self):
        """The moments of everything that entered each layer, by path.

        Raises:
            ValueError: If a layer was never called, or called without any value.
        """
        found = dict.fromkeys(self._layers)
        for site in self.sites:
            result = site.moments
            if found[site.path] is not None:
                result = moments.merge(found[site.path], result, method=self._method)
            found[site.path] = result
        for path, result in found.items():
            if result is None:
                raise ValueError(
                    f"Expected {self._model.name!r} to call its batch norm layer {path!r}. "
                    "Received: a model that does not call it for inference, or whose subclass of "
                    "BatchNormalization does not call super().call(). Remove the layer, or set "
                    "its trainable=False to leave it out."
                )
            if not np.any(result.count > 0):
                raise ValueError(
                    f"Expected values for layer {path!r}. Received: none, or only masked ones. "
                    "Look at the data and its masks."
                )
        return found

    def _trace(self, inputs, settled):
        flat = [tf.TensorSpec(v.shape, v.dtype) for v in _flatten(inputs)]
        traces = self._traces.setdefault(settled, [])
        for trace in traces:
            if all(map(tf.TensorSpec.is_compatible_with, trace.specs, flat)):
                return trace
        # One trace for all batch sizes, and when other dimensions turn out to differ, one
        # for all of these.
        specs = [tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) for spec in flat]
        if traces:
            specs = [_relaxed(*pair) for pair in zip(specs, traces[-1].specs, strict=True)]
        structure = tf.nest.map_structure(tf.type_spec_from_value, inputs)
        traces.append(Trace(self._observation, structure, specs, settled=settled))
        return traces[-1]

    def _add(self, index, inputs, found):
        for site, batch in found:
            count, mean, variance = map(np.asarray, batch)
            finite = site.add(count, mean, variance)
            if finite.all():
                continue
            if self._method == "algorithm2" and np.isfinite(variance).all() and count.min() == 1:
                raise ValueError(
                    "Expected at least two values per channel in every batch, because "
                    "method='algorithm2' divides by m - 1. Received: a batch with m = 1 for layer "
                    f"{site.path!r}, in batch {index} (counting from 0). Use another batch size, "
                    "or method='pooled'."
                )
            channel = int(np.argmin(finite))
            raise ValueError(
                f"Expected finite values to enter layer {site.path!r}. Received: in batch {index} "
                f"(counting from 0), channel {channel}, values with mean {mean[channel]} and "
                f"variance {variance[channel]}; {_reason(inputs)}"
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


def _relaxed(a, b):
    if a.shape.rank != b.shape.rank:
        return a
    pairs = zip(a.shape, b.shape, strict=True)
    return tf.TensorSpec([m if m == n else None for m, n in pairs], a.dtype)


@contextlib.contextmanager
def _says_which(model, index, inputs):
    try:
        yield
    except Exception as error:
        shapes = keras.tree.map_structure(lambda value: f"{value.dtype.name}{value.shape}", inputs)
        raise ValueError(
            f"Expected batches that model {model.name!r} takes. Received: batch {index} (counting "
            f"from 0) with inputs {shapes}, on which it raised {type(error).__name__}: {error}"
        ) from error
