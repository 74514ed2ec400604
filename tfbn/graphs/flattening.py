"""Inline the function calls of a loaded signature into one flat graph.

Tools nest functions differently: a signature calls a function of the model, which may call
functions of its layers. In the flat graph every operation of inference can be observed, except in
bodies of loops and branches.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

# Private. The loader stores the functions that a signature calls by name only, and no public
# function returns the graph of a `FunctionDef`.
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from tfbn.graphs.subgraphs import Subgraphs

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}


def flattened(signature: Any) -> Any:
    """Return a concrete function that computes what a signature computes, in a flat graph.

    Args:
        signature: A signature of a SavedModel, as `tf.saved_model.load` returns it. The new
            function takes its arguments by position, in the order of their sorted names, and
            captures the same tensors; it does not keep the variables behind them alive.
    """
    specs = signature.structured_input_signature[1]
    graph = signature.graph
    library = _library(graph)
    names = [tensor.name for tensor in graph.inputs]
    captured = dict(zip(names[len(specs) :], signature.captured_inputs, strict=True))

    def flat(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        # TensorFlow flattens arguments and outputs by sorted names.
        values = dict(zip(names, inputs, strict=False))
        outputs = _run(graph, library, captured, values, graph.outputs)
        return dict(zip(sorted(signature.structured_outputs), outputs, strict=True))

    named = [tf.TensorSpec(specs[name].shape, specs[name].dtype, name) for name in sorted(specs)]
    return tf.function(flat, autograph=False).get_concrete_function(*named)


def bodies(graph: tf.Graph, library: Mapping[str, Any] | None = None) -> Iterator[tf.Graph]:
    """Yield a graph and the graphs of the functions that it calls, unused operations included."""
    library = _library(graph) if library is None else library
    yield graph
    for op in graph.get_operations():
        if op.type in _CALLS:
            yield from bodies(_body(op, library), library)


def _run(
    graph: tf.Graph,
    library: Mapping[str, Any],
    captured: dict[str, tf.Tensor],
    values: dict[str, tf.Tensor],
    outputs: list[tf.Tensor],
) -> list[tf.Tensor]:
    """Import a graph into the current one, with the bodies of the functions that it calls."""
    importer = Subgraphs(graph, captured, library.values())
    for op in graph.get_operations():
        if op.type in _CALLS:
            body = _body(op, library)
            inputs = importer.tensors([tensor.name for tensor in op.inputs], values)
            inner = dict(zip((tensor.name for tensor in body.inputs), inputs, strict=True))
            results = _run(body, library, {}, inner, body.outputs)
            values.update(zip((tensor.name for tensor in op.outputs), results, strict=True))
    return importer.tensors([tensor.name for tensor in outputs], values)


def _library(graph: tf.Graph) -> dict[str, Any]:
    return {function.signature.name: function for function in graph.as_graph_def().library.function}


def _body(call: tf.Operation, library: Mapping[str, Any]) -> Any:
    with tf.init_scope():  # The loader has registered the functions of the body there.
        return function_def_to_graph(library[call.get_attr("f").name])
