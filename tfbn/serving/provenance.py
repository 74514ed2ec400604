"""Where an exported model came from: written beside it, read again, and printed."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn import blending, keras_models, population
from tfbn._version import __version__
from tfbn.population import PopulationStats
from tfbn.serving import monitor, versions

FILE = "assets.extra/tfbn.json"

# Monitored layers that are named in the first lines of a description.
_FEW = 8

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
        stats: What it found for the batch norm layers of this model, by their paths in it, or
            `None` if there was no sweep.
        stale: Why the model's statistics are not those of its population, or `None`.
    """

    stats: PopulationStats | None
    stale: str | None


def sweep_of(model: keras.Model) -> Sweep:
    """The sweep behind a model's statistics, of itself or of a model that it shares layers with.

    An encoder that was swept as part of a siamese network, or a backbone under a new head, has
    population statistics like the network that was swept. It is judged by its own layers: its
    batch norm layers are those of the swept model, and so is every layer with weights before
    the last of them, in the order in which the model holds its layers. Layers after that, a
    new head say, have no influence on statistics.
    """
    layers = keras_models.batch_norm_layers(model)
    if not layers:
        return Sweep(None, None)
    stats = population.assigned(model)
    if stats is not None:
        return Sweep(stats, stats.mismatch(model))
    sweeps = [Sweep(*_as_part(model, *swept)) for swept in _swept_models() if swept[0] is not model]
    sweeps = [sweep for sweep in sweeps if sweep.stats]
    fresh = [sweep for sweep in sweeps if sweep.stale is None]
    return next(iter(fresh + sweeps), Sweep(None, "they were never swept"))


def _swept_models() -> list[tuple[keras.Model, PopulationStats]]:
    """The models of this process with statistics of a sweep, and these statistics."""
    return list(population._assigned.items())  # The one place that needs them all.


def _as_part(model, swept, stats):
    """Statistics of a swept model as those of a model that shares layers, and why they are not."""
    paths = {id(layer): path for path, layer in keras_models.layers(swept).items()}
    batch_norms = keras_models.batch_norm_layers(model)
    shared = {path: paths.get(id(layer)) for path, layer in batch_norms.items()}
    if not any(path in stats for path in shared.values()):
        return None, None
    ours = stats.replace(layers=_renamed(stats, shared), previous=_previous(stats, shared))
    *_, last = batch_norms
    for path, layer in keras_models.layers(model).items():
        own = [] if path in batch_norms else _own_weights(layer)
        if id(layer) not in paths and (own or path in batch_norms):
            return ours, f"layer {path!r} was not part of the model that was swept"
        if path == last:
            break
    return ours, stats.mismatch(swept)


def _own_weights(layer):
    inner = [child for child in keras_models.layers(layer).values() if child is not layer]
    theirs = {id(v) for child in inner for v in child.weights}
    return [v for v in layer.weights if id(v) not in theirs]


def _renamed(stats, shared):
    return {path: stats[theirs] for path, theirs in shared.items() if theirs in stats}


def _previous(stats, shared):
    before = stats.previous
    return None if before is None else before.replace(layers=_renamed(before, shared))


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
        "fingerprint": keras_models.fingerprint(model),
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
        "layers": {
            path: {"channels": len(layer.mean), "count": _count(layer), **off.get(path, {})}
            for path, layer in stats.items()
        },
    }


def _count(layer):
    # A mask that tells channels apart makes their counts differ.
    return layer.count.tolist() if hasattr(layer.count, "tolist") else layer.count


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
        return provenance["inputs"], provenance["outputs"]
    except (ValueError, KeyError):
        return None


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Print where an exported model came from, as `export` wrote it down beside it.

    Args:
        path: A model's directory (its highest version is taken) or that of a version.

    Returns:
        A dict with the versions of tfbn, Keras and TensorFlow, the fingerprint of the
        model's weights, `folded`, `stale` (`None`, or why the statistics are not those of the
        population), `max_abs_difference`, `inputs` and `outputs` (the names in requests and
        answers, in the model's order), a `checksum` of all this, with `monitor` the `epsilon` of
        the monitored layers and the identity of their `population`, and `statistics`: `None` if
        the model was never swept, else the method, samples, batches and batch size of the
        sweep, `source_weight` (0 unless they were blended, see `PopulationStats.blend`) and for
        each layer its channels, values per channel and how far its moving averages were off (see
        `PopulationStats.compare`). A version that `tfbn.recalibrate` wrote has
        `recalibrated_by`, the versions of tfbn and TensorFlow, and `history`, a list of the same
        of each version that it came from, oldest first, without the layers.

    Raises:
        ValueError: If there is no such description, or if it is damaged.
    """
    file = file_of(path)
    provenance = _read(file, path)
    for line in _lines(file.parent.parent, provenance):
        print(line)
    return provenance


def _lines(directory, provenance):
    by = f"tfbn {provenance['tfbn']} with Keras {provenance['keras']}"
    if provenance["tfbn"] is None:  # `tfbn.recalibrate` takes models of others too.
        by = "another tool"
    lines = [
        f"{directory}: exported by {by} and TensorFlow {provenance['tensorflow']}",
        f"weights: {provenance['fingerprint']}",
    ]
    if provenance["folded"]:
        lines.append("batch norm is folded away")
    lines.append(f"differs from the model by at most {provenance['max_abs_difference']:.3g}")
    lines.append(f"batch norm statistics: {_sweep_in_words(provenance)}")
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
    for name, layer in ((provenance["statistics"] or {}).get("layers") or {}).items():
        off = f", mean off by {layer['mean_shift']:.3f} std before" if "mean_shift" in layer else ""
        lines.append(f"  {name}: {layer['channels']} channels, {layer['count']} values each{off}")
    return lines


def _sweep_in_words(provenance):
    swept, stale = provenance["statistics"], provenance["stale"]
    if swept is None:
        return stale or "the model has no batch norm layers"
    text = (
        f"method={swept['method']!r} over {swept['samples']} samples in {swept['batches']} "
        f"batches of at most {swept['batch_size']}"
    )
    blended = blending.in_words(swept["samples"], swept.get("source_weight", 0))
    if blended:
        text += f", {blended}"
    return f"{text}, but {stale}" if stale else text
