"""Where an exported model came from: written beside it, read again, and printed."""

import collections
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn._version import __version__
from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import assignment, fingerprints, keras_models, upstream
from tfbn.population import PopulationStats
from tfbn.serving import versions
from tfbn.serving.monitor import monitor
from tfbn.stats import blending, stats_file

FILE = "assets.extra/tfbn.json"

# Monitored layers that are named in the first lines of a description.
_FEW = 8

# Digits of a fingerprint that are printed.
_DIGITS = 12

# The entries before names of inputs and outputs and a checksum were added.
_FIRST_FORMAT = {
    "tfbn",
    "keras",
    "tensorflow",
    "fingerprint",
    "stale",
    "folded",
    "max_abs_difference",
    "statistics",
}


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
    """Read the bytes of an `Origin`.

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
        return tuple(getattr(origin.stats, name) for name in stats_file.ATTRIBUTES)

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


def write(
    version: pathlib.Path,
    model: keras.Model,
    sweep: Sweep,
    *,
    folded: bool,
    max_abs_difference: float,
    inputs: list[str],
    outputs: list[str],
    monitored: Mapping[str, keras.Layer] | None = None,
) -> None:
    """Write the provenance of a model into a version that is not yet in place."""
    provenance = {
        "tfbn": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "fingerprint": fingerprints.fingerprint(model),
        "stale": sweep.stale,
        "folded": folded,
        "max_abs_difference": max_abs_difference,
        "inputs": inputs,
        "outputs": outputs,
        "statistics": _swept(sweep.stats),
    }
    if monitored is not None:
        provenance["monitor"] = {
            "population": monitor.identity(model).numpy().decode(),
            "epsilon": {path: layer.epsilon for path, layer in monitored.items()},
        }
    _write(version, provenance)


def write_next(
    version: pathlib.Path,
    number: str,
    before: dict[str, Any],
    stats: PopulationStats,
    max_abs_difference: float,
    population: str | None,
) -> None:
    """Write the provenance of a version that was recalibrated into it; it is not yet in place.

    Args:
        version: The directory of the new version.
        number: That of the version that it came from.
        before: The provenance of that version.
        stats: The statistics of the new one.
        max_abs_difference: See `describe`.
        population: The identity of its statistics that the monitor answers, `None` without one.
    """
    kept = ("tfbn", "stale", "max_abs_difference")
    statistics = before["statistics"] and {**before["statistics"], "layers": {}}
    step = {"version": int(number), **{k: before[k] for k in kept}, "statistics": statistics}
    provenance = {
        **{name: value for name, value in before.items() if name != "checksum"},
        "stale": None,
        "max_abs_difference": max_abs_difference,
        "statistics": _swept(stats),
        "recalibrated_by": f"tfbn {__version__} with TensorFlow {tf.__version__}",
        "history": [*before.get("history", []), step],
    }
    if population is not None:
        provenance["monitor"] = {**before["monitor"], "population": population}
    _write(version, provenance)


def _write(version, provenance):
    file = version / FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**provenance, "checksum": _checksum(provenance)}, indent=1))


def _swept(stats):
    if stats is None:
        return None
    off = stats.compare(stats.previous) if stats.previous is not None else {}
    return {
        "method": stats.method,
        "samples": stats.samples,
        "batches": stats.batches,
        "batch_size": stats.batch_size,
        "fingerprint": stats.fingerprint,
        "source_weight": stats.source_weight,
        "tolerance": stats.tolerance,
        "population_size": stats.population_size,
        "relative_error": _known(stats.relative_error),
        "layers": {
            path: {
                "channels": len(layer.mean),
                "count": layer.count,
                "relative_error": _known(layer.relative_error),
                **off.get(path, {}),
            }
            for path, layer in stats.items()
        },
    }


def _known(error):
    # NaN is no JSON.
    return None if math.isnan(error) else error


def _checksum(provenance):
    text = json.dumps({k: v for k, v in provenance.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The provenance that `tfbn.export` wrote beside a model; see `tfbn.describe`.

    Args:
        path: A model's directory (its highest version is taken) or that of a version.

    Raises:
        ValueError: If there is none, or if it is damaged.
    """
    return _read(file_of(path), path)


def file_of(path: str | os.PathLike) -> pathlib.Path:
    """The file of a version's provenance, or of that of a model's highest version."""
    path = versions.local(path)
    if (path / FILE).exists():
        return path / FILE
    return next(versions.newest(path), path) / FILE


