"""Which sweep the statistics of a model come from, and whether they are stale."""

import collections
from typing import NamedTuple

import keras

from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import assignment, fingerprints, keras_models, upstream
from tfbn.population import PopulationStats


class Sweep(NamedTuple):
    """The sweep that the statistics of a model come from.

    Attributes:
        stats: Its statistics for the batch norm layers of this model, by their paths in it, or
            `None` if no sweep is known.
        stale: Why the model's statistics are not those of its population, or `None`.
    """

    stats: PopulationStats | None
    stale: str | None


def sweep_of(model: keras.Model) -> Sweep:
    """The sweep behind a model's statistics.

    Each batch norm layer is judged by itself, wherever it was swept: in this model, in another
    one that has it too (the encoder of a siamese network, a backbone under a new head), or in the
    one that was saved in a `.keras` file. Its statistics are those of the population if it holds
    the statistics of the sweep, and every weight upstream of it has the values of a weight that the
    swept model had. Weights downstream, of a new head say, and layers without weights do not
    matter. A layer that the sweep left out, because it was frozen, is only to be as it was then.

    Of layers from different sweeps, `stats` has those of the sweep that most are from.
    """
    layers = keras_models.batch_norm_layers(model)
    if not layers:
        return Sweep(None, None)
    try:
        found = {path: origin_of(layer) for path, layer in layers.items()}
    except ValueError as error:
        return Sweep(None, f"the record of their sweep in the model's file is damaged ({error})")
    found = {path: origin for path, origin in found.items() if origin is not None}
    if not found:
        return Sweep(None, "no sweep of them is known")
    return Sweep(_combined(found), _stale(model, layers, found))


def origin_of(layer: keras.Layer) -> SweepRecord | None:
    """Where the statistics of a layer come from, or `None` if it is not known.

    Raises:
        ValueError: If the layer is from a file in which that is damaged.
    """
    origin = sweep_records.get(layer)
    return origin_from_bytes(origin) if isinstance(origin, bytes) else origin


def origin_from_bytes(content: bytes) -> SweepRecord:
    """Read the bytes of a `SweepRecord`.

    Raises:
        ValueError: If they are damaged, of a later format or something else.
    """
    packed, weights = sweep_records.unpack(content)
    stats = PopulationStats.from_bytes(packed)
    if len(stats) != 1:
        raise ValueError(f"statistics of {len(stats)} layers, not of one")
    [path] = stats
    return SweepRecord(stats, path, weights)


def _combined(found):
    """The statistics of the sweep that most layers are from, by their paths in the model."""

    def sweep(origin):
        return tuple(origin.stats.attributes.values())

    [(largest, _)] = collections.Counter(map(sweep, found.values())).most_common(1)
    found = {path: origin for path, origin in found.items() if sweep(origin) == largest}
    before = {
        path: origin.stats.previous[origin.path]
        for path, origin in found.items()
        if origin.path in (origin.stats.previous or ())
    }
    return next(iter(found.values())).stats.replace(
        layers={path: origin.stats[origin.path] for path, origin in found.items()},
        previous=PopulationStats(before, method="assigned") if len(before) == len(found) else None,
    )


def _stale(model, layers, found):
    """Why statistics are not those of the population, or `None`.

    Args:
        model: A built model.
        layers: Its batch norm layers by path.
        found: Path -> record, of some of them.
    """
    for path, origin in found.items():
        name = assignment.changed_variable(origin.stats[origin.path], layers[path])
        if name is not None:
            return f"{name} of layer {path!r} has changed since the sweep"
        if not origin.stats.fingerprint:
            return "it is not known with which weights the sweep was"
        if origin.weights is None:
            return "the weights have changed since the sweep"
    held = fingerprints.digests(model)
    others = {  # Weights that a swept model did not have, for each sweep.
        weights: {id(variable) for variable, digest in held if digest not in weights}
        for weights in {origin.weights for origin in found.values()}
    }
    for path in [path for path in layers if path not in found]:
        own = {id(variable) for variable in keras_models.statistics(layers[path]).values()}
        if all(own & other for other in others.values()):
            return f"layer {path!r} was not part of the sweep, or has changed since"
    if not any(others.values()):
        return None  # As after any sweep of the model itself, without a trace.
    every = {id(variable) for variable, _ in held}
    before = upstream.variables(model)
    for path, origin in found.items():
        depends_on = every if before is None else before.get(path, set())
        for variable, _ in held:
            if id(variable) in depends_on & others[origin.weights]:
                return (
                    f"the weights have changed since the sweep: {variable.path!r}, on which the "
                    f"statistics of layer {path!r} depend, has other values or is new"
                )
    return None
