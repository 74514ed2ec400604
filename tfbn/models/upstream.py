"""Which weights the statistics of a batch norm layer depend on: those that its inputs do."""

import collections
from collections.abc import Iterable

import keras
import tensorflow as tf

from tfbn.models import keras_models


def variables(model: keras.Model) -> dict[str, set[int]] | None:
    """By path of a batch norm layer, the ids of the variables upstream of it.

    A trace in inference mode tells, whatever code the model is made of. `None` if it cannot be
    traced without data.
    """
    specs = keras_models.input_specs(model)
    if specs is None:
        return None
    entering: dict[str, list] = collections.defaultdict(list)

    def observe(path, layer, call, inputs, training, mask):
        entering[path] += tf.nest.flatten([inputs, [] if mask is None else mask], True)
        return call(inputs, training=training, mask=mask)

    layers = keras_models.batch_norm_layers(model)
    infer = tf.function(lambda *inputs: model(*inputs, training=False), autograph=False)
    try:
        with (
            keras_models.inlined_functions(),
            keras_models.observed_calls(layers, observe, outermost=True),
        ):
            graph = infer.get_concrete_function(*specs).graph
    except Exception:  # Of whatever class a layer's own code raises.
        return None
    captured = _captured(graph, model)
    every = {id(variable) for variable in model.variables}
    return {
        # Within a loop or a branch the graph is another.
        path: _behind(tensors, captured) if all(_in(graph, x) for x in tensors) else every
        for path, tensors in entering.items()
    }


def _in(graph, tensor):
    return getattr(tensor, "graph", None) is graph


def _captured(graph, model):
    """By name of its placeholder in a graph, the id of a model's variable."""
    strategy = model.distribute_strategy
    ids = {
        id(local.handle): id(variable)
        for variable in model.variables
        for local in strategy.experimental_local_results(variable.value)
    }
    return {inner.op.name: ids[id(outer)] for outer, inner in graph.captures if id(outer) in ids}


def _behind(tensors: Iterable[tf.Tensor], captured: dict[str, int]) -> set[int]:
    found, seen, left = set(), set(), [x.op for x in tensors]
    while left:
        op = left.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.name in captured:
            found.add(captured[op.name])
        left += [x.op for x in op.inputs] + list(op.control_inputs)
    return found
