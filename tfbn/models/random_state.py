"""Save and restore the random generators that a model or its data may draw from.

Private names of Keras and TensorFlow that this requires are in this module only.
"""

import contextlib
import random
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

# Private. A public call would create the global generator of Keras or TensorFlow, which a model
# without random layers must not do.
from keras.src.backend.common import global_state

# Private. `context()._rng` generates the seeds of eager operations after `tf.random.set_seed`.
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

from tfbn.models import keras_models

# The key of Keras's global generator. Keras 3.10 has no constant for it.
_GLOBAL_SEED_GENERATOR = "global_seed_generator"


@contextlib.contextmanager
def unchanged_generators(model: keras.Model) -> Iterator[None]:
    """Restore all random generators after the context, in which a model runs and data is read.

    Covers the global generators of Python, NumPy, Keras and TensorFlow, and each
    `tf.random.Generator` of the model. (A `keras.random.SeedGenerator` stores its state in a
    variable of the model.) Does not cover generators that only the user's code holds, and eager
    `tf.random` operations with a seed.
    """
    restore = [
        _python(),
        _numpy(),
        _tensorflow_seeds(),
        _keras_global(),
        *(_generator(model, generator) for generator in _generators(model)),
    ]
    try:
        yield
    finally:
        for function in restore:
            function()


def _python() -> Callable[[], None]:
    state = random.getstate()
    return lambda: random.setstate(state)


def _numpy() -> Callable[[], None]:
    state = np.random.get_state()
    return lambda: np.random.set_state(state)


def _tensorflow_seeds() -> Callable[[], None]:
    """Replace the generator of the seeds of eager operations.

    TensorFlow caches the state of an operation by its seed, so no seed may be used twice.
    """
    eager_context = context.context()
    generator: random.Random | None = getattr(eager_context, "_rng", None)
    if generator is None:
        return lambda: None
    eager_context._rng = random.Random("tfbn")
    return lambda: setattr(eager_context, "_rng", generator)


def _keras_global() -> Callable[[], None]:
    generator = global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)
    value = None if generator is None else generator.state.numpy()

    def restore() -> None:
        global_state.set_global_attribute(_GLOBAL_SEED_GENERATOR, generator)
        if generator is not None:
            generator.state.assign(value)

    return restore


def _generators(model: keras.Model) -> Iterator[tf.random.Generator]:
    """Yield TensorFlow's global generator, if it exists, and all in attributes of layers."""
    if stateful_random_ops.global_generator is not None:
        yield stateful_random_ops.global_generator
    pending = [
        value for layer in keras_models.layers(model).values() for value in vars(layer).values()
    ]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tf.random.Generator):
            yield value


def _generator(model: keras.Model, generator: tf.random.Generator) -> Callable[[], None]:
    local = model.distribute_strategy.experimental_local_results(generator.state)
    states = [(state, state.numpy()) for state in local]

    def restore() -> None:
        for state, value in states:
            state.assign(value)

    return restore
