"""`recalibrate`: the population statistics of a served model, moved to where its data is now."""

import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from tfbn.models import fingerprints, keras_models
from tfbn.population import PopulationStats
from tfbn.serving import provenance, saved_models, versions
from tfbn.serving.export import batch_norms, checks, signature
from tfbn.serving.monitor import answers, monitor
from tfbn.serving.recalibrate import loading, recognition, weights
from tfbn.stats import layer_stats, moments
from tfbn.sweep.batches import empty
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.run import check, collect


@dataclasses.dataclass(frozen=True)
class Recalibrated:
    """A version that `recalibrate` wrote.

    Attributes:
        path: The directory of the new version.
        version: Its number.
        stats: The statistics that it has, a `PopulationStats`; `stats.previous` are those of the
            version before.
        max_abs_difference: Largest absolute difference between outputs of the new version and of
            the network with these statistics, over all outputs, on the first batch.
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
    """Sweep data through a model that is served, and write its next version with the result.

    It needs the SavedModel alone, not the model's code. All of the model but the means and
    variances of its batch norm layers stays as it is: graphs, signatures, assets and warm-up
    requests are those of the version before, to the byte. Unlabelled data from the field will do.

    All batch norm layers are swept, those too that were frozen when the model was exported. The
    version before is left untouched. The new one is verified, on the first batch of the data, and
    appears in one step when it is complete, as with `tfbn.export`. Going back is to remove it.

    Statistics of other data are right for that data only. On digits, those of brighter or darker
    images or of less contrast recovered most of the lost accuracy; those of inverted images cost
    a little more of it. On Fashion-MNIST those of less contrast recovered less than half
    (`examples/served_population.py`).

    ```python
    found = tfbn.recalibrate("models/digits", x_field)
    print(found.path)  # the next version
    found.stats.summary()
    ```

    Args:
        path: The model's directory, whose highest version is taken, or that of a version, or a
            symbolic link to it. A model
            that `tfbn.export` wrote. One of another tool will do if each of its batch norm layers
            can be told from the operations in its graph: those of Keras 3's `model.export`, with
            layers of tfbn too, and of fused kernels can, but for layers over sequences, where the
            graph does not tell which positions are masked.
        x: The data, as `tfbn.collect` takes it. For several inputs a dict by the names that
            clients use.
        method: `"exact"`, `"pooled"` or `"algorithm2"`, see `tfbn.collect`.
        batch_size: For arrays; 32 by default.
        steps: Number of batches that make the data; endless data needs it.
        blend_samples: N, as how many samples the statistics that the version holds count beside
            those of the data, see `PopulationStats.blend`; 0 for the data's own. The signature
            `monitor` then compares requests with the same data, as it enters the layers while
            these normalise with the blended statistics.
        tolerance: See `tfbn.collect`.
        verbose: See `tfbn.collect`.

    Returns:
        A `Recalibrated`.

    Raises:
        OSError: If the version cannot be read, or its model's directory not written to.
        ValueError: If there is no version there, or the highest has no batch norm layers (they were
            folded away, say), has one in a loop or branch, or is of another tool and may have one
            that is not recognized;
            if the data cannot be swept, see `tfbn.collect`; or if the new version does not predict
            as it should. Nothing is written then.
    """
    return next_version(
        opened(path),
        x,
        blend_samples=blend_samples,
        batch_size=batch_size,
        steps=steps,
        method=method,
        tolerance=tolerance,
        verbose=verbose,
    )


@dataclasses.dataclass(frozen=True)
class Opened:
    """A version that can be recalibrated.

    Attributes:
        path: Its directory.
        network: Its network as a Keras model.
        loaded: The SavedModel.
        found: Where its batch norm layers are.
        provenance: The provenance that `tfbn.export` wrote.
    """

    path: pathlib.Path
    network: loading.ServedNetwork
    loaded: Any
    found: batch_norms.BatchNorms
    provenance: provenance.Provenance


def opened(path: str | os.PathLike) -> Opened:
    """The highest version in a model's directory, or the version of that directory.

    Raises:
        ValueError: See `recalibrate`.
    """
    version = versions.existing(path)
    versions.require_readable(version)
    versions.target(version.parent)
    if not (version / provenance.FILE).exists():
        return _opened_of_others(version)
    written = provenance.read(version)
    if written.folded:
        raise ValueError(
            f"Expected a version with batch norm layers. Received: {str(version)!r}, whose batch "
            "norm is folded into other weights. Export the model without fold."
        )
    found = batch_norms.read(version)
    if found is None and written.statistics is None and written.stale is None:
        raise ValueError(
            f"Expected a version with batch norm layers. Received: {str(version)!r}, which has "
            "none. There is nothing to recalibrate."
        )
    if found is None:
        raise ValueError(
            "Expected a version with a record of its batch norm layers. Received: "
            f"{str(version)!r}, which tfbn {written.tfbn} wrote without one. Export the model "
            "again."
        )
    loaded = saved_models.load(version).loaded
    return Opened(version, loading.load(version, loaded, found), loaded, found, written)


def _opened_of_others(version):
    model = saved_models.load(version)
    loaded = model.loaded
    found, flat = recognition.recognized(version, model)
    network = loading.load(version, loaded, found, flat)
    written = recognition.described(loaded, fingerprints.fingerprint(network))
    return Opened(version, network, loaded, found, written)


def next_version(
    before: Opened,
    x: Any,
    *,
    blend_samples: int = 0,
    batch_size: int | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Recalibrated:
    """Sweep, and write the next version; see `recalibrate`."""
    network = before.network
    x, inputs = _with_first(network, x, batch_size, steps)
    served = _served(before.loaded, network, inputs)
    # A concrete function: TensorFlow warns of retracing if many networks are called in one process.
    predict = tf.function(lambda x: network(x, training=False), autograph=False)
    predict = predict.get_concrete_function(inputs)
    _require_same(served, predict(inputs), before.path)
    measured_again = blend_samples and before.provenance.monitor is not None
    x, again = _twice(x) if measured_again else (x, x)
    options |= {"include_frozen": True, "tolerance": tolerance}
    stats = collect(network, x, batch_size=batch_size, steps=steps, **options)
    stats = _of_weights(stats, before.provenance.fingerprint)
    if blend_samples:
        stats = stats.blend(stats.previous, samples=blend_samples)
    stats.assign(network)
    expected = predict(inputs)
    directory = before.path.parent
    with versions.unfinished(directory) as partial:
        weights.copy_with(before.path, partial, _values(before.found, stats))
        loaded = saved_models.load(partial).loaded
        _require_numbers(expected, before.path)
        off = _require_same(_served(loaded, network, inputs), expected, before.path)
        batch_norms.write(partial, before.found)
        swept_again = SweepOptions(
            batch_size=batch_size, steps=stats.batches, include_frozen=True, tolerance=tolerance
        )
        swept = functools.partial(check, network, again, swept_again)
        population = _write_monitored(partial, loaded, before, stats, inputs, swept)
        record = provenance.of_recalibration(
            before.provenance, int(before.path.name), stats, off, population
        )
        provenance.write(partial, record)
        version = versions.put_in_place(partial, directory, None)
    return Recalibrated(directory / str(version), version, stats, off)


def _write_monitored(version, loaded, before, stats, inputs, swept):
    """The identity of the new population that its monitor answers, `None` without a monitor."""
    monitored = before.provenance.monitor
    if monitored is None:
        return None

    def ask(inputs):
        return loaded.signatures["monitor"](**before.network.by_name(inputs))

    layers = keras_models.batch_norm_layers(before.network)
    layers = {path: layers[path] for path in monitored["epsilon"]}
    if stats.prior_samples:
        _, batches = swept()
        asked = (ask(batch.inputs) for batch in batches)
        stats = stats.replace(layers=_measured(asked, layers))
    monitor.write_population(version, layers, stats)
    return ask(inputs)[monitor.IDENTITY].numpy()[0].decode()


def _measured(asked, paths):
    """The statistics of the values that entered layers, by path, from answers of a monitor.

    Where a version normalises with blended statistics, they are others than those of the sweep,
    which has measured the values while its layers normalised with the data's own.
    """
    measured: dict[str, moments.Moments] = {}
    for answer in asked:
        for path in paths:
            shape = answer[f"{path}/mean"].shape
            found = answers.samples_of(answer, path, tuple(shape)).together()
            if path in measured:
                found = moments.merge(measured[path], found, method="pooled")
            measured[path] = found
    return {path: layer_stats.of_calls([found], "pooled") for path, found in measured.items()}


def _with_first(network, x, batch_size, steps):
    """The data, and the inputs of its first batch."""
    head = x
    if hasattr(x, "__next__"):  # A batch that was read does not come again.
        start = list(itertools.islice(x, 1))
        x, head, steps = itertools.chain(start, x), start, None
    options = SweepOptions(batch_size=batch_size, steps=steps, include_frozen=True)
    _, batches = check(network, head, options)
    first = batches.first()
    if first is None:
        raise empty()
    return x, first.inputs


def _twice(x):
    """The same data two times, the second to be read when the first was."""
    if not hasattr(x, "__next__"):
        return x, x
    read: dict[int, Any] = {}
    return (read.setdefault(i, element) for i, element in enumerate(x)), read.values()


def _of_weights(stats, fingerprint):
    """The statistics with the fingerprint of the model that was exported."""
    previous = stats.previous.replace(fingerprint=fingerprint)
    return stats.replace(fingerprint=fingerprint, previous=previous)


def _values(found, stats):
    """The values of the statistics variables, by their places."""
    return {
        found.layers[path].variables[name]: value
        for path, layer in stats.items()
        for name, value in (("moving_mean", layer.mean), ("moving_variance", layer.variance))
    }


def _served(loaded, network, inputs):
    """The answer that a client gets."""
    return loaded.signatures[signature.DEFAULT](**network.by_name(inputs))


def _require_numbers(outputs, path):
    for name, y in outputs.items():
        if y.dtype.is_floating and not np.isfinite(np.asarray(y, np.float64)).any():
            raise ValueError(
                f"Expected outputs that are numbers. Received: output {name!r} of {str(path)!r}, "
                "which with the new statistics is NaN or infinite in every value of the first "
                "batch. Look for a channel whose variance is near 0 in the data."
            )


def _require_same(answers, expected, path):
    """The largest difference, or an error where outputs differ by more than rounding."""
    low = any(y.dtype in (tf.float16, tf.bfloat16) for y in expected.values())
    largest = 0.0
    for name, (off, scale) in checks.differences(answers, expected).items():
        if off > scale * (2e-2 if low else 1e-3):
            raise ValueError(
                "Expected a network whose graph, run with batch norm layers in the places that "
                f"were recorded, predicts what it is served to predict. Received: {str(path)!r}, "
                f"whose output {name!r} differs by {off:.3g} on the first batch. A batch norm "
                "layer of a kind of its own, perhaps: recalibrate the model itself, and export it "
                "again."
            )
        largest = max(largest, off)
    return largest
