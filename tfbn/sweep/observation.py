"""The observed model: one run gives outputs and the moments of every call of a batch norm layer."""

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn.layer import BatchNormalization, kernels, sums
from tfbn.models import keras_models
from tfbn.models.keras_models import Structure
from tfbn.models.patching import patch_in_thread
from tfbn.sweep.inference import Draws, as_called, inference
from tfbn.sweep.state import Site


class UnobservableError(ValueError):
    """A model on which the statistics that a sweep is to find are not defined, or not seen."""


class Call(NamedTuple):
    """One call of an observed layer.

    Attributes:
        site: The layer and the number of the call.
        path: The path of the layer.
        inputs: The tensor that enters, and its mask if it has one.
        outputs: The tensor that leaves.
        fetches: The tensors to take out of the graph for `measure`; `None` in the body of a loop
            or branch, out of which a graph hands nothing.
        measure: Function from the values of `fetches` to the moments of the values that entered.
            It returns a list of tensors with count, mean and variance, float64, shape
            (3, channels): one tensor, or any number for the body of a loop, or none for a call
            whose values do not count.
    """

    site: Site
    path: str
    inputs: list
    outputs: tf.Tensor
    fetches: list | None
    measure: Callable[..., list[tf.Tensor]]


class Run(NamedTuple):
    """One run of an observed model.

    Attributes:
        outputs: The model's outputs.
        calls: The observed calls in their order.
        by_batch: The paths of layers that the model calls with `training=True` in inference too.
            Such a call normalizes by the batch, uses no statistics, and is not observed.
        draws: How many random draws there were.
        updates: Id of a Keras variable -> the value that the run would have assigned to it.
    """

    outputs: Structure
    calls: list[Call]
    by_batch: frozenset[str]
    draws: int
    updates: dict[int, tf.Tensor]


