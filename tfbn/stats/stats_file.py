"""Files of population statistics: written, read, and refused if no data has such statistics.

Format 3 is the one that is written. The header has the attributes of the statistics, the paths of
their layers and, under `previous`, the same of the statistics that the model held before the
sweep. Layer `i` has the
arrays `count_i`, `mean_i`, `variance_i`, where they are known their two errors, and with
`renorm=True` three more; those of `previous` have that word before their names.

Format 2 (tfbn 0.1.0) is read too. It has no checksum, `previous` is a list of paths alone, there
are two attributes more, and it could hold parts of a sweep, which are refused.
"""

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tfbn._version import __version__
from tfbn.files import sealed
from tfbn.stats.layer_stats import ERRORS, RENORM, LayerStats

if TYPE_CHECKING:
    from tfbn.population import PopulationStats

_FORMAT = 3
_OLD = 2
ATTRIBUTES = (
    "method",
    "samples",
    "batches",
    "batch_size",
    "fingerprint",
    "levels",
    "population_size",
    "tolerance",
    "source_weight",
)


def pack(stats: "PopulationStats") -> bytes:
    """The bytes of a file with a `PopulationStats`."""
    header, arrays = _packed(stats, "")
    header["previous"] = None
    if stats.previous is not None:
        header["previous"], theirs = _packed(stats.previous, "previous_")
        arrays |= theirs
    versions = {"format": _FORMAT, "tfbn": __version__, "keras": keras.__version__}
    return sealed.pack({**versions, **header}, arrays)


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of a `PopulationStats`, and those of its `previous`.

    Raises:
        ValueError: If it is damaged, of a later format or something else.
    """
    header, arrays = sealed.unpack(content, unsealed=(_OLD,))
    try:
        if header["format"] == _OLD:
            _renew(header, arrays)
        elif header["format"] != _FORMAT:
            raise ValueError(
                f"format {header['format']!r}, as tfbn {header['tfbn']!r} writes it, where this "
                f"is {__version__}"
            )
        arguments = _unpacked(header, arrays, "")
        before = header["previous"]
        previous = None if before is None else _unpacked(before, arrays, "previous_")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if arrays:
        raise ValueError(f"an array {next(iter(arrays))!r} of no layer")
    return arguments, previous


def _packed(stats: "PopulationStats", prefix: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    header = {name: getattr(stats, name) for name in ATTRIBUTES}
    arrays: dict[str, np.ndarray] = {}
    for i, layer in enumerate(stats.values()):
        parts = {"count": layer.counts, "mean": layer.mean, "variance": layer.variance}
        parts |= layer.renorm or {}
        parts |= layer.errors if np.isfinite(layer.mean_error).any() else {}
        arrays |= {f"{prefix}{name}_{i}": value for name, value in parts.items()}
    return {**header, "layers": list(stats)}, arrays


def _unpacked(header: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    paths = header["layers"]
    if not isinstance(paths, list) or len(set(paths)) < len(paths):
        raise ValueError("layers that are no list of different paths")
    layers = {}
    for i, path in enumerate(paths):
        names = ["count", "mean", "variance"]
        for optional in (RENORM, ERRORS):
            names += optional if f"{prefix}{optional[0]}_{i}" in arrays else ()
        of_layer = {name: arrays.pop(f"{prefix}{name}_{i}") for name in names}
        for name, array in of_layer.items():
            # Nothing grows when it is made an array of 8 bytes a number.
            if array.dtype not in ((np.int32, np.int64) if name == "count" else (np.float64,)):
                raise ValueError(f"{name} of dtype {array.dtype} for layer {path!r}")
        renorm = {name: of_layer.pop(name) for name in RENORM if name in of_layer}
        layers[path] = LayerStats(**of_layer, renorm=renorm or None)
    return {"layers": layers, **{name: header[name] for name in ATTRIBUTES}}


def _renew(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Make the header and arrays of format 2 those of format 3, in place."""
    if header["calls"] is not None or header["level"] != header["levels"]:
        raise ValueError("part of a sweep, which only tfbn 0.1.0 goes on with")
    header |= {"population_size": 0, "tolerance": None, "source_weight": 0}
    paths = header["previous"]
    if paths is not None:
        read = {"method": "assigned", "fingerprint": "", "levels": 1, "tolerance": None}
        none = {"samples": 0, "batches": 0, "batch_size": 0, "population_size": 0}
        none["source_weight"] = 0
        header["previous"] = {"layers": paths, **read, **none}
        for name in list(arrays):
            if name.startswith("previous_mean_"):
                arrays[name.replace("mean", "count")] = np.zeros((), np.int64)
