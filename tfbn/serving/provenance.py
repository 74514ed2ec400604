"""Store and describe the provenance of an exported model."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn._version import __version__
from tfbn.models import fingerprints
from tfbn.population import PopulationStats
from tfbn.serving import versions
from tfbn.serving.monitor import monitor
from tfbn.serving.sweeps import Sweep
from tfbn.stats import blending

FILE = "assets.extra/tfbn.json"

# The largest number of monitored layers that a description lists by name.
_FEW = 8

# The number of digits of a fingerprint in a description.
_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The record of a version. Its fields are the entries of a JSON file.

    Attributes:
        tfbn, keras, tensorflow: The versions of the packages that exported it. `tfbn` and `keras`
            are `None` for another tool.
        fingerprint: The fingerprint of the model's weights.
        stale: Why the statistics are stale, or `None`.
        folded: Whether batch norm is folded into other weights.
        max_abs_difference: The largest difference between outputs of the version and of the model.
        inputs, outputs: The names in requests and answers, in the model's order; `None` if another
            tool stored no order.
        statistics: The sweep, see `swept`; `None` if no sweep is known.
        monitor: The `epsilon` of the monitored layers and the identity of their `population`, or
            `None` without a monitor.
        recalibrated_by: The versions of the packages that recalibrated it, or `None`.
        history: `version`, `tfbn`, `stale`, `max_abs_difference` and `statistics` without layers
            for each of the versions before, oldest first.
    """

    tfbn: str | None
    keras: str | None
    tensorflow: str
    fingerprint: str
    stale: str | None
    folded: bool
    max_abs_difference: float
    inputs: list[str] | None
    outputs: list[str] | None
    statistics: dict[str, Any] | None
    monitor: dict[str, Any] | None = None
    recalibrated_by: str | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def entries(self) -> dict[str, Any]:
        """Return the entries of the file: the fields and their `checksum`."""
        fields = dataclasses.asdict(self)
        text = json.dumps(fields, sort_keys=True)
        return {**fields, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def of_export(
    model: keras.Model,
    sweep: Sweep,
    *,
    folded: bool,
    max_abs_difference: float,
    inputs: list[str],
    outputs: list[str],
    monitored: Mapping[str, keras.Layer] | None = None,
) -> Provenance:
    """Return the record of a model that is exported."""
    return Provenance(
        tfbn=__version__,
        keras=keras.__version__,
        tensorflow=tf.__version__,
        fingerprint=fingerprints.fingerprint(model),
        stale=sweep.stale,
        folded=folded,
        max_abs_difference=max_abs_difference,
        inputs=inputs,
        outputs=outputs,
        statistics=swept(sweep.stats),
        monitor=None if monitored is None else _monitored(model, monitored),
    )


def _monitored(model: keras.Model, layers: Mapping[str, keras.Layer]) -> dict[str, Any]:
    return {
        "population": monitor.identity(model).numpy().decode(),
        "epsilon": {path: layer.epsilon for path, layer in layers.items()},
    }


def of_recalibration(
    before: Provenance,
    version: int,
    stats: PopulationStats,
    max_abs_difference: float,
    population: str | None,
) -> Provenance:
    """Return the record of a version that was recalibrated.

    Args:
        before: The record of the version before.
        version: The number of the version before.
        stats: The statistics of the new version.
        max_abs_difference: See `Provenance`.
        population: The identity of the monitored statistics, `None` without a monitor.
    """
    kept = {name: getattr(before, name) for name in ("tfbn", "stale", "max_abs_difference")}
    statistics = before.statistics and {**before.statistics, "layers": {}}
    return dataclasses.replace(
        before,
        stale=None,
        max_abs_difference=max_abs_difference,
        statistics=swept(stats),
        monitor=before.monitor and {**before.monitor, "population": population},
        recalibrated_by=f"tfbn {__version__} with TensorFlow {tf.__version__}",
        history=[*before.history, {"version": version, **kept, "statistics": statistics}],
    )


def swept(stats: PopulationStats | None) -> dict[str, Any] | None:
    """Return the attributes and standard errors of a sweep and of its layers as plain values."""
    if stats is None:
        return None
    drift = stats.compare(stats.previous) if stats.previous is not None else {}
    return {
        **stats.attributes,
        "relative_error": _known(stats.relative_error),
        "layers": {
            path: {
                "channels": len(layer.mean),
                "count": layer.count,
                "relative_error": _known(layer.relative_error),
                **drift.get(path, {}),
            }
            for path, layer in stats.items()
        },
    }


def _known(error: float) -> float | None:
    # JSON does not support NaN.
    return None if math.isnan(error) else error


def write(version: pathlib.Path, provenance: Provenance) -> None:
    """Write a record into a version that is not yet in place."""
    file = version / FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(provenance.entries(), indent=1))


