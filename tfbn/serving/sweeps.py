"""Determine which sweep the statistics of a model come from, and whether they are stale."""

import collections
from collections.abc import Mapping
from typing import NamedTuple

import keras

from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import assignment, fingerprints, keras_models, staleness
from tfbn.population import PopulationStats


class Sweep(NamedTuple):
    """The sweep that the statistics of a model come from.

    Attributes:
        stats: The statistics of the sweep for the batch norm layers of this model, with their paths
            in it, or `None` if no sweep is known.
        stale: Why the model's statistics are stale, or `None`.
    """

    stats: PopulationStats | None
    stale: str | None


def sweep_of(model: keras.Model) -> Sweep:
    """Return the sweep that a model's statistics come from.

    Each batch norm layer is checked separately, and may have been swept in this model, in another
    model that shares it (the encoder of a siamese network, a backbone under a new head), or in a
    model that was saved in a `.keras` file. Its statistics are current if they equal the statistics
    of the sweep, and if every weight upstream has the values of a weight of the swept model.
    Weights downstream (a new head) and layers without weights have no effect. A layer that was
    frozen during the sweep must only be unchanged.

    If layers come from different sweeps, `stats` has the layers of the most frequent sweep.
    """
    layers = keras_models.batch_norm_layers(model)
    if not layers:
        return Sweep(None, None)
    try:
        origins = {path: origin_of(layer) for path, layer in layers.items()}
    except ValueError as error:
        return Sweep(None, f"the record of their sweep in the model's file is damaged ({error})")
    records = {path: origin for path, origin in origins.items() if origin is not None}
    if not records:
        return Sweep(None, "no sweep of them is known")
    return Sweep(_combined(records), _stale(model, layers, records))


def origin_of(layer: keras.Layer) -> SweepRecord | None:
    """Return the sweep record of a layer, or `None` if it is not known.

    Raises:
        ValueError: If the layer was loaded from a file with a damaged record.
    """
    origin = sweep_records.get(layer)
    return origin_from_bytes(origin) if isinstance(origin, bytes) else origin


def origin_from_bytes(content: bytes) -> SweepRecord:
    """Convert bytes to a `SweepRecord`.

    Raises:
        ValueError: If they are damaged or have another format.
    """
    packed, weights = sweep_records.unpack(content)
    stats = PopulationStats.from_bytes(packed)
    if len(stats) != 1:
        raise ValueError(f"statistics of {len(stats)} layers, not of one")
    [path] = stats
    return SweepRecord(stats, path, weights)


def _combined(records: Mapping[str, SweepRecord]) -> PopulationStats:
    """Return the statistics of the most frequent sweep, with the paths of the model."""

    def sweep(record: SweepRecord) -> tuple:
        return tuple(record.stats.attributes.values())

    [(largest, _)] = collections.Counter(map(sweep, records.values())).most_common(1)
    chosen = {path: record for path, record in records.items() if sweep(record) == largest}
    before = {
        path: record.stats.previous[record.path]
        for path, record in chosen.items()
        if record.stats.previous is not None and record.path in record.stats.previous
    }
    return next(iter(chosen.values())).stats.replace(
        layers={path: record.stats[record.path] for path, record in chosen.items()},
        previous=PopulationStats(before, method="assigned") if len(before) == len(chosen) else None,
    )


def _stale(
    model: keras.Model, layers: Mapping[str, keras.Layer], records: Mapping[str, SweepRecord]
) -> str | None:
    """Return why statistics are stale, or `None`.

    Args:
        model: A built model.
        layers: Path -> batch norm layer of the model.
        records: Path -> record, for some of the layers.
    """
    for path, origin in records.items():
        name = assignment.changed_variable(origin.stats[origin.path], layers[path])
        if name is not None:
            return f"{name} of layer {path!r} has changed since the sweep"
        if not origin.stats.fingerprint:
            return "it is not known with which weights the sweep was"
        if origin.weights is None:
            return "the weights have changed since the sweep"
    held = fingerprints.digests(model)
    # Weights of a sweep -> variables with values that the swept model did not have.
    others: dict[frozenset[int] | None, set[int]] = {
        weights: {id(variable) for variable, digest in held if digest not in weights}
        for weights in {origin.weights for origin in records.values()}
        if weights is not None
    }
    for path in [path for path in layers if path not in records]:
        variables = {id(variable) for variable in keras_models.statistics(layers[path]).values()}
        if all(variables & other for other in others.values()):
            return f"layer {path!r} was not part of the sweep, or has changed since"
    if not any(others.values()):
        return None  # The common case requires no trace.
    every = {id(variable) for variable, _ in held}
    before = staleness.upstream_variables(model)
    for path, origin in records.items():
        depends_on = every if before is None else before.get(path, set())
        for variable, _ in held:
            if id(variable) in depends_on & others[origin.weights]:
                return (
                    f"the weights have changed since the sweep: {variable.path!r}, on which the "
                    f"statistics of layer {path!r} depend, has other values or is new"
                )
    return None
