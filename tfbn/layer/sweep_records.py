"""Store the record of the sweep that set the statistics of a batch norm layer.

Records are stored by layer, outside of it, because stock layers and their configs must not change.
A record lives as long as its layer, also in other models. `tfbn.BatchNormalization` saves it in
`.keras` files too, as an asset. Keras's layer, weights files, HDF5 files and folders
(`zipped=False`, without assets) cannot store it.
"""

import contextlib
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn.files import sealed

if TYPE_CHECKING:
    from tfbn.population import PopulationStats

ASSET = "tfbn_sweep.safetensors"

_FORMAT = 1
_MOST_BYTES = 64 << 20  # Of an asset. A layer of 100,000 channels needs 5 MiB.

# Layer -> its record, or the bytes of the record from a file.
_records: weakref.WeakKeyDictionary[keras.Layer, "SweepRecord | bytes"] = (
    weakref.WeakKeyDictionary()
)


class SweepRecord(NamedTuple):
    """The sweep that set the statistics of one layer.

    Attributes:
        stats: The `PopulationStats` that was assigned.
        path: The path of the layer in `stats`.
        weights: Digests of the swept model, its weights during the sweep and its statistics after
            it, see `fingerprints.digests`; `None` if the weights during the sweep are unknown, or
            differ from the weights of the model that the statistics were assigned to.
    """

    stats: "PopulationStats"
    path: str
    weights: frozenset[int] | None

    def to_bytes(self) -> bytes:
        """Return the content of an asset: the statistics of this layer, and all digests."""
        previous = self.stats.previous
        if previous is not None:
            layers = {path: stats for path, stats in previous.items() if path == self.path}
            previous = previous.replace(layers=layers)
        stats = self.stats.replace(layers={self.path: self.stats[self.path]}, previous=previous)
        arrays = {"stats": np.frombuffer(stats.to_bytes(), np.uint8)}
        if self.weights is not None:
            arrays["weights"] = np.array(sorted(self.weights), np.uint64)
        return sealed.pack({"format": _FORMAT}, arrays)


def unpack(content: bytes) -> tuple[bytes, frozenset[int] | None]:
    """Return the bytes of the statistics, and the digests, from the bytes of a `SweepRecord`.

    Raises:
        ValueError: If they are damaged, of a later format or of another kind.
    """
    header, arrays = sealed.unpack(content)
    packed, weights = arrays.get("stats"), arrays.get("weights")
    if header.get("format") != _FORMAT or packed is None:
        raise ValueError("another kind of file, or a later format")
    return packed.tobytes(), None if weights is None else frozenset(weights.ravel().tolist())


def store(layer: keras.Layer, record: SweepRecord) -> None:
    """Store the record of a layer."""
    _records[layer] = record


def delete(layers: Iterable[keras.Layer]) -> None:
    """Delete the records of some layers, whose statistics no longer come from a sweep."""
    for layer in layers:
        _records.pop(layer, None)


def copy(source: keras.Layer, target: keras.Layer) -> None:
    """Store the record of a layer for its copy, too."""
    if source in _records:
        _records[target] = _records[source]


def get(layer: keras.Layer) -> SweepRecord | bytes | None:
    """Return the record of a layer, its bytes if it was loaded from a file, or `None`."""
    return _records.get(layer)


def save(layer: keras.Layer, folder: str) -> None:
    """Write the record of a layer as an asset, if there is one."""
    record = _records.get(layer)
    if record is not None:
        content = record if isinstance(record, bytes) else record.to_bytes()
        with tf.io.gfile.GFile(os.path.join(folder, ASSET), "wb") as file:
            file.write(content)


def load(layer: keras.Layer, folder: str | None) -> None:
    """Read the asset of a layer, if there is one.

    It is validated on use and not here, so that a layer loads even if its asset is damaged.
    """
    delete([layer])
    if folder is not None:  # Keras passes `None` for a layer without assets.
        file = tf.io.gfile.GFile(os.path.join(folder, ASSET), "rb")
        with contextlib.suppress(tf.errors.OpError), file:
            _records[layer] = file.read(_MOST_BYTES)
