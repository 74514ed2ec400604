"""Extract subgraphs of a traced graph as functions, or import them into the current graph."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfbn.graphs.walks import hiding_nan


class Subgraphs:
    """Extract subgraphs of a graph.

    The time grows with the subgraph; for `tf.compat.v1.wrap_function(...).prune` it grows with the
    graph.

    Args:
        graph: A `tf.Graph`.
        captured: Name of a tensor -> tensor outside of the graph with its value.
        library: The `FunctionDef` protos that its operations call; by default from `graph`.
    """

    def __init__(
        self,
        graph: tf.Graph,
        captured: Mapping[str, tf.Tensor],
        library: Iterable[Any] | None = None,
    ):
        graph_def = graph.as_graph_def()
        self._versions = graph_def.versions
        self._library = list(graph_def.library.function if library is None else library)
        self._nodes = {node.name: node for node in graph_def.node}
        self._operations = {op.name: op for op in graph.get_operations()}
        self._order = {op: index for index, op in enumerate(self._operations.values())}
        self._captured = captured

    def missing(self, names: list[str]) -> list[str]:
        """Return the names without a tensor in the graph."""
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
            values: Name -> tensor of the current graph. Imported tensors are added.
        """

        def imported_before(op: tf.Operation) -> bool:
            return any(tensor.name in values for tensor in op.outputs)

        body = self._between(names, values, imported_before)
        for name in {*names, *_inputs(body)} - values.keys():
            if name in self._captured:
                graph = tf.compat.v1.get_default_graph()
                values[name] = graph.capture(self._captured[name])
        if body:
            wanted = [tensor.name for op in body for tensor in op.outputs]
            imported = self._imported(body, values, wanted, "served")
            values.update(zip(wanted, imported, strict=True))
        return [values[name] for name in names]

    def function(
        self,
        feeds: Sequence[tf.Tensor],
        optional: Sequence[tf.Tensor],
        fetches: Sequence[tf.Tensor],
        already_run: Callable[[tf.Operation], bool] = lambda op: False,
    ) -> tuple[Callable[..., list[tf.Tensor]], list[tf.Tensor]]:
        """Build the function from some tensors to others.

        Args:
            feeds: The tensors to feed.
            optional: Tensors to feed only if the function needs them.
            fetches: The tensors to compute.
            already_run: Predicate; control dependencies on these operations are dropped.

        Returns:
            `(function, needed)`: `needed` are the optional tensors that the function needs. It
            takes the values of `feeds` and `needed`, and returns the values of `fetches`, followed
            by empty tensors.
        """
        names = [tensor.name for tensor in fetches]
        known = {tensor.name for tensor in (*feeds, *optional)}
        body = self._between(names, known, already_run)
        entering = _inputs(body)
        needed = [tensor for tensor in optional if tensor.name in entering]
        given = [*feeds, *needed]
        captured = [name for name in self._captured if name in entering]
        wanted = [name for name in names if name not in known]
        hidden = [tensor.name for tensor in hiding_nan(body) if tensor.name not in known]

        def run(*values: tf.Tensor) -> list[tf.Tensor]:
            graph = tf.compat.v1.get_default_graph()
            outside = (*values, *(self._captured[name] for name in captured))
            inside = dict(
                zip(
                    [*(tensor.name for tensor in given), *captured],
                    map(graph.capture, outside),
                    strict=True,
                )
            )
            imported = self._imported(body, inside, wanted + hidden, "")
            computed = dict(zip(wanted, imported[: len(wanted)], strict=True))
            outputs = [
                computed[name] if name in computed else tf.identity(inside[name]) for name in names
            ]
            # Empty tensors, fetched so that no fused kernel hides NaN.
            return [*outputs, *(tensor[:0] for tensor in imported[len(wanted) :])]

        function = tf.compat.v1.wrap_function(
            run, [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in given]
        )
        return function, needed

    def _between(
        self,
        names: Iterable[str],
        known: Collection[str],
        already_run: Callable[[tf.Operation], bool],
    ) -> list[tf.Operation]:
        """Return the operations between known and captured tensors and others, in order."""
        body: dict[tf.Operation, None] = {}
        pending = [self._operations[name.partition(":")[0]] for name in self._unknown(names, known)]
        while pending:
            op = pending.pop()
            if op in body:
                continue
            body[op] = None
            inputs = {tensor.name: tensor.op for tensor in op.inputs}
            pending += [inputs[name] for name in self._unknown(inputs, known)]
            pending += [before for before in op.control_inputs if not already_run(before)]
        return sorted(body, key=self._order.__getitem__)

    def _unknown(self, names: Iterable[str], known: Collection[str]) -> list[str]:
        return [name for name in names if name not in known and name not in self._captured]

    def _imported(
        self,
        body: Sequence[tf.Operation],
        values: Mapping[str, tf.Tensor],
        wanted: list[str],
        prefix: str,
    ) -> list[tf.Tensor]:
        """Import operations into the current graph, and return some of its tensors."""
        graph_def = tf.compat.v1.GraphDef(versions=self._versions)
        names = {op.name for op in body}
        for op in body:
            node = graph_def.node.add()
            node.CopyFrom(self._nodes[op.name])
            node.attr.pop("_class", None)  # May name operations that are not imported.
            inputs = [name for name in node.input if name[0] != "^" or name[1:] in names]
            del node.input[:]
            node.input.extend(inputs)
        graph_def.library.function.extend(self._library)
        used = {name: values[name] for name in _inputs(body) & values.keys()}
        return tf.graph_util.import_graph_def(
            graph_def, input_map=used, return_elements=wanted, name=prefix
        )


def _inputs(body: Iterable[tf.Operation]) -> set[str]:
    return {tensor.name for op in body for tensor in op.inputs}
