"""Convert `PopulationStats` to the bytes of a file and back.

The header stores the attributes of the statistics, the paths of their layers
and, under `previous`, the same for the statistics that the model held before the sweep. Layer `i`
has the arrays `count_i`, `mean_i`, `variance_i`, the two standard errors where they are known, and
three more with `renorm=True`. The arrays of `previous` have the prefix `previous_`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tfbn._version import __version__
from tfbn.files import sealed
from tfbn.stats.layer_stats import ERRORS, RENORM, LayerStats

if TYPE_CHECKING:
    from tfbn.population import PopulationStats

_FORMAT = 4


def pack(stats: "PopulationStats") -> bytes:
    """Return the bytes of a file with `stats`."""
    header, arrays = _pack_stats(stats, "")
    header["previous"] = None
    if stats.previous is not None:
        header["previous"], previous_arrays = _pack_stats(stats.previous, "previous_")
        arrays |= previous_arrays
    versions = {"format": _FORMAT, "tfbn": __version__, "keras": keras.__version__}
    return sealed.pack({**versions, **header}, arrays)


def unpack(
    content: bytes, attributes: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the arguments to build `PopulationStats` with, and the ones to build its `previous`.

    Args:
        content: The bytes of a file.
        attributes: The names of `PopulationStats.attributes`.

    Raises:
        ValueError: If the file is damaged, of a later format or of another kind.
    """
    header, arrays = sealed.unpack(content)
    try:
        if header["format"] != _FORMAT:
            writer = f"tfbn {header['tfbn']!r}, this is {__version__}"
            raise ValueError(f"format {header['format']!r}, written by {writer}")
        names = list(attributes)
        arguments = _unpack_stats(header, arrays, "", names)
        previous = header["previous"]
        if previous is not None:
            previous = _unpack_stats(previous, arrays, "previous_", names)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if arrays:
        raise ValueError(f"array {next(iter(arrays))!r} belongs to no layer")
    return arguments, previous


def _pack_stats(
    stats: "PopulationStats", prefix: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays: dict[str, np.ndarray] = {}
    for i, layer in enumerate(stats.values()):
        parts = {"count": layer.counts, "mean": layer.mean, "variance": layer.variance}
        parts |= layer.renorm or {}
        parts |= layer.errors if np.isfinite(layer.mean_error).any() else {}
        arrays |= {f"{prefix}{name}_{i}": value for name, value in parts.items()}
    return {**stats.attributes, "layers": list(stats)}, arrays


def _unpack_stats(
    header: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str, attributes: list[str]
) -> dict[str, Any]:
    paths = header["layers"]
    if not isinstance(paths, list) or len(set(paths)) < len(paths):
        raise ValueError("layers are not a list of different paths")
    layers = {}
    for i, path in enumerate(paths):
        names = ["count", "mean", "variance"]
        for optional in (RENORM, ERRORS):
            names += optional if f"{prefix}{optional[0]}_{i}" in arrays else ()
        of_layer = {name: arrays.pop(f"{prefix}{name}_{i}") for name in names}
        for name, array in of_layer.items():
            # Narrow dtypes are refused: at 8 bytes a number they would take more memory.
            if array.dtype not in ((np.int32, np.int64) if name == "count" else (np.float64,)):
                raise ValueError(f"{name} of layer {path!r} has dtype {array.dtype}")
        renorm = {name: of_layer.pop(name) for name in RENORM if name in of_layer}
        layers[path] = LayerStats(**of_layer, renorm=renorm or None)
    return {"layers": layers, **{name: header[name] for name in attributes}}
