"""The checks before an exported version is put in place, each one a function in `CHECKS`."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.serving.export import signature
from tfbn.serving.export.endpoint import Saved

# How often the network's own rounding an export may be off. Folds of MobileNetV2, ResNet50,
# EfficientNetB0 and of networks that cancel large numbers were off by 0.1 to 0.8 of it.
_ROUNDINGS = 4
_DRAWS = 3

# The distance from 1 to the next number.
_EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-52}


class Written:
    """A version that was written and loaded again, beside the model that it must be.

    Args:
        model: The model that was exported, before any folding.
        serve: The endpoint as it was loaded.
        specs: Its arguments.
        inputs: The inputs that both are compared on.
        origin: Where these are from, in words.
        saved: The names of outputs and the ops of training, from when it was written.
        allow_nan: Whether outputs may be without a finite value.
        monitor: The endpoint `monitor` as it was loaded, or `None` without one.
    """

    def __init__(
        self,
        model: keras.Model,
        serve: Callable,
        specs: list,
        inputs: list,
        origin: str,
        saved: Saved,
        *,
        allow_nan: bool,
        monitor: Callable | None = None,
    ):
        self.model = model
        self.serve = serve
        self.specs = specs
        self.inputs = inputs
        self.origin = origin
        self.saved = saved
        self.allow_nan = allow_nan
        self.monitor = monitor

    @functools.cached_property
    def expected(self) -> dict[str, Any]:
        """The outputs of the model itself, by the names of the endpoint's."""
        try:
            return self._predict()
        except Exception as error:
            raise ValueError(
                "Expected a model that can be called on the inputs that its export is verified "
                f"with, {self.origin}. Received: {' '.join(str(error).split())}. Give inputs of "
                "its own as sample or as warmup, and in input_signature the sizes that it needs."
            ) from error

    @functools.cached_property
    def _network(self):
        predict = tf.function(lambda *args: self.model(*args, training=False), autograph=False)
        return predict.get_concrete_function(*self.specs)

    def _predict(self) -> dict[str, tf.Tensor]:
        return self._renamed(self._network(*keras.tree.flatten(self.inputs)))

    @functools.cached_property
    def answers(self) -> dict[str, Any]:
        """The outputs of the endpoint."""
        return signature.named_outputs(self.serve(*self.inputs))

    @functools.cached_property
    def monitored(self) -> dict[str, Any]:
        """The outputs of the endpoint `monitor`."""
        assert self.monitor is not None
        try:
            return self.monitor(*self.inputs)
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                "Expected batch norm layers whose rows are those of samples. Received: model "
                f"{self.model.name!r} ({' '.join(str(error.message).split())[:200]}). Give in "
                "monitor= the paths of other layers."
            ) from error

    @functools.cached_property
    def rounding(self) -> dict[str, float]:
        """How far outputs move when weights and inputs change by one unit in the last place.

        For each output the largest absolute difference of three random draws, in each of which
        every number moves up or down. Folding and other kernels round as much, so no export
        can be asked to be closer. 0 for a model that cannot be called with other weights.
        """
        largest = dict.fromkeys(self.expected, 0.0)
        perturbed = tf.function(
            lambda *args: self.model.stateless_call(*args, training=False)[0], autograph=False
        )
        generator = np.random.default_rng(0)
        epsilon = max(_EPSILON.get(dtype, 2**-23) for dtype in _compute_dtypes(self.model))

        def moved(x):
            x = tf.convert_to_tensor(x)
            if not x.dtype.is_floating:
                return x
            signs = generator.choice([-1.0, 1.0], x.shape)
            return x * tf.cast(1 + epsilon * signs, x.dtype)

        weights = [self.model.trainable_variables, self.model.non_trainable_variables]
        for _ in range(_DRAWS):
            state = [[moved(v) for v in variables] for variables in weights]
            inputs = keras.tree.map_structure(moved, self.inputs)
            try:
                outputs = self._renamed(perturbed(*state, *inputs))
            except Exception:  # Whatever a model's own code may raise.
                return dict.fromkeys(self.expected, 0.0)
            for name, (off, _) in differences(outputs, self.expected).items():
                largest[name] = max(largest[name], off if np.isfinite(off) else 0.0)
        return largest

    @functools.cached_property
    def expected_again(self) -> dict[str, Any]:
        """The outputs of the model itself, called a second time."""
        return self._predict()

    def _renamed(self, outputs: Any) -> dict[str, tf.Tensor]:
        named = signature.named_outputs(outputs)
        return {self.saved.output_names[name]: output for name, output in named.items()}

    @property
    def max_abs_difference(self) -> float:
        """The largest absolute difference between the endpoint and the model."""
        offs = [off for off, _ in differences(self.answers, self.expected).values()]
        return max(offs, default=0.0)

    def tolerance(self, scale: float) -> float:
        """How far an output may be off: graphs that are optimised apart may round apart.

        Args:
            scale: The largest absolute value of the output, or 1 if that is larger.
        """
        low = {"float16", "bfloat16"} & _compute_dtypes(self.model)
        return scale * (2e-2 if low else 1e-3)