class Observer:
    """Runs a model with some of its batch norm layers observed.

    Args:
        model: A built model. It is held weakly.
        layers: The layers to observe, by path. They are held weakly.
        ignored: The sites whose values do not count, because `fit` does not train there.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Mapping[str, keras.Layer],
        ignored: frozenset[Site] = frozenset(),
    ):
        self._model: Callable[[], keras.Model] = weakref.ref(model)
        self._layers = weakref.WeakValueDictionary(layers)
        self._ignored = ignored
        self._queues: dict[Site, tf.queue.FIFOQueue] = {}

    def run(
        self,
        inputs: Structure,
        number: tf.Tensor,
        population: Callable[[Site, int], Sequence[tf.Tensor] | None],
    ) -> Run:
        """Run the model for inference.

        Args:
            inputs: A batch of the model's inputs.
            number: The number of the batch, an int64 scalar: its random numbers follow from it.
            population: From a site and its number of channels to the mean and variance that the
                call normalises with, a tensor of shape (2, channels); or to `None`, where the
                call is to normalise with the moments of the batch, as in training.
        """
        calls: list[Call] = []
        refused: list[UnobservableError] = []
        by_batch: set[str] = set()
        counts: collections.Counter[str] = collections.Counter()
        outer = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

        def observe(path, layer, call, x, training, mask):
            site = Site(path, counts[path])
            counts[path] += 1
            if training and layer.trainable:
                by_batch.add(path)
                return call(x, training=training, mask=mask)
            x = tf.convert_to_tensor(x)
            if not x.dtype.is_floating:  # As the layer itself does it.
                x = tf.cast(x, layer.compute_dtype)
            if wrong := _wrong_mask(path, x, mask):
                refused.append(wrong)
                raise wrong
            channels = layer.moving_mean.shape[0]
            made = _observed(site, layer, x, mask, population(site, channels))
            if site in self._ignored:
                made = made._replace(fetches=[], measure=lambda: [])
            elif outer is not None and tf.compat.v1.get_default_graph() is not outer:
                made = self._waiting(made, channels)
            calls.append(made)
            return tf.cast(made.outputs, layer.compute_dtype)

        model, draws = self._model(), Draws(number)
        unobserved = _refusing_unobserved(dict(self._layers), counts, refused)
        with inference(dict(self._layers), observe, draws) as scope, unobserved:
            try:
                outputs = model(as_called(inputs), training=False)
            except UnobservableError:
                raise refused[0] from None  # Without the arguments that Keras adds to the message.
        updates = {key: scope.get_current_value(v) for key, (_, v) in self._variables().items()}
        updates = {key: value for key, value in updates.items() if value is not None}
        return Run(outputs, calls, frozenset(by_batch), draws.made, updates)

    def owner(self, variable_id: int) -> str:
        """The path of the innermost layer that has a variable."""
        path, _ = self._variables()[variable_id]
        return path

    def handles(self, variable_id: int) -> set[int]:
        """The ids of the tensors by which graphs refer to a variable, on every replica."""
        _, variable = self._variables()[variable_id]
        return self._handles(variable)

    def statistics(self) -> dict[int, str]:
        """By the id of such a tensor of each statistic of the layers, its name in messages."""
        return {
            handle: f"{name} of layer {path!r}"
            for path, layer in self._layers.items()
            for name, variable in keras_models.statistics(layer).items()
            for handle in self._handles(variable)
        }

    def _handles(self, variable: keras.Variable) -> set[int]:
        strategy = self._model().distribute_strategy
        local = strategy.experimental_local_results(variable.value)
        return {id(value.handle) for value in local}

    def _variables(self) -> dict[int, tuple[str, keras.Variable]]:
        """By its id each Keras variable of the model, with the path of its innermost layer.

        A recurrent layer keeps its state in a list, and Keras does not count it among the layer's
        variables.
        """
        variables = {}
        for path, layer in keras_models.layers(self._model()).items():
            state = [
                v for v in vars(layer).values() if isinstance(v, keras.Variable | list | tuple)
            ]
            for variable in [*layer.variables, *keras.tree.flatten(state)]:
                if isinstance(variable, keras.Variable):
                    variables[id(variable)] = path, variable
        return variables

    def _waiting(self, call: Call, channels: int) -> Call:
        """A call in the body of a loop or branch, of which only the outputs' needs are run."""
        queue = self._queue(call.site, channels)
        [batch] = call.measure(*(call.fetches or ()))
        with tf.control_dependencies([queue.enqueue(batch)]):
            outputs = tf.identity(call.outputs)
        return call._replace(
            outputs=outputs, fetches=None, measure=functools.partial(_drain, queue)
        )

    def _queue(self, site: Site, channels: int) -> tf.queue.FIFOQueue:
        """The queue in which the moments of a call in a loop or branch wait for `_drain`."""
        if site not in self._queues:
            with tf.init_scope(), tf.device("CPU"):
                self._queues[site] = tf.queue.FIFOQueue(
                    np.iinfo(np.int32).max, [tf.float64], [[3, channels]]
                )
        return self._queues[site]


def _wrong_mask(path: str, x: tf.Tensor, mask: tf.Tensor | None) -> UnobservableError | None:
    """The error for a mask that is not one value per position of `x`."""
    if mask is None or x.shape.rank is None or mask.shape.rank is None:
        return None
    positions = x.shape[:-1]
    pairs = zip(mask.shape, positions, strict=False)
    if mask.shape.rank != positions.rank or any(a not in (1, b, None) and b for a, b in pairs):
        return UnobservableError(
            f"Expected a mask of shape {tuple(positions)} for layer {path!r}. Received: "
            f"{tuple(mask.shape)}, on which `fit` fails too. Expand the mask."
        )
    return None


@contextlib.contextmanager
def _refusing_unobserved(
    layers: Mapping[str, keras.Layer],
    counts: Mapping[str, int],
    refused: list[UnobservableError],
) -> Iterator[None]:
    """Within the context a subclass of batch norm that does not call `super().call()` raises.

    Args:
        layers: Batch norm layers by path.
        counts: path -> number of observed calls, so far.
        refused: The error is added to it.
    """
    paths = {id(layer): path for path, layer in layers.items()}
    classes = {
        next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__)
        for layer in layers.values()
    }

    def checked(original, layer, *args, **kwargs):
        if id(layer) not in paths:
            return original(layer, *args, **kwargs)
        path = paths[id(layer)]
        before = counts.get(path, 0)
        outputs = original(layer, *args, **kwargs)
        if counts.get(path, 0) == before:
            refused.append(
                UnobservableError(
                    f"Expected {type(layer).__name__}.call to call super().call(). Received: layer "
                    f"{path!r}. Call it, or set trainable=False."
                )
            )
            raise refused[-1]
        return outputs

    with contextlib.ExitStack() as stack:
        for cls in classes - {keras.layers.BatchNormalization, BatchNormalization}:
            stack.enter_context(patch_in_thread(cls, "call", checked))
        yield


