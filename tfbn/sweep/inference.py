"""Run a model for inference without side effects on its variables and seeds.

The context managers change Keras and TensorFlow in the current thread only. All private names of
Keras and TensorFlow that this requires are used here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import keras
import tensorflow as tf

# Private. Every `tf.custom_gradient` in a graph calls it, and it registers the traced function
# globally and permanently. A sweep requires no gradient.
# Private. The four operations behind `tf.random.normal`, `uniform`, `truncated_normal` and the
# dropout of `tf.nn`. TensorFlow has no hook for the seeds of a graph's operations.
# Private. Without a graph, an operation without a seed uses the next seed of the process.
# Private. There is no public way to detect that a graph is the body of a loop.
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import custom_gradient, gen_random_ops
from tensorflow.python.ops.control_flow_v2_func_graphs import WhileBodyFuncGraph

from tfbn.models.interception import (
    Observe,
    inlined_functions,
    observed_calls,
    patch_in_thread,
)
from tfbn.models.keras_models import Structure


class Draws:
    """The random numbers of one run of a model.

    Every draw uses the seed of its generator, folded with the number of the batch, the number of
    earlier draws in the run, and the iterations of the loops around the draw. So batches draw
    different numbers, a batch draws the same numbers in every pass, and no generator changes.

    Args:
        number: The number of the batch, an int64 scalar tensor.

    Attributes:
        made: Number of draws so far.
    """

    def __init__(self, number: tf.Tensor):
        self._number = number
        self.made = 0

    def seed(self, base: tf.Tensor) -> tf.Tensor:
        """Compute the seed of the next draw, shape (2,), from the seed of the generator."""
        folded = tf.random.fold_in(tf.cast(base, tf.int64), self._number)
        folded = tf.random.fold_in(folded, tf.constant(self.made, tf.int64))
        self.made += 1
        for iteration in _iterations():
            folded = tf.random.fold_in(folded, tf.cast(iteration, tf.int64))
        return folded


def _iterations() -> Iterator[tf.Tensor]:
    """Yield the number of the current iteration of each loop around this point of a graph."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if isinstance(graph, WhileBodyFuncGraph):
            first, *_ = graph.get_operations()  # Private. The placeholder of the loop's counter.
            yield first.outputs[0]
        graph = getattr(graph, "outer_graph", None)


@contextlib.contextmanager
def inference(
    layers: Mapping[str, keras.Layer], observe: Observe, draws: Draws, outermost: bool = False
) -> Iterator[keras.StatelessScope]:
    """Context manager: run models in this thread for inference, observed, without side effects.

    - Calls of `layers` are replaced by `observe`, see `tfbn.models.interception.observed_calls`.
    - A `tf.function` of the model is traced again as a part of the caller: its old trace does not
      observe, and the new one must not be run later.
    - Keras's variables keep their values, and layers keep the losses of their last call.
    - `draws` creates the random numbers.
    - No gradient is created or registered.

    Yields:
        The `keras.StatelessScope` with the values that variables would have been assigned.
    """

    def next_seed(call, generator, *args, **kwargs):
        return tf.cast(draws.seed(generator.state.value), generator.state.dtype)

    def seeds_of(call, seed):
        return call(draws.made if seed is None else seed)

    def skipped(call, generator, delta):
        # The state is a counter and a key, and `skip` returns the state before.
        state = generator.state.read_value()
        return tf.concat([draws.seed(state[:2] + state[-1]), state[2:]], 0)

    def forward_only(call, function, args, kwargs):
        outputs, _ = function(*args, **kwargs)
        return outputs

    def nothing(call, *args, **kwargs):
        return None

    stand_ins: list[tuple[type | ModuleType, str, Callable]] = [
        (keras.random.SeedGenerator, "next", next_seed),
        # Every method of a generator calls it.
        (tf.random.Generator, "skip", skipped),
        (random_seed, "get_seed", seeds_of),
        (custom_gradient, "_graph_mode_decorator", forward_only),
        # Private. The outermost call of a model deletes the losses of the call before.
        (keras.Layer, "_clear_losses", nothing),
        (keras.Layer, "add_loss", nothing),
        *_random_operations(draws),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(observed_calls(layers, observe, outermost))
        stack.enter_context(inlined_functions())
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch_in_thread(owner, name, stand_in))
        yield stack.enter_context(keras.StatelessScope())


def _random_operations(draws: Draws) -> Iterator[tuple[ModuleType, str, Callable]]:
    def like(stateless, call, shape, dtype, *, seed=0, seed2=0, name=None):
        return stateless(shape, draws.seed([seed or 0, seed2 or 0]), dtype=dtype, name=name)

    def integers(call, shape, minval, maxval, *, seed=0, seed2=0, name=None):
        seed = draws.seed([seed or 0, seed2 or 0])
        dtype = tf.convert_to_tensor(minval).dtype
        return tf.random.stateless_uniform(shape, seed, minval, maxval, dtype, name)

    for name, stand_in in (
        ("random_standard_normal", functools.partial(like, tf.random.stateless_normal)),
        ("truncated_normal", functools.partial(like, tf.random.stateless_truncated_normal)),
        ("random_uniform", functools.partial(like, tf.random.stateless_uniform)),
        ("random_uniform_int", integers),
    ):
        yield gen_random_ops, name, stand_in


def as_called(inputs: Structure) -> Structure:
    """Convert a batch to the arguments of a model, with `None` for absent inputs."""
    if isinstance(inputs, dict):
        return {key: as_called(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        parts = map(as_called, inputs)
        if hasattr(inputs, "_fields"):
            return type(inputs)(*parts)
        return type(inputs)(parts) if inputs else None
    return inputs
