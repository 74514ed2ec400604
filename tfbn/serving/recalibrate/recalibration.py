"""Recalibrate a served model: sweep new data, and write its next version."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfbn.models import comparison, fingerprints, keras_models
from tfbn.population import PopulationStats
from tfbn.serving import provenance, saved_models, versions
from tfbn.serving.export import batch_norms, signature
from tfbn.serving.monitor import answers, monitor
from tfbn.serving.recalibrate import loading, recognition, weights
from tfbn.stats import layer_stats, moments
from tfbn.stats.layer_stats import LayerStats
from tfbn.sweep.batches import empty
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.run import check, collect


@dataclasses.dataclass(frozen=True)
class Recalibrated:
    """A version that `recalibrate` wrote.

    Attributes:
        path: The directory of the new version.
        version: The number of the new version.
        stats: The statistics of the new version. `stats.previous` are the statistics of the
            version before.
        max_abs_difference: The largest absolute difference between the outputs of the new version
            and of the network with these statistics, on the first batch.
    """

    path: pathlib.Path
    version: int
    stats: PopulationStats
    max_abs_difference: float


def recalibrate(
    path: str | os.PathLike,
    x: Any,
    method: str = "exact",
    batch_size: int | None = None,
    steps: int | None = None,
    blend_samples: int = 0,
    tolerance: float | None = None,
    verbose: Any = "auto",
) -> Recalibrated:
    """Sweep data through a served model, and write its next version with the new statistics.

    Requires only the SavedModel, not the model's code, and no labels. Only the means and variances
    of the batch norm layers change: graphs, signatures, assets and warm-up requests are
    byte-identical copies.

    All batch norm layers are swept, including layers that were frozen when the model was exported.
    The version before is not changed. The new version is verified on the first batch of the data,
    and appears in one step when it is complete, as with `tfbn.export`. To undo, remove it.

    The new statistics are right for the new data only. On digits, a recalibration recovered most of
    the accuracy lost on brighter or darker images and on less contrast, and lost slightly more on
    inverted images. On Fashion-MNIST with less contrast it recovered less than half
    (`examples/served_population.py`).

    ```python
    recalibrated = tfbn.recalibrate("models/digits", x_field)
    print(recalibrated.path)  # the next version
    recalibrated.stats.summary()
    ```

    Args:
        path: The directory of a model (its highest version) or of a version, or a symbolic link to
            a version. The model is from `tfbn.export`, or from another tool if all batch norm
            layers can be recognized by the operations in its graph. Layers of Keras 3's
            `model.export`, including tfbn's, and of fused kernels can, except layers over
            sequences, because the graph does not specify which positions are masked.
        x: The data, as for `tfbn.collect`. For several inputs, a dict by the names that clients
            use.
        method: `"exact"`, `"pooled"` or `"algorithm2"`, see `tfbn.collect`.
        batch_size: The batch size for arrays, 32 by default.
        steps: The number of batches; required for infinite data.
        blend_samples: The number of samples that the version's current statistics count as, see
            `PopulationStats.blend`; 0 to replace them. With a blend, the signature `monitor`
            compares requests with the same data, measured at the inputs of the layers while they
            normalize with the blended statistics.
        tolerance: See `tfbn.collect`.
        verbose: See `tfbn.collect`.

    Returns:
        A `Recalibrated`.

    Raises:
        OSError: If the version cannot be read, or the model's directory cannot be written.
        ValueError: If there is no version; if it has no batch norm layers (they may be folded), has
            one in a loop or branch, or is from another tool and may have one that is not
            recognized; if the data cannot be swept, see `tfbn.collect`; or if the outputs of the
            new version are wrong. Nothing is written then.
    """
    return next_version(
        open_version(path),
        x,
        blend_samples=blend_samples,
        batch_size=batch_size,
        steps=steps,
        method=method,
        tolerance=tolerance,
        verbose=verbose,
    )


@dataclasses.dataclass(frozen=True)
class ServedVersion:
    """A version that can be recalibrated.

    Attributes:
        path: The directory of the version.
        network: The network as a Keras model.
        loaded: The SavedModel, as `tf.saved_model.load` returns it.
        record: The record of its batch norm layers.
        provenance: The provenance of the version.
    """

    path: pathlib.Path
    network: loading.ServedNetwork
    loaded: Any
    record: batch_norms.BatchNorms
    provenance: provenance.Provenance


def open_version(path: str | os.PathLike) -> ServedVersion:
    """Load a version, or the highest version in a model's directory.

    Raises:
        ValueError: See `recalibrate`.
    """
    version = versions.existing(path)
    versions.require_readable(version)
    versions.target(version.parent)
    if not (version / provenance.FILE).exists():
        return _open_foreign(version)
    written = provenance.read(version)
    if written.folded:
        raise _no_layers(version, "whose batch norm is folded. Export the model without fold")
    record = batch_norms.read(version)
    if record is None and written.statistics is None and written.stale is None:
        raise _no_layers(version, "which has none. There is nothing to recalibrate")
    if record is None:
        raise _no_layers(
            version, f"which tfbn {written.tfbn} wrote without one. Export the model again"
        )
    loaded = saved_models.load(version).loaded
    network = loading.load(version, loaded, record)
    return ServedVersion(version, network, loaded, record, written)


def _open_foreign(version: pathlib.Path) -> ServedVersion:
    """Load a version that another tool wrote."""
    model = saved_models.load(version)
    loaded = model.loaded
    record, flat = recognition.recognized(version, model)
    network = loading.load(version, loaded, record, flat)
    written = recognition.described(loaded, fingerprints.fingerprint(network))
    return ServedVersion(version, network, loaded, record, written)


def _no_layers(version: pathlib.Path, why: str) -> ValueError:
    return ValueError(
        f"Expected a version with batch norm layers. Received: {str(version)!r}, {why}."
    )


def next_version(
    before: ServedVersion,
    x: Any,
    *,
    blend_samples: int = 0,
    batch_size: int | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Recalibrated:
    """Sweep the data, and write the next version; see `recalibrate`."""
    network = before.network
    x, inputs = _with_first(network, x, batch_size, steps)
    served = _served(before.loaded, network, inputs)
    # A concrete function avoids TensorFlow's warning about retracing after many networks.
    predict = tf.function(lambda x: network(x, training=False), autograph=False)
    predict = predict.get_concrete_function(inputs)
    _require_same(served, predict(inputs), before.path)
    reads_twice = blend_samples and before.provenance.monitor is not None
    x, second = _tee(x) if reads_twice else (x, x)
    options |= {"include_frozen": True, "tolerance": tolerance}
    stats = collect(network, x, batch_size=batch_size, steps=steps, **options)
    stats = _with_fingerprint(stats, before.provenance.fingerprint)
    if blend_samples and stats.previous is not None:
        stats = stats.blend(stats.previous, samples=blend_samples)
    stats.assign(network)
    expected = predict(inputs)
    directory = before.path.parent
    with versions.unfinished(directory) as partial:
        weights.copy_with(before.path, partial, _values(before.record, stats))
        loaded = saved_models.load(partial).loaded
        _require_numbers(expected, before.path)
        max_difference = _require_same(_served(loaded, network, inputs), expected, before.path)
        batch_norms.write(partial, before.record)
        same_batches = SweepOptions(
            batch_size=batch_size, steps=stats.batches, include_frozen=True, tolerance=tolerance
        )
        read_again = functools.partial(check, network, second, same_batches)
        population = _write_monitored(partial, loaded, before, stats, inputs, read_again)
        record = provenance.of_recalibration(
            before.provenance, int(before.path.name), stats, max_difference, population
        )
        provenance.write(partial, record)
        version = versions.put_in_place(partial, directory, None)
    return Recalibrated(directory / str(version), version, stats, max_difference)


def _write_monitored(
    version: pathlib.Path,
    loaded: Any,
    before: ServedVersion,
    stats: PopulationStats,
    inputs: Any,
    read_again: Callable[[], tuple[Any, Any]],
) -> str | None:
    """Write the population of the monitor, and return its identity; `None` without a monitor."""
    monitored = before.provenance.monitor
    if monitored is None:
        return None

    def ask(inputs: Any) -> dict[str, tf.Tensor]:
        return loaded.signatures["monitor"](**before.network.by_name(inputs))

    layers = keras_models.batch_norm_layers(before.network)
    layers = {path: layers[path] for path in monitored["epsilon"]}
    if stats.prior_samples:
        _, batches = read_again()
        outputs = (ask(batch.inputs) for batch in batches)
        stats = stats.replace(layers=_measured(outputs, layers))
    monitor.write_population(version, layers, stats)
    return ask(inputs)[monitor.IDENTITY].numpy()[0].decode()


def _measured(
    outputs: Iterable[Mapping[str, tf.Tensor]], paths: Iterable[str]
) -> dict[str, LayerStats]:
    """Return path -> statistics of the values that entered a layer, from outputs of a monitor.

    With blended statistics they differ from the sweep's, whose layers normalized with the
    statistics of the data.
    """
    measured: dict[str, moments.Moments] = {}
    for answer in outputs:
        for path in paths:
            shape = answer[f"{path}/mean"].shape
            batch = answers.samples_of(answer, path, tuple(shape)).merged()
            if path in measured:
                batch = moments.merge(measured[path], batch, method="pooled")
            measured[path] = batch
    return {path: layer_stats.of_calls([total], "pooled") for path, total in measured.items()}


def _with_first(
    network: loading.ServedNetwork, x: Any, batch_size: int | None, steps: int | None
) -> tuple[Any, Any]:
    """Return the data, and the inputs of its first batch."""
    head = x
    if hasattr(x, "__next__"):  # An iterator yields each batch only once.
        start = list(itertools.islice(x, 1))
        x, head, steps = itertools.chain(start, x), start, None
    options = SweepOptions(batch_size=batch_size, steps=steps, include_frozen=True)
    _, batches = check(network, head, options)
    first = batches.first()
    if first is None:
        raise empty()
    return x, first.inputs


def _tee(x: Any) -> tuple[Any, Any]:
    """Return the data twice. The second is read after the first."""
    if not hasattr(x, "__next__"):
        return x, x
    read: dict[int, Any] = {}
    return (read.setdefault(i, element) for i, element in enumerate(x)), read.values()


def _with_fingerprint(stats: PopulationStats, fingerprint: str) -> PopulationStats:
    """Return the statistics with the fingerprint of the model that was exported."""
    assert stats.previous is not None
    previous = stats.previous.replace(fingerprint=fingerprint)
    return stats.replace(fingerprint=fingerprint, previous=previous)


def _values(record: batch_norms.BatchNorms, stats: PopulationStats) -> dict[str, np.ndarray]:
    """Return path -> value, for the variables of the statistics."""
    return {
        record.layers[path].variables[name]: value
        for path, layer in stats.items()
        for name, value in (("moving_mean", layer.mean), ("moving_variance", layer.variance))
    }


def _served(loaded: Any, network: loading.ServedNetwork, inputs: Any) -> dict[str, tf.Tensor]:
    """Return the outputs that a client receives."""
    return loaded.signatures[signature.DEFAULT](**network.by_name(inputs))


def _require_numbers(outputs: Mapping[str, tf.Tensor], path: pathlib.Path) -> None:
    for name, y in outputs.items():
        if y.dtype.is_floating and not np.isfinite(np.asarray(y, np.float64)).any():
            raise ValueError(
                f"Output {name!r} of {str(path)!r} would not be finite. Look for variances near 0."
            )


def _require_same(
    answers: dict[str, tf.Tensor], expected: dict[str, tf.Tensor], path: pathlib.Path
) -> float:
    """Return the largest difference, or raise `ValueError` if it is larger than rounding."""
    low = any(y.dtype in (tf.float16, tf.bfloat16) for y in expected.values())
    differences = comparison.differences(answers, expected)
    for name, difference in differences.items():
        if difference.absolute > difference.tolerance(low):
            raise ValueError(
                f"Output {name!r} of {str(path)!r} differs by {difference.absolute:.3g} from the "
                "graph. For a custom layer, recalibrate the model, and export it."
            )
    return max((difference.absolute for difference in differences.values()), default=0.0)
