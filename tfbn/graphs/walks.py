"""Walk a traced graph: find ancestors, recurrent loops, and where NaN propagates."""

from collections.abc import Iterable, Iterator, Mapping

import tensorflow as tf

# Private. No public attribute shows whether a graph is the body of a loop.
from tensorflow.python.ops.control_flow_v2_func_graphs import WhileBodyFuncGraph

# Operation -> the operations that it depends on directly. Operations come after their sources.
Sources = Mapping[tf.Operation, list[tf.Operation]]

_LOOKS_FOR_NAN = {"IsNan", "IsInf", "IsFinite", "MulNoNan"}
# Ops that never propagate NaN.
_WITHOUT_NAN = {"Bucketize", "Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
# Ops that may drop NaN, because they select some values. (`boolean_mask` gathers.) The inputs of
# layers are always checked.
_WITHOUT_NAN |= {"Select", "SelectV2", "Where"}
_CHOOSING = {"Gather", "GatherV2", "GatherNd", "Slice", "StridedSlice", "DynamicPartition"}
_CHOOSING |= {"Split", "SplitV", "Unpack"}

# oneDNN fuses these with the operation before them, and the fused kernel returns 0 for NaN, not
# NaN like ReLU.
_HIDE_NAN = {"Relu", "Relu6"}
_ADDS_BIAS = {"BiasAdd", "Add", "AddV2"}
_CONTRACTIONS = {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"}


def sources_of(graph: tf.Graph) -> Sources:
    """Return the `Sources` of all operations of a graph."""
    return {op: _sources(op) for op in graph.get_operations()}


def ancestors(tensors: Iterable[tf.Tensor]) -> list[tf.Operation]:
    """Return the operations that some tensors depend on."""
    seen: dict[tf.Operation, None] = {}
    pending = [tensor.op for tensor in tensors]
    while pending:
        op = pending.pop()
        if op not in seen:
            seen[op] = None
            pending += _sources(op)
    return list(seen)


def _sources(op: tf.Operation) -> list[tf.Operation]:
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)


def is_vectorized(tensors: Iterable[tf.Tensor]) -> bool:
    """Whether some tensors are inside a function that `tf.vectorized_map` vectorizes.

    Such a function is traced for one of its elements, the first, whose number is the default of a
    placeholder. Only this one is seen.
    """
    return any(op.type == "PlaceholderWithDefault" for op in ancestors(tensors))


def feeds_itself(inputs: Iterable[tf.Tensor], outputs: tf.Tensor) -> bool:
    """Whether the inputs of a call in a loop depend on its outputs of an earlier iteration.

    Returns `True` for every call in a branch or loop inside the loop, which is not always correct.
    """
    body = outputs.graph
    if not isinstance(body, WhileBodyFuncGraph):
        return body.outer_graph is not None and _in_loop(body.outer_graph)
    # A loop variable has the same index in the inputs and the outputs of the body.
    carried = {id(out): entry for entry, out in zip(body.inputs, body.outputs, strict=False)}
    input_ids = {id(tensor) for tensor in inputs}
    seen: set[int] = set()
    pending = [outputs]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in input_ids:
            return True
        pending += [out for op in tensor.consumers() for out in op.outputs]
        if id(tensor) in carried:
            pending.append(carried[id(tensor)])
    return False


def _in_loop(graph: tf.Graph | None) -> bool:
    while graph is not None:
        if isinstance(graph, WhileBodyFuncGraph):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def spreading_nan(inputs: Iterable[tf.Tensor], outputs: list[tf.Tensor]) -> list[int]:
    """Return the indices of the inputs whose NaN would propagate to some outputs.

    Returns an empty list for a graph that checks for NaN, because it may support NaN.
    """
    if any(map(_looks_for_nan, ancestors(outputs))):
        return []
    spread = _carrying_nan(outputs)
    return [
        index
        for index, tensor in enumerate(inputs)
        if tensor.dtype.is_floating and id(tensor) in spread
    ]


def _looks_for_nan(op: tf.Operation) -> bool:
    unequal_to_itself = op.type in ("Equal", "NotEqual") and op.inputs[0] is op.inputs[1]
    return op.type in _LOOKS_FOR_NAN or unequal_to_itself


def _carrying_nan(tensors: Iterable[tf.Tensor]) -> set[int]:
    """Return the ids of the tensors whose NaN propagates to others."""
    seen, pending = set(), list(tensors)
    while pending:
        tensor = pending.pop()
        if id(tensor) not in seen and tensor.dtype != tf.bool:
            seen.add(id(tensor))
            if tensor.op.type in _CHOOSING:
                pending += [source for source in tensor.op.inputs if not source.dtype.is_floating]
            elif tensor.op.type not in _WITHOUT_NAN:
                pending += tensor.op.inputs
    return seen


def hiding_nan(operations: Iterable[tf.Operation]) -> Iterator[tf.Tensor]:
    """Yield the tensors between a contraction and an activation whose fused kernel hides NaN.

    A second reader of such a tensor prevents the fusion.
    """
    for op in operations:
        if op.type in _HIDE_NAN:
            [tensor] = op.inputs
            before = tensor.op
            if before.type in _ADDS_BIAS:
                before = before.inputs[0].op
            if before.type in _CONTRACTIONS:
                yield tensor
