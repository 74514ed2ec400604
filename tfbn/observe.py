"""A Keras model with its batch norm layers observed.

Tracing a model here gives its inference graph in which every batch norm layer of
interest normalises as a sweep needs it and offers the moments of what enters it. The
model itself is never run, written or compiled: the graph is pruned to the moments that
are asked for, so nothing else in it has an effect.
"""

import contextlib
import threading
from typing import NamedTuple

import keras
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
        self.method = method

        def variable(name):
            # A wrapped function wants the variables made inside it to differ in name.
            zeros = tf.zeros([layer.moving_mean.shape[0]], tf.float64)
            return tf.Variable(zeros, trainable=False, name=f"site_{number}_{name}")

        self._moments = moments.Moments(variable("count"), variable("mean"), variable("m2"))
        self._population = variable("population_mean"), variable("population_variance")
        self.lock = tf.CriticalSection(name=f"site_{number}")

    def reset(self):
        """Forget what entered."""
        for variable in self._moments:
            variable.assign(tf.zeros_like(variable))

    def add(self, count, mean, variance):
        """Take in a batch's moments.

        Returns:
            Whether they are finite, and the assignments, as ops in a graph.
        """
        batch = moments.from_batch(count, mean, variance, method=self.method)
        seen = moments.Moments(*(v.read_value() for v in self._moments))
        merged = moments.merge(seen, batch, method=self.method)
        return moments.finite(batch), [
            variable.assign(value, read_value=False)
            for variable, value in zip(self._moments, merged, strict=True)
        ]

    def settle(self):
        """Make the moments so far the population that this site normalises with."""
        result = self.result()
        self._population[0].assign(result.mean)
        self._population[1].assign(moments.variance(result))

    def population(self):
        """Mean and variance that were settled."""
        return [variable.read_value() for variable in self._population]

    def result(self):
        """The moments of all that entered."""
        return moments.Moments(*(variable.read_value() for variable in self._moments))

    def finite(self):
        """Whether all that entered was finite."""
        return moments.finite(self.result())


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
            with tf.init_scope():
                path = self._paths[id(layer)]
                self._by_key[key] = Site(path, layer, self.method, len(self.sites))
            self.sites.append(self._by_key[key])
        return self._by_key[key]

    def run(self, inputs, *, settled, met):
        """Run the model for inference, its observed layers adding to their sites.

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
            count, mean, variance = kernels.moments(inputs, layer.axis, mask)
            inside = tf.executing_eagerly() or tf.compat.v1.get_default_graph() is outer
            if inside:
                finite, updates = site.add(count, mean, variance)
            else:  # The iterations of a loop may overlap.
                finite = None
                updates = [site.lock.execute(lambda: tf.group(site.add(count, mean, variance)[1]))]
            if settled:
                mean, variance = site.population()
            if not inside:
                # In the body of a loop or branch only what the outputs depend on is run.
                with tf.control_dependencies(updates):
                    mean = tf.identity(mean)
            outputs = kernels.normalize(
                inputs,
                mean,
                variance,
                layer.gamma,
                layer.beta,
                axis=layer.axis,
                epsilon=layer.epsilon,
            )
            met.append(Call(site, outputs, finite, updates))
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
    """A site's call: its outputs, whether the batch was finite there, and its updates.

    `finite` is `None` in the body of a loop or branch, out of which a graph hands nothing.
    """

    site: Site
    outputs: tf.Tensor
    finite: tf.Tensor | None
    updates: list


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