def _read(file, path):
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"Expected a model that tfbn.export wrote. Received: {os.fspath(path)!r}, where "
            f"{str(file)!r} cannot be read. Give the model's directory or that of one of its "
            "versions."
        ) from error
    try:
        provenance = json.loads(content)
        whole = set(provenance) == _FIRST_FORMAT or provenance["checksum"] == _checksum(provenance)
        if not whole:
            raise ValueError("its checksum is another")
        _lines(file.parent.parent, provenance)
    # Whatever a program may meet in a document of another form.
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"Expected provenance that tfbn.export wrote. Received: {str(file)!r}, which is "
            f"damaged or another kind of file ({type(error).__name__}: {error}). Export the model "
            "again."
        ) from error
    return provenance


def names(version: pathlib.Path) -> tuple[list[str], list[str]] | None:
    """Names of the inputs and outputs of a version in their order, `None` if not recorded."""
    try:
        provenance = _read(version / FILE, version)
    except ValueError:
        return None
    inputs, outputs = provenance.get("inputs"), provenance.get("outputs")
    return None if inputs is None or outputs is None else (inputs, outputs)


class Description(dict[str, Any]):
    """The provenance of a version, whose repr is one line: `describe` has printed it."""

    def __repr__(self) -> str:
        return f"<Description of {self.path}: {', '.join(self)}>"

    def __init__(self, path: pathlib.Path, provenance: dict[str, Any]):
        super().__init__(provenance)
        self.path = path


def describe(path: str | os.PathLike) -> Description:
    """Print where an exported model came from, as `export` wrote it down beside it.

    ```python
    tfbn.describe("models/digits")
    stale = tfbn.describe("models/digits/1")["stale"]  # None, or why
    ```

    Args:
        path: A model's directory (its highest version is taken) or that of a version.

    Returns:
        A dict with the versions of tfbn, Keras and TensorFlow, the fingerprint of the
        model's weights, `folded`, `stale` (`None`, or why the statistics are not those of the
        population), `max_abs_difference`, `inputs` and `outputs` (the names in requests and
        answers, in the model's order, or `None` where another tool recorded none),
        a `checksum` of all this, with `monitor` the `epsilon` of
        the monitored layers and the identity of their `population`, and `statistics`: `None` if
        no sweep of the model was known, else the method, samples, batches and batch size of the
        sweep, its `tolerance`, `population_size` and `relative_error` (see `PopulationStats`;
        `None` if not known), `source_weight` (0 unless they were blended, see
        `PopulationStats.blend`) and for each layer its channels, values per channel, relative
        error and how far its moving averages were off (see `PopulationStats.compare`). A version
        that `tfbn.recalibrate` wrote has `recalibrated_by`, the versions of tfbn and TensorFlow,
        and `history`, a list of the same of each version that it came from, oldest first, without
        the layers.

    Raises:
        ValueError: If there is no such description, or if it is damaged.
    """
    file = file_of(path)
    provenance = _read(file, path)
    for line in _lines(file.parent.parent, provenance):
        print(line)
    return Description(file.parent.parent, provenance)


def _lines(directory, provenance):
    by = f"tfbn {provenance['tfbn']} with Keras {provenance['keras']}"
    if provenance["tfbn"] is None:  # `tfbn.recalibrate` takes models of others too.
        by = "another tool"
    lines = [
        f"{directory}: exported by {by} and TensorFlow {provenance['tensorflow']}",
        f"weights: {provenance['fingerprint'][:_DIGITS]}",
    ]
    if provenance["folded"]:
        lines.append("batch norm is folded away")
    lines.append(f"differs from the model by at most {provenance['max_abs_difference']:.3g}")
    lines.append(f"batch norm statistics: {_sweep_in_words(provenance)}")
    for name, layer in ((provenance["statistics"] or {}).get("layers") or {}).items():
        off = f", mean off by {layer['mean_shift']:.3f} std before" if "mean_shift" in layer else ""
        lines.append(f"  {name}: {layer['channels']} channels, {layer['count']} values each{off}")
    if provenance.get("history"):
        lines.append(f"recalibrated by {provenance['recalibrated_by']}, after:")
        lines += [
            f"  version {step['version']}: {_sweep_in_words(step)}"
            for step in provenance["history"]
        ]
    if "monitor" in provenance:
        paths = list(provenance["monitor"]["epsilon"])
        few = f", {', '.join(paths)}" if len(paths) <= _FEW else ""
        lines.append(f"monitored batch norm layers: {len(paths)}{few}")
    return lines


def _sweep_in_words(provenance):
    swept, stale = provenance["statistics"], provenance["stale"]
    if swept is None:
        return stale or "the model has no batch norm layers"
    text = (
        f"method={swept['method']!r} over {swept['samples']} samples in {swept['batches']} "
        f"batches of at most {swept['batch_size']}"
    )
    if swept.get("relative_error") is not None:
        text += f", standard errors up to {swept['relative_error']:.2g} std"
    blended = blending.in_words(swept["samples"], swept.get("source_weight", 0))
    if blended:
        text += f", {blended}"
    return f"{text}, but {stale}" if stale else text
