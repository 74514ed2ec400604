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

from tfbn.keras_models import Site
from tfbn.layer import BatchNormalization, kernels

_patching = threading.RLock()


class Observation:
    """The batch norm layers of a model under observation.

    Args:
        model: A built model.
        layers: The layers to observe, by path.
    """

    def __init__(self, model, layers):
        self.model = model
        self._paths = {id(layer): path for path, layer in layers.items()}
        self._queues = {}

    def run(self, inputs, *, population, met):
        """Run the model for inference, with its layers observed.

        Args:
            inputs: A batch of the model's inputs.
            population: From a site and its number of channels to the mean and variance
                that it normalises with, a tensor of shape (2, channels). If `None`, every
                site normalises with the moments of the batch, as in training.
            met: A list that takes a `Call` for every call in turn.

        Returns:
            The model's outputs.
        """
        calls = {}
        outer = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None

        def observed(layer, inputs, mask):
            number = calls[id(layer)] = calls.get(id(layer), -1) + 1
            site = Site(self._paths[id(layer)], number)
            channels = layer.moving_mean.shape[0]
            entered = [inputs] if mask is None else [inputs, mask]
            form = {"axis": layer.axis, "epsilon": layer.epsilon}
            if population is not None:
                mean, variance = tf.unstack(population(site, channels))
                outputs = kernels.normalize(inputs, mean, variance, layer.gamma, layer.beta, **form)
                # What entered goes on to later levels anyway. Measured outside of the graph, it
                # keeps the graph small, which every level copies a part of.
                call = Call(site, entered, outputs, entered, functools.partial(_parts, layer.axis))
            else:
                outputs, *batch = kernels.train(inputs, layer.gamma, layer.beta, mask=mask, **form)
                call = Call(site, entered, outputs, batch, lambda *batch: [batch])
            if not tf.executing_eagerly() and tf.compat.v1.get_default_graph() is not outer:
                # The body of a loop or branch, of which only what the outputs need is run.
                queue = self._queue(site, channels)
                [batch] = call.measure(*call.fetches)
                with tf.control_dependencies([queue.enqueue(_full(*batch))]):
                    outputs = tf.identity(outputs)
                call = Call(site, entered, outputs, None, functools.partial(_drain, queue))
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

    def _queue(self, site, channels):
        """Where the moments of a site that is called in a loop or branch wait for `_drain`."""
        if site not in self._queues:
            with tf.init_scope(), tf.device("CPU"):
                self._queues[site] = tf.queue.FIFOQueue(
                    np.iinfo(np.int32).max, [tf.float64] * 3, [[channels]] * 3
                )
        return self._queues[site]


class Call(NamedTuple):
    """A site's call, and how to get at the batch that entered.

    Attributes:
        site: The site.
        inputs: The tensor that entered, and its mask if it has one.
        outputs: The tensor that left.
        fetches: The tensors to take out of the graph for `measure`; `None` in the body of a
            loop or branch, out of which a graph hands nothing.
        measure: From the values of `fetches` to what entered, a list of (count, mean,
            variance): one, but for the body of a loop, which may run many times or never.
    """

    site: Site
    inputs: list
    outputs: tf.Tensor
    fetches: list | None
    measure: Callable


def _parts(axis, *entered):
    specs = tuple(tf.TensorSpec([None, *value.shape[1:]], value.dtype) for value in entered)
    return [_moments_function(axis, specs)(*entered)]


def _full(count, mean, variance):
    return [tf.cast(part, tf.float64) for part in (tf.ones_like(mean) * count, mean, variance)]


def _drain(queue):
    """What has been put into a queue since the last time; no values if nothing has."""
    waiting = list(zip(*queue.dequeue_many(queue.size()), strict=True))
    return waiting or [[tf.zeros(shape, tf.float64) for shape in queue.shapes]]


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
