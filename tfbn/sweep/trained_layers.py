"""Choose the batch norm layers to sweep, and their calls that count: the ones that train.

A trace of `call` in training mode determines them. A custom `train_step` may train other layers, so
inside `fit` the changes of the moving statistics decide, see `tfbn.callbacks.change_detector`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.models.interception import LayerCall
from tfbn.models.keras_models import Structure
from tfbn.sweep.inference import Draws, as_called, inference
from tfbn.sweep.state import Site


class TrainedCalls(NamedTuple):
    """How `call` uses a model's batch norm layers.

    Attributes:
        frozen: The paths of the layers that `call` uses and never trains.
        partly: The paths of the layers that `call` trains in some calls only.
        ignored: The inference calls of these layers that fix `training=False`. Training does not
            train there, so their values do not count.
    """

    frozen: frozenset[str] = frozenset()
    partly: frozenset[str] = frozenset()
    ignored: frozenset[Site] = frozenset()


class PassedOn(int):
    """A `training=False` that differs from a constant in the model's code.

    A call receives it only if every call around it passes `training` on.
    """

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> tf.Tensor:
        return tf.constant(False, dtype or tf.bool, name=name or "training")


class _Call(NamedTuple):
    """One call of a layer: whether it trains, and whether its code fixes `training=False`."""

    site: Site
    trains: bool
    fixed: bool

    @property
    def path(self) -> str:
        return self.site.path


def trained_calls(
    model: keras.Model, layers: Mapping[str, keras.Layer], inputs: Structure
) -> TrainedCalls:
    """Trace a model in training mode, and in inference mode if the result is ambiguous.

    The calls of the two modes are not matched, because a model may make other calls in training:
    an auxiliary loss, a second view.

    Args:
        model: A built model.
        layers: Path -> batch norm layer.
        inputs: A batch of inputs, or its specs.

    Returns:
        The `TrainedCalls`; empty if the model cannot be traced.
    """
    if keras_models.always_passes_training_on(model):
        return TrainedCalls()
    training = _calls(model, layers, inputs, True)
    if training is None:
        return TrainedCalls()
    trained = {call.path for call in training if call.trains}
    partly = frozenset(call.path for call in training if not call.trains) & trained
    frozen = {call.path for call in training} - trained
    ignored: frozenset[Site] = frozenset()
    unmet = layers.keys() - trained - frozen
    if unmet or partly:
        calls = _calls(model, layers, inputs, PassedOn())
        frozen |= unmet & {call.path for call in calls or ()}
        if calls and partly and _paths(calls) == _paths(_calls(model, layers, inputs, False)):
            ignored = _fixed(calls, partly)
    return TrainedCalls(frozenset(frozen), partly, ignored)


def layers_to_sweep(
    model: keras.Model, include_frozen: bool, trained: Collection[str] | None = None
) -> dict[str, keras.Layer]:
    """The layers that `collect` would sweep before any trace, by path.

    Args:
        model: The model.
        include_frozen: See `collect`.
        trained: The paths of the layers that training has changed, `None` where nobody observed it.

    Raises:
        ValueError: If the model is not a built one, or has no such layers, or in a graph.
    """
    layers = all_layers(model)
    if trained is not None:
        return {path: layer for path, layer in layers.items() if path in trained}
    wanted = {path: layer for path, layer in layers.items() if include_frozen or layer.trainable}
    if not wanted:
        # Set to False first: a loaded Sequential is True with frozen layers, and TensorFlow skips
        # an assignment of the same value.
        raise ValueError(
            "Expected BatchNormalization layers that are not frozen. Received: model "
            f"{model.name!r} with trainable=False in all {len(layers)}. Unfreeze them (the "
            "callback that froze them has `unfreeze()`; of a loaded model, set trainable=False, "
            "then True, and compile it), or pass include_frozen=True to `collect`."
        )
    return wanted


def all_layers(model: keras.Model) -> dict[str, keras.Layer]:
    """The batch norm layers of a model by path, frozen or not.

    Raises:
        ValueError: If the model is not a built one, or has no such layers, or in a graph.
    """
    if not tf.executing_eagerly():
        raise ValueError(
            "Expected a sweep outside of tf.function. Received: a call while a graph is made."
        )
    keras_models.require_built(model)
    layers = keras_models.batch_norm_layers(model)
    keras_models.require_built(model, layers.values())
    if not layers:
        raise ValueError(
            f"Expected a model with BatchNormalization layers. Received: {model.name!r}, which has "
            "none."
        )
    return layers


def require_trained(
    model: keras.Model, layers: Mapping[str, keras.Layer], frozen: frozenset[str]
) -> None:
    """Raise `ValueError` if `call` trains none of the layers."""
    if frozen >= layers.keys():
        raise ValueError(
            f"Expected BatchNormalization layers that train. Received: model {model.name!r}, which "
            "calls all of them with training=False. Pass include_frozen=True to `collect`."
        )


def _calls(
    model: keras.Model, layers: Mapping[str, keras.Layer], inputs: Structure, training: Any
) -> list[_Call] | None:
    """Return the calls of layers in order, or `None` if the model cannot be traced."""
    calls: list[_Call] = []

    def observe(call: LayerCall) -> tf.Tensor:
        trains, fixed = bool(call.training), not isinstance(call.training, PassedOn)
        calls.append(_Call(Site(call.path, call.number), trains, fixed and not trains))
        return tf.cast(call.inputs, call.layer.compute_dtype)

    flat = tf.nest.flatten(inputs, expand_composites=True)

    def run(number, *flat):
        with inference(layers, observe, Draws(number)):
            batch = tf.nest.pack_sequence_as(inputs, flat, expand_composites=True)
            model(as_called(batch), training=training)
        return number

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in flat]
    try:
        tf.compat.v1.wrap_function(run, [tf.TensorSpec([], tf.int64), *specs])
    except Exception:  # The sweep raises the error for a batch that the model refuses.
        return None
    return calls


def _paths(calls: list[_Call] | None) -> list[str]:
    return [call.path for call in calls or ()]


def _fixed(calls: list[_Call], paths: frozenset[str]) -> frozenset[Site]:
    """Return the sites that fix `training=False`, of layers with calls that pass it on."""
    following = {call.path for call in calls if not (call.fixed or call.trains)}
    return frozenset(call.site for call in calls if call.fixed and call.path in following & paths)
