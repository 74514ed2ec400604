"""A Keras model with its batch norm layers observed.

Tracing a model here gives its inference graph in which every batch norm layer of
interest normalises as a sweep needs it and offers the moments of what enters it. The
model itself is never run, written or compiled: the graph is pruned to the moments that
are asked for, so nothing else in it has an effect.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn import kernels, moments
from tfbn.layer import BatchNormalization

_patching = threading.RLock()


class Site:
    """One call of one batch norm layer, and the moments of all that entered it so far.

    A layer that a model calls twice has two sites: in training mode each call normalises
    with its own statistics.
    """

    def __init__(self, path, layer, method, number):
        self.path = path
        self._method = method
        self._channels = layer.moving_mean.shape[0]
        self._number = number
        self._population = self._variables("mean", "variance")
        self._sums = None
        self.reset()

    def reset(self):
        """Forget what entered."""
        self.moments = moments.Moments(*np.zeros((3, self._channels)))

    def add(self, count, mean, variance):
        """Take in a batch, given its count, mean and biased variance.

        Returns:
            Whether its moments are finite, per channel.
        """
        batch = moments.of_batch(count, mean, variance, method=self._method)
        self.moments = moments.merge(self.moments, batch, method=self._method)
        return moments.finite(batch)

    def settle(self):
        """Make the moments so far the population that this site normalises with."""
        for variable, value in zip(
            self._population, (self.moments.mean, moments.variance(self.moments)), strict=True
        ):
            variable.assign(value)

    def population(self):
        """Mean and variance that were settled, as tensors."""
        return [variable.read_value() for variable in self._population]

    def add_inside(self, count, mean, variance):
        """Take in a part of a batch in the body of a loop or branch, for `drain`.

        Iterations may overlap, so these are sums, which do not mind. Returns the updates.
        """
        if self._sums is None:
            self._sums = self._variables("count", "sum", "squares")
        parts = tf.ones_like(mean) * count, count * mean, count * (variance + tf.square(mean))
        return [
            variable.assign_add(tf.cast(part, tf.float64), read_value=False)
            for variable, part in zip(self._sums, parts, strict=True)
        ]

    def drain(self):
        """Count, mean and variance of what has come from inside since the last time."""
        count, total, squares = (variable.numpy() for variable in self._sums)
        for variable in self._sums:
            variable.assign(tf.zeros_like(variable))
        mean = total / np.maximum(count, 1)
        return count, mean, np.maximum(squares / np.maximum(count, 1) - mean**2, 0)

    def _variables(self, *names):
        # A wrapped function wants the variables made inside it to differ in name.
        with tf.init_scope():
            zeros = tf.zeros([self._channels], tf.float64)
            return [
                tf.Variable(zeros, trainable=False, name=f"site_{self._number}_{name}")
                for name in names
            ]


class Observation:
    """The batch norm layers of a model under observation.

    Args:
        model: A built model.
        layers: The layers to observe, by path.
        method: How moments accumulate, see `tfbn.moments`.

    Attributes:
        sites: The sites met so far, in the order of their calls.
    """

    def __init__(self, model, layers, method):
        self.model = model
        self.method = method
        self.sites = []
        self._paths = {id(layer): path for path, layer in layers.items()}
        self._by_key = {}

    def site(self, layer, call):
        """The site of a layer's call number `call` (from 0) in one run of the model."""
        key = (id(layer), call)
        if key not in self._by_key:
            path = self._paths[id(layer)]
            self._by_key[key] = Site(path, layer, self.method, len(self.sites))
            self.sites.append(self._by_key[key])
        return self._by_key[key]

    def run(self, inputs, *, settled, met):
        """Run the model for inference, with its layers observed.

        Each layer normalises with what its site settled if `settled`, else with the
        moments of the batch, as in training.

        Args:
            inputs: A batch of the model's inputs.
            settled: See above.
            met: A list that takes a `Call` for every call in turn.

        Returns:
            The model's outputs.
        """
        calls = {}
        outer = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None

        def observed(layer, inputs, mask):
            number = calls[id(layer)] = calls.get(id(layer), -1) + 1
            site = self.site(layer, number)
            entered = [inputs] if mask is None else [inputs, mask]
            form = {"axis": layer.axis, "epsilon": layer.epsilon}
            if settled:
                population = site.population()
                outputs = kernels.normalize(inputs, *population, layer.gamma, layer.beta, **form)
                # What entered goes on to later levels anyway. Measured outside of the graph, it
                # keeps the graph small, which every level copies a part of.
                call = Call(
                    site, entered, outputs, entered, functools.partial(_moments, layer.axis)
                )
            else:
                outputs, *batch = kernels.train(inputs, layer.gamma, layer.beta, mask=mask, **form)
                call = Call(site, entered, outputs, batch, lambda *batch: batch)
            if not tf.executing_eagerly() and tf.compat.v1.get_default_graph() is not outer:
                # The body of a loop or branch, of which only what the outputs need is run.
                with tf.control_dependencies(site.add_inside(*call.measure(*call.fetches))):
                    outputs = tf.identity(outputs)
                call = Call(site, entered, outputs, None, site.drain)
            met.append(call)
            return tf.cast(outputs, layer.compute_dtype)

        # Keras's variables (counters, seeds) keep their values in a stateless scope, and
        # functions that the model's own code has compiled must neither be reused, as
        # they do not observe, nor be left behind, as they do.
        eager = tf.config.functions_run_eagerly()
        with _patching, _calls_of(self._paths, observed), keras.StatelessScope():
            tf.config.run_functions_eagerly(True)
            try:
                return self.model(inputs, training=False)
            finally:
                tf.config.run_functions_eagerly(eager)


class Call(NamedTuple):
    """A site's call, and how to get at the batch that entered.

    Attributes:
        site: The site.
        inputs: The tensor that entered, and its mask if it has one.
        outputs: The tensor that left.
        fetches: The tensors to take out of the graph for `measure`; `None` in the body of a
            loop or branch, out of which a graph hands nothing.
        measure: From the values of `fetches` to count, mean and variance.
    """

    site: Site
    inputs: list
    outputs: tf.Tensor
    fetches: list | None
    measure: Callable


def _moments(axis, *entered):
    specs = tuple(tf.TensorSpec([None, *value.shape[1:]], value.dtype) for value in entered)
    return _moments_function(axis, specs)(*entered)


@functools.lru_cache(maxsize=256)
def _moments_function(axis, specs):
    return tf.function(
        lambda x, mask=None: kernels.moments(x, axis, mask), input_signature=specs, autograph=False
    )


@contextlib.contextmanager
def _calls_of(layers, observed):
    """Replace the `call` of some batch norm layers.

    It is replaced in the classes, and looks which layer calls, so that subclasses that
    add to `super().call()` keep what they add.
    """

    def stand_in(original):
        def call(self, inputs, training=None, mask=None):
            if id(self) in layers:
                return observed(self, inputs, mask)
            return original(self, inputs, training=training, mask=mask)

        return call

    classes = [keras.layers.BatchNormalization, BatchNormalization]
    originals = [(cls, cls.__dict__["call"]) for cls in classes if "call" in cls.__dict__]
    for cls, original in originals:
        cls.call = stand_in(original)
    try:
        yield
    finally:
        for cls, original in originals:
            cls.call = original
