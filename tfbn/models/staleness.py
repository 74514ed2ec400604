"""Find the weights that the statistics of a batch norm layer depend on."""

import collections
from collections.abc import Iterable

import keras
import tensorflow as tf

from tfbn.models import keras_models


def upstream_variables(model: keras.Model) -> dict[str, set[int]] | None:
    """Return path of a batch norm layer -> ids of the variables upstream of it.

    Computed from a trace in inference mode. Returns `None` if the model cannot be traced without
    data.
    """
    specs = keras_models.input_specs(model)
    if specs is None:
        return None
    inputs_by_path: dict[str, list] = collections.defaultdict(list)

    def observe(path, layer, call, inputs, training, mask):
        inputs_by_path[path] += tf.nest.flatten([inputs, [] if mask is None else mask], True)
        return call(inputs, training=training, mask=mask)

    layers = keras_models.batch_norm_layers(model)
    infer = tf.function(lambda *inputs: model(*inputs, training=False), autograph=False)
    try:
        with (
            keras_models.inlined_functions(),
            keras_models.observed_calls(layers, observe, outermost=True),
        ):
            graph = infer.get_concrete_function(*specs).graph
    except Exception:  # The code of a custom layer may raise any class.
        return None
    captured = _captured(graph, model)
    every = {id(variable) for variable in model.variables}
    return {
        # Tensors inside a loop or a branch belong to another graph.
        path: _upstream(tensors, captured)
        if all(getattr(tensor, "graph", None) is graph for tensor in tensors)
        else every
        for path, tensors in inputs_by_path.items()
    }


def _captured(graph, model):
    """Return name of a placeholder in a graph -> id of the variable of the model."""
    strategy = model.distribute_strategy
    ids = {
        id(local.handle): id(variable)
        for variable in model.variables
        for local in strategy.experimental_local_results(variable.value)
    }
    return {inner.op.name: ids[id(outer)] for outer, inner in graph.captures if id(outer) in ids}


def _upstream(tensors: Iterable[tf.Tensor], captured: dict[str, int]) -> set[int]:
    seen, pending = set(), [x.op for x in tensors]
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen.add(op.name)
            pending += [x.op for x in op.inputs] + list(op.control_inputs)
    return {captured[name] for name in seen & captured.keys()}
