"""Record the sweep that statistics in a model come from, and judge whether they are stale."""

import collections
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import assignment, fingerprints, interception, keras_models

if TYPE_CHECKING:
    from tfbn.population import PopulationStats


def record(model: keras.Model, stats: "PopulationStats") -> None:
    """Store in the layers of a model which sweep their statistics, just assigned, come from."""
    layers = assignment.matching_layers(model, stats)
    sweep_records.delete(layers.values())
    if stats.method != "assigned":
        weights = _weights(model, stats)
        for path, layer in layers.items():
            sweep_records.store(layer, SweepRecord(stats, path, weights))


def mismatch(model: keras.Model, stats: "PopulationStats") -> str | None:
    """Return why the layers of a model do not hold the statistics of a sweep of it, or `None`.

    All weights of the model must be the weights of the sweep.
    """
    weights = None
    if stats.fingerprint and stats.fingerprint == fingerprints.fingerprint(model):
        weights = _weights(model, stats)
    records = {
        corresponding: SweepRecord(stats, path, weights)
        for path, corresponding in assignment.correspondence(model, stats).items()
    }
    return reason(model, records)


def _weights(model: keras.Model, stats: "PopulationStats") -> frozenset[int] | None:
    """Return `SweepRecord.weights` of a model that holds the statistics of its sweep."""
    weights = fingerprints.digests_of(model, stats.fingerprint)
    if weights is None:
        return None
    return weights | {digest for _, digest in fingerprints.digests_of_statistics(model)}


def reason(
    model: keras.Model, records: Mapping[str, SweepRecord], strangers: Iterable[str] = ()
) -> str | None:
    """Return why the statistics of a model are stale, or `None`.

    They are current if each layer holds the statistics of its sweep, and if every weight upstream
    has the values of a weight of the swept model.

    Args:
        model: A model.
        records: Path of a batch norm layer -> the record of its sweep.
        strangers: Paths of batch norm layers without a record, which must be unchanged since a
            sweep.
    """
    layers = keras_models.batch_norm_layers(model)
    for path, record in records.items():
        if path not in layers or not layers[path].built:
            return f"the model has no batch norm layer {path!r}"
        name = assignment.changed_variable(record.stats[record.path], layers[path])
        if name is not None:
            return f"{name} of layer {path!r} has changed since the sweep"
    if not all(record.stats.fingerprint for record in records.values()):
        return "it is not known with which weights the sweep was"
    swept = {record.weights for record in records.values() if record.weights is not None}
    if any(record.weights is None for record in records.values()):
        return _CHANGED
    current = fingerprints.digests(model)
    # Weights of a sweep -> variables with values that the swept model did not have.
    others: dict[frozenset[int] | None, set[int]] = {
        weights: {id(variable) for variable, digest in current if digest not in weights}
        for weights in swept
    }
    for path in strangers:
        variables = {id(variable) for variable in keras_models.statistics(layers[path]).values()}
        if all(variables & other for other in others.values()):
            return f"layer {path!r} was not part of the sweep, or has changed since"
    if not any(others.values()):
        return None  # The common case requires no trace.
    every = {id(variable) for variable, _ in current}
    before = upstream_variables(model)
    for path, record in records.items():
        depends_on = every if before is None else before.get(path, set())
        for variable, _ in current:
            if id(variable) in depends_on & others[record.weights]:
                return (
                    f"{_CHANGED}: {variable.path!r}, on which the statistics of layer {path!r} "
                    "depend, has other values or is new"
                )
    return None


_CHANGED = "the weights have changed since the sweep"


def upstream_variables(model: keras.Model) -> dict[str, set[int]] | None:
    """Return path of a batch norm layer -> ids of the variables upstream of it.

    Computed from a trace in inference mode. Returns `None` if the model cannot be traced without
    data.
    """
    specs = keras_models.input_specs(model)
    if specs is None:
        return None
    inputs_by_path: dict[str, list] = collections.defaultdict(list)

    def observe(call: interception.LayerCall) -> tf.Tensor:
        entered = [call.inputs, [] if call.mask is None else call.mask]
        inputs_by_path[call.path] += tf.nest.flatten(entered, True)
        return call.run()

    layers = keras_models.batch_norm_layers(model)
    infer = tf.function(lambda *inputs: model(*inputs, training=False), autograph=False)
    try:
        with (
            interception.inlined_functions(),
            interception.observed_calls(layers, observe, outermost=True),
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
