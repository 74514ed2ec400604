"""Import a traced graph into the graph that is being built, piece by piece."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf


class GraphImporter:
    """Imports tensors of one graph, with the operations that they need, into the current graph.

    Args:
        graph: A `tf.Graph`.
        captured: name of a tensor -> the tensor outside of the graph whose value it has.
        library: The `FunctionDef` protos that its operations name; by default those in `graph`.
    """

    def __init__(
        self,
        graph: tf.Graph,
        captured: dict[str, tf.Tensor],
        library: Iterable[Any] | None = None,
    ):
        self._graph_def = graph.as_graph_def()
        self._library = list(self._graph_def.library.function if library is None else library)
        self._nodes = {node.name: node for node in self._graph_def.node}
        self._operations = {op.name: op for op in graph.get_operations()}
        self._order = {name: place for place, name in enumerate(self._operations)}
        self._captured = captured

    def missing(self, names: list[str]) -> list[str]:
        """Return the names that no tensor of the graph has."""
        return [
            name
            for name in names
            if (op := self._operations.get(name.partition(":")[0])) is None
            or name not in [tensor.name for tensor in op.outputs]
        ]

    def tensors(self, names: list[str], values: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        """Return tensors of the graph as tensors of the current graph.

        Args:
            names: Their names.
            values: name -> tensor of the current graph. Imported tensors are added.
        """
        body = self._between(names, values)
        if body:
            # Operations imported before have run, so control dependencies on them are dropped.
            wanted = [tensor.name for op in body for tensor in op.outputs]
            used = {tensor.name for op in body for tensor in op.inputs} - set(wanted)
            imported = tf.graph_util.import_graph_def(
                self._copied(body),
                input_map={name: values[name] for name in used},
                return_elements=wanted,
                name="served",
            )
            values.update(zip(wanted, imported, strict=True))
        return [values[name] for name in names]

    def _between(self, names: list[str], values: dict[str, tf.Tensor]) -> list[tf.Operation]:
        body: dict[str, tf.Operation] = {}
        pending = [name for name in names if name not in values]
        waiting: list[tf.Operation] = []
        while pending or waiting:
            if pending:
                name = pending.pop()
                if name in values:
                    continue
                if name in self._captured:
                    graph = tf.compat.v1.get_default_graph()
                    values[name] = graph.capture(self._captured[name])
                    continue
                op = self._operations[name.partition(":")[0]]
            else:
                op = waiting.pop()
            if op.name in body or any(tensor.name in values for tensor in op.outputs):
                continue
            body[op.name] = op
            pending += [tensor.name for tensor in op.inputs]
            waiting += op.control_inputs
        return sorted(body.values(), key=lambda op: self._order[op.name])

    def _copied(self, body: list[tf.Operation]) -> tf.compat.v1.GraphDef:
        graph_def = tf.compat.v1.GraphDef(versions=self._graph_def.versions)
        names = {op.name for op in body}
        for op in body:
            node = graph_def.node.add()
            node.CopyFrom(self._nodes[op.name])
            node.attr.pop("_class", None)  # Operations to be placed with, which may be elsewhere.
            inputs = [name for name in node.input if name[0] != "^" or name[1:] in names]
            del node.input[:]
            node.input.extend(inputs)
        graph_def.library.function.extend(self._library)
        return graph_def