def _compute_dtypes(model: keras.Model) -> set[str]:
    return {layer.compute_dtype for layer in keras_models.layers(model).values()}


def no_layer_is_in_training_mode(written: Written) -> None:
    """Batch norm layers use their population statistics, and update nothing."""
    for layer, op in written.saved.training_ops:
        raise ValueError(
            "Expected every batch norm layer to use its population statistics. Received: model "
            f"{written.model.name!r}, whose layer {layer!r} computes those of the batch ({op}) "
            "although the model was called with training=False. Look for training=True where the "
            "layer is called, or set its trainable to False."
        )


def outputs_are_numbers(written: Written) -> None:
    """Every floating-point output has finite values: NaN and infinity prove nothing."""
    values = {name: y for name, y in written.expected.items() if y.dtype.is_floating}
    finite = {name: np.isfinite(np.asarray(y, np.float64)) for name, y in values.items()}
    if written.allow_nan:
        return
    for name, where in finite.items():
        if where.size and not where.any():
            raise ValueError(
                f"Expected outputs that are numbers. Received: model {written.model.name!r}, whose "
                f"output {name!r} is NaN or infinite in every value on {written.origin}. Look for "
                "NaN in weights and statistics, give inputs of its own as sample, or export it "
                "as it is with allow_nan=True."
            )
        if not where.all():
            warnings.warn(
                f"Output {name!r} of model {written.model.name!r} is NaN or infinite in "
                f"{where.size - where.sum()} of {where.size} values on {written.origin}. The "
                "export is verified on the others only; inputs of its own as sample verify more.",
                stacklevel=3,
            )


def calls_agree(written: Written) -> None:
    """Two calls of the model on the same inputs have the same outputs.

    The other checks compare calls. A seed set for the whole process makes the first call of the
    model and the first call of the endpoint draw alike, so neither shows random numbers alone.
    """
    for name, (off, scale) in differences(written.expected_again, written.expected).items():
        if off > written.tolerance(scale):
            raise ValueError(
                f"Expected outputs that are the same in every call. Received: model "
                f"{written.model.name!r}, whose outputs {name!r} differ by {off:.3g} between two "
                f"calls on {written.origin}. Look for layers that draw random numbers in inference "
                "mode too, or that keep a state between calls."
            )


def predicts_like_the_model(written: Written) -> None:
    """The endpoint's outputs are those of the model."""
    for name, (off, scale) in differences(written.answers, written.expected).items():
        if off <= written.tolerance(scale):
            continue
        rounding = written.rounding[name]
        if not off <= _ROUNDINGS * rounding:
            raise ValueError(
                f"Expected the SavedModel to predict the same as model {written.model.name!r}, "
                f"within {written.tolerance(scale):.3g} or {_ROUNDINGS} times the network's own "
                f"rounding, {rounding:.3g}. Received: outputs {name!r} that differ by {off:.3g} on "
                f"{written.origin}. Give inputs of its own as sample."
            )
        warnings.warn(
            f"Output {name!r} of the export of model {written.model.name!r} differs by {off:.3g} "
            f"on {written.origin}. The network itself is as inexact there: its output moves by "
            f"{rounding:.3g} when its weights and inputs change by one unit in the last place.",
            stacklevel=3,
        )


