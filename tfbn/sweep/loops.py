"""Batch norm layers in loops that feed their output back to them: a recurrent cell's state."""

import tensorflow as tf

# Private. A graph does not say publicly whether it is the body of a loop or a branch.
from tensorflow.python.ops.control_flow_v2_func_graphs import WhileBodyFuncGraph

from tfbn.sweep.network import Trace
from tfbn.sweep.observation import Call


def feeding_themselves(trace: Trace) -> frozenset[str]:
    """The paths of layers in loops whose input depends on their output of an earlier iteration.

    A call in a branch or loop inside the loop counts as one, which is not always true.
    """
    return frozenset(call.site.path for call in trace.calls if _feeds_itself(call))


def _feeds_itself(call: Call) -> bool:
    body = call.outputs.graph
    if not isinstance(body, WhileBodyFuncGraph):
        return body.outer_graph is not None and _in_loop(body.outer_graph)
    # A loop variable leaves the body at the place at which it enters.
    carried = {id(out): enters for enters, out in zip(body.inputs, body.outputs, strict=False)}
    entered = {id(tensor) for tensor in call.inputs}
    seen: set[int] = set()
    pending = [call.outputs]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in entered:
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
