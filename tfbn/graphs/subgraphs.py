"""Functions that compute some tensors of a graph from others, of just the operations between."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

# oneDNN fuses these with the operation before them, and the fused kernel gives 0 for NaN where
# ReLU gives NaN.
_HIDE_NAN = {"Relu", "Relu6"}
_ADDS_BIAS = {"BiasAdd", "Add", "AddV2"}
_CONTRACTIONS = {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"}


def sources(op: tf.Operation) -> list[tf.Operation]:
    """The operations that an operation waits for."""
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)


def ancestors(tensors: Iterable[tf.Tensor]) -> list[tf.Operation]:
    """The operations that some tensors depend on."""
    seen, pending = {}, [tensor.op for tensor in tensors]
    while pending:
        op = pending.pop()
        if id(op) not in seen:
            seen[id(op)] = op
            pending += sources(op)
    return list(seen.values())


class Extraction:
    """Builds functions out of a graph.

    `tf.compat.v1.wrap_function(...).prune` does the same in a time that grows with the whole
    graph. Here it grows with the part that is taken.

    Args:
        graph: A `FuncGraph`. The variables that it captures are read by the functions.
    """

    def __init__(self, graph: tf.Graph):
        self._graph_def = graph.as_graph_def()
        self._nodes = {node.name: node for node in self._graph_def.node}
        self._order = {id(op): i for i, op in enumerate(graph.get_operations())}
        self._captured = {id(inner): (inner, outer) for outer, inner in graph.captures}

    def function(
        self,
        feeds: Sequence[tf.Tensor],
        optional: Sequence[tf.Tensor],
        fetches: Sequence[tf.Tensor],
        ran: Callable[[tf.Operation], bool] = lambda op: False,
    ) -> tuple[Callable[..., list[tf.Tensor]], list[tf.Tensor]]:
        """The function from some tensors to others.

        Args:
            feeds: The tensors that are given.
            optional: Tensors that are given too if the function needs them.
            fetches: The tensors that are computed.
            ran: Whether an operation has run before. Whoever waits for its effect, and not for its
                outputs, need not wait.

        Returns:
            The function, which takes the values of `feeds` and of the optional tensors that it
            needs, and gives a list of values; and the list of those optional tensors.
        """
        body, needed, captured = self._between(feeds, optional, fetches, ran)
        given = [*feeds, *needed]
        names = {tensor.name: i for i, tensor in enumerate([*given, *captured])}
        wanted = [tensor.name for tensor in fetches if tensor.name not in names]
        seen = [tensor.name for tensor in _before_hiding(body) if tensor.name not in names]
        graph_def = self._copied(body)
        used = {tensor.name for op in body for tensor in op.inputs}
        outer = [self._captured[id(tensor)][1] for tensor in captured]

        def run(*values):
            graph = tf.compat.v1.get_default_graph()
            inside = [graph.capture(value) for value in (*values, *outer)]
            imported = tf.graph_util.import_graph_def(
                graph_def,
                input_map={name: inside[i] for name, i in names.items() if name in used},
                return_elements=wanted + seen,
                name="",
            )
            made, hidden = iter(imported[: len(wanted)]), imported[len(wanted) :]
            outputs = [
                tf.identity(inside[names[tensor.name]]) if tensor.name in names else next(made)
                for tensor in fetches
            ]
            return outputs, [tensor[:0] for tensor in hidden]

        function = tf.compat.v1.wrap_function(
            run, [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in given]
        )
        return lambda *values: function(*values)[0], needed

    def _between(
        self,
        feeds: Sequence[tf.Tensor],
        optional: Sequence[tf.Tensor],
        fetches: Sequence[tf.Tensor],
        ran: Callable[[tf.Operation], bool],
    ) -> tuple[list[tf.Operation], list[tf.Tensor], list[tf.Tensor]]:
        fed, offered = ({id(tensor) for tensor in tensors} for tensors in (feeds, optional))
        body, needed, captured = {}, {}, {}
        pending = [tensor.op for tensor in fetches if id(tensor) not in fed]
        while pending:
            op = pending.pop()
            if id(op) in body:
                continue
            body[id(op)] = op
            for tensor in op.inputs:
                if id(tensor) in fed:
                    continue
                if id(tensor) in offered:
                    needed[id(tensor)] = tensor
                elif id(tensor) in self._captured:
                    captured[id(tensor)] = tensor
                else:
                    pending.append(tensor.op)
            pending += [before for before in op.control_inputs if not ran(before)]
        ordered = sorted(body.values(), key=lambda op: self._order[id(op)])
        return ordered, list(needed.values()), list(captured.values())

    def _copied(self, body: Iterable[tf.Operation]) -> tf.compat.v1.GraphDef:
        graph_def = tf.compat.v1.GraphDef(versions=self._graph_def.versions)
        names = {op.name for op in body}
        for op in body:
            node = graph_def.node.add()
            node.CopyFrom(self._nodes[op.name])
            inputs = [name for name in node.input if name[0] != "^" or name[1:] in names]
            if len(inputs) < len(node.input):
                del node.input[:]
                node.input.extend(inputs)
        graph_def.library.CopyFrom(self._graph_def.library)
        return graph_def


def kept_apart(operations: Iterable[tf.Operation]) -> list[tf.Tensor]:
    """Tensors to fetch so that no kernel hides NaN, each without values.

    Another reader of the tensor between a contraction and its activation keeps the two apart.
    """
    return [tensor[:0] for tensor in _before_hiding(operations)]


def _before_hiding(body: Iterable[tf.Operation]) -> Iterator[tf.Tensor]:
    """The tensors between a contraction and an activation whose fused kernel hides NaN."""
    for op in body:
        if op.type in _HIDE_NAN:
            [tensor] = op.inputs
            before = tensor.op
            if before.type in _ADDS_BIAS:
                before = before.inputs[0].op
            if before.type in _CONTRACTIONS:
                yield tensor