def samples_are_independent(written: Written) -> None:
    """The outputs of the first sample do not depend on the other samples of its batch."""
    alone, among = (_first(y) for y in (written.answers, _among_others(written, written.serve)))
    for name, (leak, scale) in differences(among, alone).items():
        if leak <= written.tolerance(scale) or leak <= _ROUNDINGS * written.rounding[name]:
            continue
        raise ValueError(
            "Expected outputs of a sample that do not depend on the other samples of its "
            f"batch. Received: model {written.model.name!r}, where {name!r} differs by {leak:.3g} "
            f"between two batches, one of {written.origin} and one with zeros in the place of "
            "other samples. Look for layers that compute over the batch axis, as batch norm does "
            "in training mode."
        )


def monitor_answers_like_serve(written: Written) -> None:
    """The endpoint `monitor` has the outputs of `serve`, up to the rounding of another graph."""
    if written.monitor is None:
        return
    for name, (off, scale) in differences(written.monitored, written.answers).items():
        if off > written.tolerance(scale) and not off <= _ROUNDINGS * written.rounding[name]:
            raise ValueError(
                "Expected the endpoint monitor to predict as serve does. Received: model "
                f"{written.model.name!r}, whose outputs {name!r} differ by {off:.3g} on "
                f"{written.origin}. Export without monitor."
            )


def monitor_measures_samples(written: Written) -> None:
    """The moments of the first sample do not depend on the other samples of its batch."""
    if written.monitor is None:
        return
    alone = _first(written.monitored)
    among = _first(_among_others(written, written.monitor))
    for name in [name for name in alone if name not in written.answers]:
        [(off, scale)] = differences({name: among[name]}, {name: alone[name]}).values()
        if off > written.tolerance(scale):
            raise ValueError(
                f"{name!r} of a sample depends on the other samples of its batch in model "
                f"{written.model.name!r}, by {off:.3g} on {written.origin}. Give in monitor= the "
                "paths of other layers."
            )


def _among_others(written: Written, endpoint: Callable) -> dict[str, tf.Tensor]:
    """The answers to the first sample and to zeros, or to itself again if zeros are an error."""

    def others(x, spec, value):
        if not x.shape.rank:
            return x
        rest = x[1:]
        if x.shape[0] == 1 and spec.shape[0] is None:
            rest = x
        return tf.concat([x[:1], value(x[:1], rest)], 0)

    for value in (lambda first, rest: tf.zeros_like(rest), _repeated):
        inputs = keras.tree.map_structure(
            lambda x, spec, value=value: others(x, spec, value), written.inputs, written.specs
        )
        try:
            return signature.named_outputs(endpoint(*inputs))
        except tf.errors.OpError as error:
            refused = error
    raise refused


def _repeated(first: tf.Tensor, rest: tf.Tensor) -> tf.Tensor:
    return tf.repeat(first, rest.shape[0], 0)


def _first(outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: y[:1] if y.shape.rank else y for name, y in outputs.items()}


def differences(
    outputs: dict[str, Any], expected: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """For each output the largest absolute difference, and the scale to judge it by.

    The scale is the largest absolute value that was expected and is finite, or 1 if that is
    larger. NaN and infinity are equal to themselves, and infinitely far from all else.
    """
    return {name: _difference(outputs[name], want) for name, want in expected.items()}


def _difference(got: tf.Tensor, want: tf.Tensor) -> tuple[float, float]:
    if got.shape != want.shape:
        return np.inf, 1.0
    if want.dtype == tf.string:
        return (0.0 if np.array_equal(got, want) else np.inf), 1.0
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(got - want))
    finite = np.abs(want[np.isfinite(want)])
    off = float(np.max(np.nan_to_num(apart, nan=np.inf), initial=0.0))
    return off, max(1.0, float(np.max(finite, initial=0.0)))


CHECKS = (
    no_layer_is_in_training_mode,
    outputs_are_numbers,
    calls_agree,
    predicts_like_the_model,
    samples_are_independent,
    monitor_answers_like_serve,
    monitor_measures_samples,
)
