"""Determine which sweep the statistics of a model come from, and whether they are stale."""

import collections
from collections.abc import Mapping
from typing import NamedTuple

import keras

from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import keras_models, staleness
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
    strangers = [path for path in layers if path not in records]
    return Sweep(_combined(records), staleness.reason(model, records, strangers))


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