def read(path: str | os.PathLike) -> Provenance:
    """Return the record that `tfbn.export` wrote with a version.

    Args:
        path: The directory of a model (its highest version) or of a version.

    Raises:
        ValueError: If the record does not exist or is damaged.
    """
    return _read(file_of(path), path)


def file_of(path: str | os.PathLike) -> pathlib.Path:
    """Return the file of a version's record, or of a model's highest version."""
    path = versions.local(path)
    if (path / FILE).exists():
        return path / FILE
    return next(versions.newest(path), path) / FILE


def _read(file: pathlib.Path, path: str | os.PathLike) -> Provenance:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"Expected a directory that tfbn.export wrote. Received: {os.fspath(path)!r} ({error})."
        ) from error
    try:
        entries = json.loads(content)
        provenance = Provenance(**{k: value for k, value in entries.items() if k != "checksum"})
        if provenance.entries() != entries:
            raise ValueError("its checksum is wrong")
    # All errors that a document of another form may cause.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise versions.damaged(file, error) from error
    return provenance


def names(version: pathlib.Path) -> tuple[list[str], list[str]] | None:
    """Return the ordered names of a version's inputs and outputs, `None` if not stored."""
    try:
        record = _read(version / FILE, version)
    except ValueError:
        return None
    if record.inputs is None or record.outputs is None:
        return None
    return record.inputs, record.outputs


class Description(dict[str, Any]):
    """The entries of a version's provenance, printed as text."""

    def __init__(self, version: pathlib.Path, provenance: Provenance):
        super().__init__(provenance.entries())
        self._lines = lines(version, provenance)

    def __repr__(self) -> str:
        return "\n".join(self._lines)


def describe(path: str | os.PathLike) -> Description:
    """Return the provenance of an exported model, which prints as text.

    ```python
    print(tfbn.describe("models/digits"))
    stale = tfbn.describe("models/digits/1")["stale"]  # None, or why
    ```

    Args:
        path: The directory of a model (its highest version) or of a version.

    Returns:
        A dict of the fields of `tfbn.serving.provenance.Provenance` and their `checksum`.
        `statistics` has the attributes of the `PopulationStats`, its `relative_error` (`None` if
        not known), and for each of `layers` its `channels`, values per channel (`count`),
        `relative_error`, and the drift of its moving averages, see `PopulationStats.compare`.

    Raises:
        ValueError: If the provenance does not exist or is damaged.
    """
    file = file_of(path)
    return Description(file.parent.parent, _read(file, path))


def lines(directory: pathlib.Path, provenance: Provenance) -> list[str]:
    """Return the lines of a description."""
    by = f"tfbn {provenance.tfbn} with Keras {provenance.keras}"
    if provenance.tfbn is None:  # `tfbn.recalibrate` supports models of other tools.
        by = "another tool"
    text = [
        f"{directory}: exported by {by} and TensorFlow {provenance.tensorflow}",
        f"weights: {provenance.fingerprint[:_DIGITS]}",
    ]
    if provenance.folded:
        text.append("batch norm is folded away")
    text.append(f"differs from the model by at most {provenance.max_abs_difference:.3g}")
    statistics = provenance.statistics
    text.append(f"batch norm statistics: {_sweep_in_words(statistics, provenance.stale)}")
    for name, layer in (statistics["layers"] if statistics else {}).items():
        shift = (
            f", mean off by {layer['mean_shift']:.3f} std before" if "mean_shift" in layer else ""
        )
        text.append(f"  {name}: {layer['channels']} channels, {layer['count']} values each{shift}")
    if provenance.history:
        text.append(f"recalibrated by {provenance.recalibrated_by}, after:")
        text += [
            f"  version {step['version']}: {_sweep_in_words(step['statistics'], step['stale'])}"
            for step in provenance.history
        ]
    if provenance.monitor is not None:
        paths = list(provenance.monitor["epsilon"])
        few = f", {', '.join(paths)}" if len(paths) <= _FEW else ""
        text.append(f"monitored batch norm layers: {len(paths)}{few}")
    return text


def _sweep_in_words(statistics: Mapping[str, Any] | None, stale: str | None) -> str:
    if statistics is None:
        return stale or "the model has no batch norm layers"
    text = (
        f"method={statistics['method']!r} over {statistics['samples']} samples in "
        f"{statistics['batches']} batches of at most {statistics['batch_size']}"
    )
    if statistics["relative_error"] is not None:
        text += f", standard errors up to {statistics['relative_error']:.2g} std"
    if blended := blending.in_words(statistics["samples"], statistics["prior_samples"]):
        text += f", {blended}"
    return f"{text}, but {stale}" if stale else text
