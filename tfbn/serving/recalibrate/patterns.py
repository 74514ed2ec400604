"""Match the forms of batch norm in inference graphs.

A pattern is a name, or a tuple of operation types and the patterns of their inputs. All occurrences
of a name match the same value. Inputs of commutative operations match in both orders. Casts between
operations and reshapes of values per channel are skipped. To support another form of batch norm,
add it to `_PATTERNS`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

FUSED = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
_READS = ("ReadVariableOp", "Identity", "Cast", "Reshape", "StopGradient", "ExpandDims", "Squeeze")

_ADD, _MUL = ("Add", "AddV2"), ("Mul",)
_COMMUTATIVE = (*_ADD, *_MUL)
_SHIFTED = (_ADD, "variance", "epsilon")
_RSQRT = (("Rsqrt",), _SHIFTED)
_SQRT = (("Sqrt",), _SHIFTED)
_CENTERED = (("Sub",), "x", "mean")
_SCALE = (_MUL, _RSQRT, "gamma")
_ZERO = (_MUL, "zero", _RSQRT)
_DIVIDED = (("RealDiv",), _CENTERED, _SQRT)
_NORMALIZED = (_MUL, _CENTERED, _RSQRT)


def _affine(scale: tuple) -> list[tuple]:
    """Return the forms with a product of the mean, as in `tf.nn.batch_normalization`."""
    scaled, mean = (_MUL, "x", scale), (_MUL, "mean", scale)
    negative = (_MUL, (("Neg",), "mean"), scale)
    return [
        (_ADD, scaled, (("Sub",), "beta", mean)),
        (_ADD, scaled, negative),
        (_ADD, (("Sub",), scaled, mean), "beta"),
        (("Sub",), scaled, mean),
    ]


# In descending order of size, because larger patterns contain smaller ones.
_PATTERNS = [
    *_affine(_SCALE),
    *_affine(_RSQRT),
    (_ADD, (_MUL, _CENTERED, _SCALE), "beta"),
    *(
        pattern
        for core in (_DIVIDED, _NORMALIZED)
        for pattern in ((_ADD, (_MUL, core, "gamma"), "beta"), (_ADD, core, "beta"))
    ),
    # tfbn.BatchNormalization adds the mean of the centered input, 0, in inference too.
    *(
        pattern
        for scale, zero in ((_SCALE, (_MUL, _ZERO, "gamma")), (_RSQRT, _ZERO))
        for offset in ((_ADD, zero, "beta"), zero)
        for pattern in [(_ADD, (_MUL, _CENTERED, scale), offset)]
    ),
    (_MUL, _CENTERED, _SCALE),
    *((_MUL, core, "gamma") for core in (_DIVIDED, _NORMALIZED)),
    _DIVIDED,
    _NORMALIZED,
]


class Match(NamedTuple):
    """One call of a batch norm layer.

    Attributes:
        x: The tensor that enters.
        y: The tensor that leaves.
        parameters: `mean`, `variance`, and `gamma` and `beta` if the layer has them -> tensor.
        epsilon: The number added to the variance.
        axis: The axis of the channels.
        operations: The operations between `x`, the variables of mean and variance, and `y`.
    """

    x: tf.Tensor
    y: tf.Tensor
    parameters: dict[str, tf.Tensor]
    epsilon: float
    axis: int
    operations: list[tf.Operation]


def matches(graph: tf.Graph) -> Iterator[Match]:
    """Yield the calls of batch norm layers in a graph."""
    matched: set[tf.Operation] = set()
    # The last operation of a larger pattern comes after the smaller ones.
    for op in reversed(graph.get_operations()):
        if op not in matched and (match := _fused(op) or _unfused(op)):
            matched.update(match.operations)
            yield match


def variable(tensor: tf.Tensor) -> tf.Tensor | None:
    """Return the captured resource that a tensor reads, or `None` if it reads something else."""
    *_, tensor = [tensor, *(op.inputs[0] for op in reads(tensor))]
    resource = tensor.dtype == tf.resource and tensor.op.type == "Placeholder"
    return tensor if resource else None


def reads(tensor: tf.Tensor) -> Iterator[tf.Operation]:
    """Yield the operations through which a tensor reads a variable."""
    while tensor.op.type in _READS:
        yield tensor.op
        tensor = tensor.op.inputs[0]


def constant(tensor: tf.Tensor) -> np.ndarray | None:
    """Return the value of a constant, or `None`."""
    *_, tensor = [tensor, *(op.inputs[0] for op in reads(tensor))]
    return tf.get_static_value(tensor)


def _fused(op: tf.Operation) -> Match | None:
    # With is_training=True the kernel normalizes by its input: it implements layer norm.
    if op.type not in FUSED or op.get_attr("is_training"):
        return None
    x, *parameters = op.inputs
    named = dict(zip(("gamma", "beta", "mean", "variance"), parameters, strict=True))
    axis = 1 if op.get_attr("data_format").decode().startswith("NC") else -1
    operations = [op, *reads(named["mean"]), *reads(named["variance"])]
    return Match(x, op.outputs[0], named, op.get_attr("epsilon"), axis, operations)


def _unfused(op: tf.Operation) -> Match | None:
    for pattern in _PATTERNS:
        if op.type in pattern[0]:
            for bound, operations in _bindings(pattern, op.outputs[0], {}, []):
                if variable(bound["x"]) is None:
                    x, epsilon = bound.pop("x"), float(np.asarray(constant(bound.pop("epsilon"))))
                    axis = _axis(x, bound["mean"])
                    bound.pop("zero", None)
                    return Match(x, op.outputs[0], bound, epsilon, axis, operations)
    return None


def _bindings(
    pattern: str | tuple, tensor: tf.Tensor, bound: dict, operations: list
) -> Iterator[tuple[dict, list]]:
    """Yield name -> tensor, and the operations, for every way in which a pattern matches."""
    if isinstance(pattern, str):
        if _may_be(pattern, tensor) and _same(bound.get(pattern, tensor), tensor):
            statistic = pattern in ("mean", "variance")
            yield bound | {pattern: tensor}, operations + list(reads(tensor)) * statistic
        return
    kinds, *inputs = pattern
    casts = []
    while tensor.op.type == "Cast" or _broadcasts(tensor.op):
        casts.append(tensor.op)
        tensor = tensor.op.inputs[0]
    op = tensor.op
    if op.type not in kinds:
        return
    given = list(op.inputs)
    for order in [given, given[::-1]] if op.type in _COMMUTATIVE else [given]:
        partial = [(bound, [*operations, *casts, op])]
        for inner, entering in zip(inputs, order, strict=True):
            partial = [match for one in partial for match in _bindings(inner, entering, *one)]
        yield from partial


def _broadcasts(op: tf.Operation) -> bool:
    """Return whether an operation adds axes of size 1 to one value per channel."""
    return op.type == "Reshape" and op.inputs[0].shape.rank == 1


def _may_be(name: str, tensor: tf.Tensor) -> bool:
    if name == "x":
        return True
    if name in ("epsilon", "zero"):
        value = constant(tensor)
        return value is not None and np.ndim(value) == 0 and (name == "epsilon" or value == 0)
    return variable(tensor) is not None or constant(tensor) is not None


def _same(a: tf.Tensor, b: tf.Tensor) -> bool:
    """Return whether two tensors are one, or read one variable, or are equal constants."""
    if a is b:
        return True
    first, second = variable(a), variable(b)
    if first is not None and second is not None:
        return first.name == second.name
    value, other = constant(a), constant(b)
    return value is not None and other is not None and np.array_equal(value, other)


def _axis(x: tf.Tensor, mean: tf.Tensor) -> int:
    """Return the axis of `x` for the channels of a mean."""
    rank = mean.shape.rank or 1
    wide = [axis - rank for axis, size in enumerate(mean.shape) if size != 1]
    if len(wide) == 1 or x.shape.rank is None:
        return wide[0] if wide else -1
    # For a single channel: any axis of size 1, except the batch axis.
    single = [axis - x.shape.rank for axis, size in enumerate(x.shape) if axis and size == 1]
    return single[-1] if single else -1
