"""Export a model as a SavedModel for TensorFlow Serving."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.folding import fold as folded_copy
from tfbn.serving import provenance, sweeps, versions
from tfbn.serving.export import batch_norms, checks, endpoint, signature
from tfbn.serving.export.warmup import requests_in, require_serving_api, write_requests
from tfbn.serving.monitor.monitor import monitored_layers, write_population


@dataclasses.dataclass(frozen=True)
class Exported:
    """A version that `export` wrote.

    Attributes:
        path: The directory of the new version.
        version: The number of the new version.
        max_abs_difference: The largest absolute difference between the outputs of the loaded
            SavedModel and of the model, on the inputs for its verification.
    """

    path: pathlib.Path
    version: int
    max_abs_difference: float


def export(
    model: keras.Model,
    path: str | os.PathLike,
    version: int | None = None,
    input_signature: Any = None,
    fold: bool = False,
    sample: Any = None,
    warmup: Any = None,
    warmup_batch_size: int = 32,
    require_population: bool = False,
    allow_new_signature: bool = False,
    allow_nan: bool = False,
    monitor: bool | Iterable[str | keras.Layer] = False,
) -> Exported:
    """Write a model's inference network to `path/<version>/` for TensorFlow Serving.

    The SavedModel has one endpoint, `serve` (`serving_default`), and requires neither tfbn nor
    Keras to load. The model does not change, and its `trainable` flags have no effect.

    Names of inputs and outputs are the same as in the highest version in `path` if its structure is
    the same, and the same as from `model.export` otherwise. So clients of the old version also work
    with the new one, although Keras gives unnamed inputs other names in every process.

    The endpoint validates the rank and the known sizes of every input, because some kernels abort
    the server's process on a wrong shape. Specify all sizes that are known. An empty batch is an
    error too. NaN is allowed: an error in the graph would fail the other requests that a server
    merges into the batch, and some networks support NaN. The output may be finite, because oneDNN's
    fused convolution and ReLU returns 0 for NaN. Clients must check for NaN where it matters.

    Before the version is put in place, it is loaded again and verified on `sample`, `warmup` or
    random numbers in [0, 1): outputs are finite and equal to the model's predictions, and outputs
    of the first sample do not depend on the other samples.

    All files are written to a hidden directory in `path`, flushed to the disk and renamed. A server
    that polls `path` never loads an incomplete version, and a failed export leaves no files. The
    next export removes the hidden directory of an export that was killed.

    ```python
    exported = tfbn.export(model, "models/digits", sample=x_val[:8], monitor=True)
    print(exported.path, exported.max_abs_difference)
    ```

    Args:
        model: A built Keras model, with `tfbn.BatchNormalization` or Keras's layer.
        path: The model's directory, which a server polls. It is created if it does not exist.
        version: An integer from 0 to 2**63 - 1. By default one more than the highest version in
            `path`, or 1, also with concurrent exports.
        input_signature: Shapes and dtypes of the inputs, as for `model.export`: a list of the
            positional arguments, each a `tf.TensorSpec`, a `keras.InputSpec`, or a list or dict of
            them, all dense. By default the model's inputs with a batch of any size. Required for a
            subclassed model with several arguments, or whose inputs have several dtypes or are not
            floating-point.
        fold: Whether to export `tfbn.fold(model)`, which is verified against the model.
        sample: Inputs for the verification: a batch for the model, or a `tf.data.Dataset`, whose
            first batch is used. By default the first request of `warmup`, or random numbers in
            [0, 1) with 64 for unknown sizes, which may be far from the data of the network.
        warmup: Requests that a server executes before it reports that it is ready, so that the
            first real request is not slow: a batch for the model, or a `tf.data.Dataset` of
            batches. At most 1000 requests are written, the limit of TensorFlow Serving. Requires
            the extra `serving`.
        warmup_batch_size: The largest number of samples in a warm-up request; larger batches are
            split. A server with batching does not start if a request is larger than its
            `max_batch_size`.
        require_population: Whether stale batch norm statistics are an error instead of a warning.
            They are stale if no sweep of them is known (by `tfbn.update_population_stats`,
            `tfbn.PopulationStatsCallback` or `tfbn recalibrate`), or if the statistics, or weights
            that they depend on, have changed since. A sweep is stored in the layers in memory, and
            in a `.keras` file only for `tfbn.BatchNormalization`, not for Keras's layer.
        allow_new_signature: Whether the inputs and outputs may differ from the highest version in
            `path`, which would break its clients.
        allow_nan: Whether an output may be NaN or infinite in every value.
        monitor: `True`, or a list of batch norm layers or their paths, to add the signature
            `monitor`. It takes the same inputs as `serving_default`, and returns the same outputs
            and the moments of the layers' inputs for every sample (row of the inputs):
            `<path>/count`, the number of values per channel (int64, `(batch,)`, or
            `(batch, channels)` under a mask), `<path>/mean` and `<path>/variance` (biased,
            `(batch, channels)`), and `monitor/population` (`(batch,)`). All calls of a layer are
            one population, and masked positions do not count. A server may merge requests
            (`--enable_batching`). `tfbn.ServedStats` computes an alarm from many samples. Samples
            are compared with the model's statistics, so these should not be blended: to blend, use
            `blend_samples` of `tfbn.recalibrate`, whose next version compares samples with data.

    Returns:
        An `Exported` with the directory and number of the version.

    Raises:
        FileExistsError: If the version exists.
        ImportError: If `warmup` is given and tensorflow-serving-api is not installed.
        OSError: If `path` cannot be written.
        ValueError: If `path` is a version or in one; if the model is not built or cannot be folded;
            if an input has unknown rank or is not dense; if `sample` or `warmup` does not fit the
            inputs; if a batch norm layer computes batch statistics in inference mode; if statistics
            are stale and `require_population`; if the signature differs from the version before; if
            `monitor` is combined with `fold`, or selects layers that the model does not have, calls
            in loops or branches, or calls with rows that are not samples; or if the verification
            fails. An output may differ by 1e-3 of its largest absolute value (at least of 1), 2e-2
            for layers that compute in 16 bits, or by 4 times the network's rounding: the change of
            the output when every weight and input changes by one unit in the last place.
    """
    directory = versions.target(path)
    version = versions.checked(directory, version)
    specs = signature.arguments(model, input_signature)
    monitored = _monitored(model, monitor, fold)
    requests = _requests(warmup, specs, warmup_batch_size)
    inputs, origin = _verification_inputs(specs, sample, requests)
    sweep = sweeps.sweep_of(model)
    _require_population(model, sweep.stale, required=require_population)
    before = signature.of_highest_version(directory)
    kept = functools.partial(signature.kept_names, before=before, allow_new=allow_new_signature)
    input_names = kept("inputs", signature.named_inputs(specs))
    specs = signature.renamed(specs, list(input_names.values()))
    network = folded_copy(model) if fold else model

    with versions.unfinished(directory) as partial:
        saved = endpoint.save(
            network, specs, partial, functools.partial(kept, "outputs"), monitored
        )
        loaded = tf.saved_model.load(os.fspath(partial))
        candidate = checks.Candidate(
            model=model,
            serve=loaded.serve,
            specs=specs,
            inputs=inputs,
            origin=origin,
            saved=saved,
            allow_nan=allow_nan,
            monitor=None if monitored is None else loaded.monitor,
        )
        for check in checks.CHECKS:
            check(candidate)
        record = provenance.of_export(
            model,
            sweep,
            folded=fold,
            max_abs_difference=candidate.max_abs_difference,
            inputs=list(input_names.values()),
            outputs=list(saved.output_names.values()),
            monitored=monitored,
        )
        provenance.write(partial, record)
        batch_norms.write(partial, saved.batch_norms)
        if monitored is not None:
            write_population(partial, monitored, sweep.stats if sweep.stale is None else None)
        if requests is not None:
            write_requests(partial, directory.name, list(input_names.values()), requests())
        version = versions.put_in_place(partial, directory, version)
    return Exported(directory / str(version), version, candidate.max_abs_difference)


def _monitored(
    model: keras.Model, chosen: bool | Iterable[str | keras.Layer], fold: bool
) -> dict[str, keras.Layer] | None:
    """Return the layers to monitor, path -> layer, or `None` without a monitor."""
    if chosen is False or chosen is None:
        return None
    if fold:
        raise ValueError("Give monitor or fold, not both: fold removes all batch norm layers.")
    return monitored_layers(model, chosen)


def _requests(data: Any, specs: list, batch_size: int) -> Callable[[], Iterator[list]] | None:
    """Return a function that returns the warm-up requests, or `None` without requests."""
    if data is None:
        return None
    require_serving_api()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"Expected an integer warmup_batch_size >= 1. Received: {batch_size!r}.")
    return lambda: requests_in(signature.batches(data, specs, "warmup"), specs, batch_size)


def _verification_inputs(
    specs: list, sample: Any, requests: Callable[[], Iterator[list]] | None
) -> tuple[list, str]:
    """Return a batch of inputs, and its origin in words."""
    if sample is not None:
        return next(signature.batches(sample, specs, "sample")), "sample"
    if requests is not None:
        return next(requests()), "the first request of warmup"
    inputs = keras.tree.map_structure(_random, specs)
    return inputs, "random numbers in [0, 1), with 64 for unknown sizes"


def _random(spec: tf.TensorSpec) -> tf.Tensor:
    shape = [64 if size is None else size for size in spec.shape]
    if shape and spec.shape[0] is None:
        shape[0] = 3
    generator = np.random.default_rng(0)
    if spec.dtype == tf.string:
        return tf.fill(shape, "a")
    # Non-negative and small, to support logarithms of images and indices of two classes.
    if spec.dtype.is_integer or spec.dtype.is_bool:
        return tf.cast(generator.integers(0, 2, shape), spec.dtype)
    return tf.cast(generator.random(shape), spec.dtype)


def _require_population(model: keras.Model, stale: str | None, *, required: bool) -> None:
    if not stale:
        return
    if required:
        raise ValueError(
            f"Expected statistics of a sweep over these weights. Received: model {model.name!r}, "
            f"{stale}. Run tfbn.update_population_stats or `tfbn recalibrate` first."
        )
    warnings.warn(
        f"The batch norm statistics of model {model.name!r} are not known to be those of its "
        f"population: {stale}. Run tfbn.update_population_stats(model, data) or "
        "`tfbn recalibrate` first.",
        stacklevel=3,
    )
