"""Run a model and compute the moments of every call of its batch norm layers."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import keras
import numpy as np
import tensorflow as tf

from tfbn.layer import kernels, sums
from tfbn.models import keras_models
from tfbn.models.interception import LayerCall
from tfbn.models.keras_models import Structure
from tfbn.sweep.inference import Draws, as_called, inference
from tfbn.sweep.state import Site


class UnobservableError(ValueError):
    """Raised for a model whose statistics are undefined, or cannot be observed."""


class Call(NamedTuple):
    """One call of an observed layer.

    Attributes:
        site: The layer and the number of the call.
        path: The path of the layer.
        inputs: The input tensor, and its mask if any.
        outputs: The output tensor.
        fetches: The tensors to fetch from the graph for `measure`; `None` in the body of a loop or
            branch, whose tensors cannot be fetched.
        measure: Function from the values of `fetches` to the moments of the input: a list of
            tensors with count, mean and variance, float64, shape (3, channels). One tensor; any
            number for the body of a loop; an empty list for a call whose values do not count.
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
        draws: Number of random draws.
        updates: Id of a Keras variable -> the value that the run would have assigned to it.
    """

    outputs: Structure
    calls: list[Call]
    by_batch: frozenset[str]
    draws: int
    updates: dict[int, tf.Tensor]


class Observer:
    """Run a model and observe some of its batch norm layers.

    Args:
        model: A built model, stored as a weak reference.
        layers: Path -> layer to observe, stored as weak references.
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
            number: The seed of the batch's random numbers, an int64 scalar.
            population: Function from a site and its number of channels to the mean and variance
                that the call normalizes with, a tensor of shape (2, channels); `None` to normalize
                with the moments of the batch, as in training.
        """
        calls: list[Call] = []
        refused: list[UnobservableError] = []
        by_batch: set[str] = set()
        outer = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

        def refuse(error: UnobservableError) -> NoReturn:
            refused.append(error)
            raise error

        def observe(call: LayerCall) -> tf.Tensor:
            site, layer, mask = Site(call.path, call.number), call.layer, call.mask
            if call.of_subclass:
                outputs = call.run()
                if not call.contained_another:
                    refuse(_without_base_call(call))
                return outputs
            if call.training and layer.trainable:
                by_batch.add(site.path)
                return call.run()
            x = tf.convert_to_tensor(call.inputs)
            if not x.dtype.is_floating:  # As the layer does.
                x = tf.cast(x, layer.compute_dtype)
            if wrong := _wrong_mask(site.path, x, mask):
                refuse(wrong)
            channels = layer.moving_mean.shape[0]
            made = _observed(site, layer, x, mask, population(site, channels))
            if site in self._ignored:
                made = made._replace(fetches=[], measure=lambda: [])
            elif outer is not None and tf.compat.v1.get_default_graph() is not outer:
                made = self._waiting(made, channels)
            calls.append(made)
            return tf.cast(made.outputs, layer.compute_dtype)

        model, draws = self._model(), Draws(number)
        with inference(dict(self._layers), observe, draws, outermost=True) as scope:
            try:
                outputs = model(as_called(inputs), training=False)
            except UnobservableError:
                raise refused[0] from None  # Without the arguments that Keras adds to the message.
        updates = {key: scope.get_current_value(v) for key, (_, v) in self._variables().items()}
        updates = {key: value for key, value in updates.items() if value is not None}
        return Run(outputs, calls, frozenset(by_batch), draws.made, updates)

    def owner(self, variable_id: int) -> str:
        """Return the path of the innermost layer that has a variable."""
        path, _ = self._variables()[variable_id]
        return path

    def handles(self, variable_id: int) -> set[int]:
        """Return the ids of a variable's resource handles on all replicas."""
        _, variable = self._variables()[variable_id]
        return self._handles(variable)

    def statistics(self) -> dict[int, str]:
        """Return id of a resource handle -> name of the statistic in messages."""
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
        """Return id -> (path of the innermost layer, Keras variable) for all variables.

        Includes the state of recurrent layers: a list, which `layer.variables` does not include.
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
        """Convert a call inside a loop or branch.

        Its moments leave the body through a queue, because only operations that the outputs depend
        on are executed.
        """
        queue = self._queue(call.site, channels)
        [batch] = call.measure(*(call.fetches or ()))
        with tf.control_dependencies([queue.enqueue(batch)]):
            outputs = tf.identity(call.outputs)
        return call._replace(
            outputs=outputs, fetches=None, measure=functools.partial(_drain, queue)
        )

    def _queue(self, site: Site, channels: int) -> tf.queue.FIFOQueue:
        """Return the queue for the moments of a call in a loop or branch, see `_drain`."""
        if site not in self._queues:
            with tf.init_scope(), tf.device("CPU"):
                self._queues[site] = tf.queue.FIFOQueue(
                    np.iinfo(np.int32).max, [tf.float64], [[3, channels]]
                )
        return self._queues[site]


def _wrong_mask(path: str, x: tf.Tensor, mask: tf.Tensor | None) -> UnobservableError | None:
    """Return the error for a mask without exactly one value per position of `x`."""
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


def _without_base_call(call: LayerCall) -> UnobservableError:
    return UnobservableError(
        f"Expected {type(call.layer).__name__}.call to call super().call(). Received: layer "
        f"{call.path!r}. Call it, or set trainable=False."
    )


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
        # On a GPU both take 3 passes over memory, as they would in one compiled function, which
        # could not be merged with an activation (`tests/layer/test_gpu_steps.py`).
        [batch] = measure(*fetches)
        _, mean, variance = tf.unstack(batch)
        outputs = kernels.normalize(x, mean, variance, gamma, beta, **form)
        return Call(site, site.path, entered, outputs, [batch], lambda batch: [batch])
    # Moments are computed outside of the graph, which keeps it small.
    outputs = kernels.normalize(x, population[0], population[1], gamma, beta, **form)
    return Call(site, site.path, entered, outputs, fetches, measure)


def _measured(
    axis: int, x: tf.Tensor, mask: tf.Tensor | None = None
) -> tuple[list[tf.Tensor], Callable[..., list[tf.Tensor]]]:
    """Return tensors to fetch for `x`, and the function from them to the moments of `x`."""
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
    """Return the moments of `tfbn.layer.sums`, traced once for all layers of all models."""
    return _concrete(
        lambda x: _stacked(*sums.moments_of_stretches(x, within)),
        tf.TensorSpec([None] * 3, dtype),
    )


@functools.cache
def _compiled_moments(spec: tf.TensorSpec) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """Return the moments compiled by XLA: 1.0 to 1.2 passes on a GPU (compiled, not measured)."""
    return _concrete(lambda x: _stacked(*kernels.moments(x, 1)), spec, compiled=True)


@functools.lru_cache(maxsize=256)
def _masked_moments(
    axis: int, specs: tuple[tf.TensorSpec, tf.TensorSpec]
) -> Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]:
    return _concrete(lambda x, mask: _stacked(*kernels.moments(x, axis, mask)), *specs)


def _concrete(
    function: Callable[..., tf.Tensor], *specs: tf.TensorSpec, compiled: bool = False
) -> Callable[..., list[tf.Tensor]]:
    # `init_scope`, because the function would keep a graph that is being built alive.
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
    """Return all moments in a queue, or a single one with count 0."""
    waiting = tf.unstack(queue.dequeue_many(queue.size()))
    return waiting or [tf.zeros(queue.shapes[0], tf.float64)]
