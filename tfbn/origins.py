"""Which sweep the statistics of a batch norm layer come from, kept beside the layer.

A layer has no place of its own for it: stock layers and their configs must stay as they are. It is
kept for as long as the layer lives, whatever becomes of the model that was swept, so that a layer
brings it along into other models. `tfbn.BatchNormalization` also saves it in `.keras` files, as an
asset. Keras's layer cannot, and files of weights, HDF5 files and folders (`zipped=False`, into
which Keras writes no assets) have no place for it.
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
_LONGEST = 64 << 20  # Bytes of an asset. A layer of 100,000 channels has 5 MiB.

# By layer: an `Origin`, or its bytes as a file had them.
_origins: weakref.WeakKeyDictionary[keras.Layer, "Origin | bytes"] = weakref.WeakKeyDictionary()


class Origin(NamedTuple):
    """The sweep behind the statistics of one layer.

    Attributes:
        stats: The `PopulationStats` that was assigned.
        path: The layer's path in it.
        weights: Digests of all that the swept model held, its weights during the sweep and its
            statistics after it, see `fingerprints.digests`; `None` if the weights during the
            sweep are not known, or were others than those of the model that the statistics were
            assigned to.
    """

    stats: "PopulationStats"
    path: str
    weights: frozenset[int] | None

    def to_bytes(self) -> bytes:
        """The content of an asset: the statistics of this layer, and all digests."""
        before = self.stats.previous
        if before is not None:
            before = before.replace(layers={p: s for p, s in before.items() if p == self.path})
        stats = self.stats.replace(layers={self.path: self.stats[self.path]}, previous=before)
        arrays = {"stats": np.frombuffer(stats.to_bytes(), np.uint8)}
        if self.weights is not None:
            arrays["weights"] = np.array(sorted(self.weights), np.uint64)
        return sealed.pack({"format": _FORMAT}, arrays)


def unpack(content: bytes) -> tuple[bytes, frozenset[int] | None]:
    """The bytes of the statistics, and the digests, in those of an `Origin`.

    Raises:
        ValueError: If they are damaged, of a later format or something else.
    """
    header, arrays = sealed.unpack(content)
    packed, weights = arrays.get("stats"), arrays.get("weights")
    if header.get("format") != _FORMAT or packed is None:
        raise ValueError("another kind of file, or a later format")
    return packed.tobytes(), None if weights is None else frozenset(weights.ravel().tolist())


def keep(layer: keras.Layer, origin: Origin) -> None:
    """Note where the statistics of a layer come from."""
    _origins[layer] = origin


def forget(layers: Iterable[keras.Layer]) -> None:
    """Note that the statistics of some layers are of no sweep."""
    for layer in layers:
        _origins.pop(layer, None)


def share(layer: keras.Layer, copy: keras.Layer) -> None:
    """Give the copy of a layer the record of the layer."""
    if layer in _origins:
        _origins[copy] = _origins[layer]


def of(layer: keras.Layer) -> Origin | bytes | None:
    """Where the statistics of a layer come from; bytes as a file had them, `None` if not known."""
    return _origins.get(layer)


def save(layer: keras.Layer, folder: str) -> None:
    """Write the asset of a layer, if anything is known of it."""
    origin = _origins.get(layer)
    if origin is not None:
        content = origin if isinstance(origin, bytes) else origin.to_bytes()
        with tf.io.gfile.GFile(os.path.join(folder, ASSET), "wb") as file:
            file.write(content)


def load(layer: keras.Layer, folder: str | None) -> None:
    """Take the asset of a layer over from a file that has one.

    It is looked at where it is wanted: whatever the file holds here, the layer can be loaded.
    """
    forget([layer])
    if folder is not None:  # As Keras has it where there is none.
        file = tf.io.gfile.GFile(os.path.join(folder, ASSET), "rb")
        with contextlib.suppress(tf.errors.OpError), file:
            _origins[layer] = file.read(_LONGEST)