def _observed(
    site: Site,
    layer: keras.Layer,
    x: tf.Tensor,
    mask: tf.Tensor | None,
    population: Sequence[tf.Tensor] | None,
) -> Call:
    form = {"axis": layer.axis, "epsilon": layer.epsilon}
    gamma, beta = (
        None if v is None else tf.convert_to_tensor(v) for v in (layer.gamma, layer.beta)
    )
    entered = [x] if mask is None else [x, mask]
    fetches, measure = _measured(layer.axis, *entered)
    if population is None:
        [batch] = measure(*fetches)
        _, mean, variance = tf.unstack(batch)
        outputs = kernels.normalize(x, mean, variance, gamma, beta, **form)
        return Call(site, site.path, entered, outputs, [batch], lambda batch: [batch])
    # The moments of the values that enter are taken outside of the graph, which keeps it small.
    outputs = kernels.normalize(x, population[0], population[1], gamma, beta, **form)
    return Call(site, site.path, entered, outputs, fetches, measure)


def _measured(
    axis: int, x: tf.Tensor, mask: tf.Tensor | None = None
) -> tuple[list[tf.Tensor], Callable[..., list[tf.Tensor]]]:
    """The tensors whose moments are those of `x`, and the function that gives them."""
    if mask is not None:
        specs = tuple(tf.TensorSpec([None, *v.shape[1:]], v.dtype) for v in (x, mask))
        return [x, mask], _masked_moments(axis, specs)
    if kernels.compiles_for_gpu():
        flat = kernels.flat(x, axis)
        return [flat], _compiled_moments(tf.TensorSpec([None] * flat.shape.rank, x.dtype))
    stretched = sums.stretched(x, axis)
    return [stretched], _moments(sums.within_stretches(x, axis), x.dtype)


@functools.cache
def _moments(within: int, dtype: tf.DType) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """The moments of `tfbn.layer.sums`, traced once for all layers of all models."""
    return _concrete(
        lambda x: _stacked(*sums.moments_of_stretches(x, within)),
        tf.TensorSpec([None] * 3, dtype),
    )


@functools.cache
def _compiled_moments(spec: tf.TensorSpec) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """The moments in one pass over memory, and without a wait for the GPU, compiled by XLA."""
    return _concrete(lambda x: _stacked(*kernels.moments(x, 1)), spec, compiled=True)


@functools.lru_cache(maxsize=256)
def _masked_moments(
    axis: int, specs: tuple[tf.TensorSpec, tf.TensorSpec]
) -> Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]:
    return _concrete(lambda x, mask: _stacked(*kernels.moments(x, axis, mask)), *specs)


def _concrete(
    function: Callable[..., tf.Tensor], *specs: tf.TensorSpec, compiled: bool = False
) -> Callable[..., list[tf.Tensor]]:
    # Outside of the graph that may be in the making, which the function would keep alive.
    with tf.init_scope(), tf.device(None):
        return tf.function(
            lambda *values: [function(*values)],
            input_signature=specs,
            autograph=False,
            jit_compile=compiled or None,
        ).get_concrete_function()


def _stacked(count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    counts = tf.broadcast_to(tf.cast(count, tf.float64), tf.shape(mean))
    return tf.stack([counts, tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)])


def _drain(queue: tf.queue.FIFOQueue) -> list[tf.Tensor]:
    """Return all moments that were put into a queue since the last time, or one of no values."""
    waiting = tf.unstack(queue.dequeue_many(queue.size()))
    return waiting or [tf.zeros(queue.shapes[0], tf.float64)]
