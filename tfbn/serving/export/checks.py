"""Verify an exported version before it is put in place; `exporting` checks its arguments."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.models.comparison import Difference, differences
from tfbn.serving.export import signature
from tfbn.serving.export.endpoint import Saved

# An export may differ by this multiple of the network's rounding. Folds of MobileNetV2, ResNet50,
# EfficientNetB0 and of networks that cancel large numbers differed by 0.1 to 0.8 of it.
_ROUNDINGS = 4
_DRAWS = 3

# The distance from 1 to the next number.
_EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-52}


@dataclasses.dataclass(eq=False, kw_only=True)
class Candidate:
    """A version to verify, loaded again, with the model that it is compared with.

    Attributes:
        model: The model that was exported, before folding.
        serve: The loaded endpoint.
        specs: The arguments of the endpoint.
        inputs: The inputs for the comparison.
        origin: The origin of the inputs in words, for messages.
        saved: The names of outputs and the training operations, from the export.
        allow_nan: Whether outputs may have no finite value.
        monitor: The loaded endpoint `monitor`, or `None` without one.
    """

    model: keras.Model
    serve: Callable[..., Any]
    specs: list
    inputs: list
    origin: str
    saved: Saved
    allow_nan: bool
    monitor: Callable[..., dict[str, Any]] | None = None

    @functools.cached_property
    def expected(self) -> dict[str, Any]:
        """The outputs of the model, by the endpoint's names."""
        try:
            return self._predict()
        except Exception as error:
            raise ValueError(
                f"Cannot call the model on {self.origin}: {' '.join(str(error).split())}. Give "
                "inputs as sample or as warmup, and all known sizes in input_signature."
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
                "Expected a row for each sample in monitored layers. Received: "
                f"{' '.join(str(error.message).split())[:200]}. Pass other layers as monitor."
            ) from error

    @functools.cached_property
    def rounding(self) -> dict[str, float]:
        """The change of each output when weights and inputs change by one unit in the last place.

        It is the largest absolute difference of three random draws, in which every number changes
        up or down. Folding and other kernels have rounding errors of this size, so an export cannot
        be closer. 0 for a model that cannot be called with other weights.
        """
        largest = dict.fromkeys(self.expected, 0.0)
        perturbed = tf.function(
            lambda *args: self.model.stateless_call(*args, training=False)[0], autograph=False
        )
        generator = np.random.default_rng(0)
        epsilon = max(_EPSILON.get(dtype, 2**-23) for dtype in _compute_dtypes(self.model))

        def perturb(x: Any) -> tf.Tensor:
            x = tf.convert_to_tensor(x)
            if not x.dtype.is_floating:
                return x
            signs = generator.choice([-1.0, 1.0], x.shape)
            return x * tf.cast(1 + epsilon * signs, x.dtype)

        weights = [self.model.trainable_variables, self.model.non_trainable_variables]
        for _ in range(_DRAWS):
            state = [[perturb(v) for v in variables] for variables in weights]
            inputs = keras.tree.map_structure(perturb, self.inputs)
            try:
                outputs = self._renamed(perturbed(*state, *inputs))
            except Exception:  # The model's code may raise anything.
                return dict.fromkeys(self.expected, 0.0)
            for name, (change, _) in differences(outputs, self.expected).items():
                largest[name] = max(largest[name], change if np.isfinite(change) else 0.0)
        return largest

    @functools.cached_property
    def expected_again(self) -> dict[str, Any]:
        """The outputs of the model in a second call."""
        return self._predict()

    def _renamed(self, outputs: Any) -> dict[str, tf.Tensor]:
        named = signature.named_outputs(outputs)
        return {self.saved.output_names[name]: output for name, output in named.items()}

    def differs(self, name: str, difference: float, expected: str, advice: str) -> ValueError:
        """Return an error for an output that differs."""
        received = f"{name!r} differs by {difference:.3g} on {self.origin}"
        return ValueError(f"Expected {expected}. Received: {received}. {advice}")

    @property
    def max_abs_difference(self) -> float:
        """The largest absolute difference between the endpoint and the model."""
        pairs = differences(self.answers, self.expected).values()
        return max((difference.absolute for difference in pairs), default=0.0)

    @functools.cached_property
    def low_precision(self) -> bool:
        """Whether a layer computes in half precision, which allows larger differences."""
        return not {"float16", "bfloat16"}.isdisjoint(_compute_dtypes(self.model))

    def differing(
        self, outputs: dict[str, Any], expected: dict[str, Any], roundings: int = 0
    ) -> Iterator[tuple[str, Difference]]:
        """Yield the outputs that differ by more than is allowed.

        Args:
            outputs, expected: Name -> output.
            roundings: The multiple of `rounding` that is allowed too.
        """
        for name, difference in differences(outputs, expected).items():
            allowed = difference.tolerance(self.low_precision)
            if difference.absolute > allowed and not (
                roundings and difference.absolute <= roundings * self.rounding[name]
            ):
                yield name, difference


def _compute_dtypes(model: keras.Model) -> set[str]:
    return {layer.compute_dtype for layer in keras_models.layers(model).values()}


def no_layer_is_in_training_mode(candidate: Candidate) -> None:
    """Require that batch norm layers use their population statistics and update nothing."""
    for layer, op in candidate.saved.training_ops:
        raise ValueError(
            f"Layer {layer!r} computes batch statistics in inference ({op}). Remove training=True "
            "from its call, or set its trainable to False."
        )


def outputs_are_numbers(candidate: Candidate) -> None:
    """Require finite values in every floating-point output: NaN and infinity verify nothing."""
    values = {name: y for name, y in candidate.expected.items() if y.dtype.is_floating}
    finite = {name: np.isfinite(np.asarray(y, np.float64)) for name, y in values.items()}
    if candidate.allow_nan:
        return
    for name, where in finite.items():
        if where.size and not where.any():
            raise ValueError(
                f"Output {name!r} has no finite value on {candidate.origin}. Give a sample, or "
                "set allow_nan=True."
            )
        if not where.all():
            warnings.warn(
                f"Output {name!r} of model {candidate.model.name!r} is NaN or infinite in "
                f"{where.size - where.sum()} of {where.size} values on {candidate.origin}. The "
                "export is verified on the others only; inputs of its own as sample verify more.",
                stacklevel=3,
            )


def calls_agree(candidate: Candidate) -> None:
    """Require equal outputs of two calls of the model on the same inputs.

    A global seed gives the first calls of the model and of the endpoint the same random numbers, so
    the other checks do not detect them.
    """
    for name, (difference, _) in candidate.differing(candidate.expected_again, candidate.expected):
        raise candidate.differs(
            name,
            difference,
            "equal outputs in two calls",
            "Look for layers that draw random numbers.",
        )


def predicts_like_the_model(candidate: Candidate) -> None:
    """Require that the endpoint predicts like the model."""
    for name, difference in candidate.differing(candidate.answers, candidate.expected):
        absolute, rounding = difference.absolute, candidate.rounding[name]
        if not absolute <= _ROUNDINGS * rounding:
            allowed = difference.tolerance(candidate.low_precision)
            limit = f"{allowed:.3g} or {_ROUNDINGS} roundings of {rounding:.3g}"
            wanted = f"the model's predictions, within {limit}"
            raise candidate.differs(name, absolute, wanted, "Give other inputs as sample.")
        warnings.warn(
            f"Output {name!r} of the export of model {candidate.model.name!r} differs by "
            f"{absolute:.3g} on {candidate.origin}. The network is as inexact there: its output "
            f"moves by {rounding:.3g} if weights and inputs change by one unit in the last place.",
            stacklevel=3,
        )


def samples_are_independent(candidate: Candidate) -> None:
    """Require that the outputs of a sample do not depend on the other samples of its batch."""
    alone = _first(candidate.answers)
    among = _first(_among_others(candidate, candidate.serve))
    for name, (leak, _) in candidate.differing(among, alone, _ROUNDINGS):
        raise candidate.differs(
            name, leak, "independent samples", "Look for layers that compute over the batch axis."
        )


def monitor_answers_like_serve(candidate: Candidate) -> None:
    """Require that the endpoint `monitor` has the outputs of `serve`, up to rounding."""
    if candidate.monitor is None:
        return
    for name, (difference, _) in candidate.differing(
        candidate.monitored, candidate.answers, _ROUNDINGS
    ):
        raise candidate.differs(
            name, difference, "monitor to predict as serve does", "Export without monitor."
        )


def monitor_measures_samples(candidate: Candidate) -> None:
    """Require that the moments of a sample do not depend on the other samples of its batch."""
    if candidate.monitor is None:
        return
    alone = _first(candidate.monitored)
    among = _first(_among_others(candidate, candidate.monitor))
    moments = {name: y for name, y in alone.items() if name not in candidate.answers}
    for name, (difference, _) in candidate.differing(among, moments):
        raise candidate.differs(
            name, difference, "moments of independent samples", "Pass other layers as monitor."
        )


def _among_others(candidate: Candidate, endpoint: Callable[..., Any]) -> dict[str, tf.Tensor]:
    """Return the answers to the first sample and zeros, or to its copies if zeros are an error."""

    def others(x: tf.Tensor, spec: tf.TensorSpec, value: Callable[..., tf.Tensor]) -> tf.Tensor:
        if not x.shape.rank:
            return x
        rest = x[1:]
        if x.shape[0] == 1 and spec.shape[0] is None:
            rest = x
        return tf.concat([x[:1], value(x[:1], rest)], 0)

    for value in (lambda first, rest: tf.zeros_like(rest), _repeated):
        inputs = keras.tree.map_structure(
            lambda x, spec, value=value: others(x, spec, value), candidate.inputs, candidate.specs
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


CHECKS = (
    no_layer_is_in_training_mode,
    outputs_are_numbers,
    calls_agree,
    predicts_like_the_model,
    samples_are_independent,
    monitor_answers_like_serve,
    monitor_measures_samples,
)
