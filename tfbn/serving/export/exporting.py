"""`export`: a model as a SavedModel for TensorFlow Serving."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Iterable
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
        version: Its number.
        max_abs_difference: Largest absolute difference between outputs of the loaded SavedModel
            and of the model, over all outputs, on the inputs it was verified with.
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
    """Write a model's inference network to `path/<version>/` as TensorFlow Serving wants it.

    The SavedModel has one endpoint, `serve` (`serving_default`). Loading it needs neither tfbn
    nor Keras. The model is not changed, and its `trainable` flags do not matter.

    Names of inputs and outputs are those that `model.export` gives, or those of the highest
    version there if that has the same structure: an input without a name has another one in
    every process, and clients of the old version go on as before.

    The endpoint checks the rank and the known sizes of every input before anything else, so
    that a request of a wrong shape is answered with an error: without the check some kernels
    abort the server's process. Give every size that is known: one that is left open is not
    checked. An empty batch is answered with an error too. NaN in a request is not refused, and
    its answer may be finite: oneDNN's fused convolution and ReLU, which TensorFlow uses on many
    processors, makes 0 of NaN. A refusal in the graph would fail the other requests that a server
    merged into the batch, and NaN is the right input of some networks, so a client that may send
    it looks for it itself.

    Before the version is put in place it is loaded again and verified, on `sample`, `warmup` or
    random numbers in [0, 1): outputs are numbers, equal to the model's predictions, and those
    of the first sample do not depend on the other samples.

    Everything is written into a hidden directory in `path`, flushed to the disk and renamed when
    it is complete, so a server that polls `path` never sees a part of a version, and an export
    that fails leaves nothing behind. The hidden directory of an export that was killed is
    removed by the next one.

    ```python
    exported = tfbn.export(model, "models/digits", sample=x_val[:8], monitor=True)
    print(exported.path, exported.max_abs_difference)
    ```

    Args:
        model: A built Keras model, with tfbn's batch norm layers or Keras's own.
        path: The model's directory, one that a server polls. It is made if it does not
            exist.
        version: A whole number from 0 to 2**63 - 1; by default one more than the highest
            there, or 1, whatever other exports write at the same time.
        input_signature: Shapes and dtypes of the inputs, as `model.export` takes them: a
            list of the positional arguments, each a `tf.TensorSpec` or `keras.InputSpec` or
            a list or dict of them, none ragged or sparse. By default the model's own inputs,
            with a batch of any size. A subclassed model that takes other than one
            floating-point dtype, or more than one argument, needs it.
        fold: Whether to export `tfbn.fold(model)` in its place. It is verified against the
            model itself.
        sample: Inputs to verify the export on: a batch as the model takes it, or a
            `tf.data.Dataset`, of which the first batch is taken. By default the first
            request of `warmup`, or random numbers in [0, 1) with 64 for unknown sizes, which
            may be far from the data of the network.
        warmup: Requests that a server answers for itself before it says it is ready, so that
            the first real one is not the slow one: a batch of inputs as the model takes
            them, or a `tf.data.Dataset` of batches. At most 1000 requests are written (as many
            as TensorFlow Serving allows). Needs the extra `serving`.
        warmup_batch_size: The most samples in one of these requests; larger batches are
            split. A server that batches requests does not start with a request larger than
            its `max_batch_size`.
        require_population: Whether stale batch norm statistics are an error, not a
            warning. They are stale if no sweep of them is known (by
            `tfbn.update_population_stats`, `tfbn.PopulationStatsCallback` or
            `tfbn recalibrate`), or if they, or weights that they depend on, have changed since.
            A sweep is known of every model with the layers that were swept, and of a `.keras` file
            with `tfbn.BatchNormalization`; a file keeps nothing of it for Keras's layers.
        allow_new_signature: Whether the inputs and outputs may be others than those of the
            highest version there, with which its clients would fail.
        allow_nan: Whether an output may be NaN or infinite in every value.
        monitor: `True`, or a list of batch norm layers or their paths, to add the signature
            `monitor` beside `serving_default`, which stays as it is. It takes the same inputs and
            answers the same outputs, and beside them for each of these layers the moments of its
            inputs in every sample, a row of the inputs: `<path>/count`, the number of values per
            channel (int64, `(batch,)`, or `(batch, channels)` under a mask), `<path>/mean` and
            `<path>/variance` (biased, `(batch, channels)`), and `monitor/population` (`(batch,)`).
            All calls of a layer are one population, and masked positions do not count. A server
            that merges requests (`--enable_batching`) can split them again. `tfbn.ServedStats`
            makes an alarm of many such samples.
            Requests are compared with the statistics that the model holds. Data has no blended
            ones: to blend, give `blend_samples` to `tfbn.recalibrate`, whose next version
            compares requests with the data.

    Returns:
        An `Exported` with the version's directory and the difference that was found.

    Raises:
        FileExistsError: If the version exists.
        ImportError: If `warmup` is given and tensorflow-serving-api is not installed.
        OSError: If `path` cannot be written to.
        ValueError: If `path` is a version or in one, if the model is not built, if an input has no
            known rank, or is ragged or sparse, if `sample` or `warmup` does not fit the inputs, if
            the model cannot be folded, if a batch norm layer computes batch statistics even in
            inference mode, if statistics are stale and `require_population`, if the signature is
            not that of the version before, or if the verification fails, or if `monitor` is asked
            of a folded network, of layers that the model does not have, that it calls in loops
            or branches, or whose rows do not belong to one sample each. An
            output may differ by 1e-3 of its largest absolute value (or of 1, if that is larger),
            2e-2 where layers compute in 16 bits, or by 4 times the network's own rounding: how far
            the output moves when every weight and input changes by one unit in the last place.
    """
    directory = versions.target(path)
    version = versions.checked(directory, version)
    specs = signature.arguments(model, input_signature)
    monitored = _monitored(model, monitor, fold)
    requests = _requests(warmup, specs, warmup_batch_size)
    inputs, origin = _inputs_to_verify_on(specs, sample, requests)
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
        written = checks.Written(
            model,
            loaded.serve,
            specs,
            inputs,
            origin,
            saved,
            allow_nan=allow_nan,
            monitor=None if monitored is None else loaded.monitor,
        )
        for check in checks.CHECKS:
            check(written)
        record = provenance.of_export(
            model,
            sweep,
            folded=fold,
            max_abs_difference=written.max_abs_difference,
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
    return Exported(directory / str(version), version, written.max_abs_difference)


def _monitored(model, chosen, fold):
    """The layers to monitor by path, or `None` without any."""
    if chosen is False or chosen is None:
        return None
    if fold:
        raise ValueError(
            "Expected monitor without fold. Received: both, but a folded network has no batch norm "
            "layers left to monitor. Give one of the two."
        )
    return monitored_layers(model, chosen)


def _requests(data, specs, batch_size):
    """A function that gives the warm-up requests from the first on, or `None` without any."""
    if data is None:
        return None
    require_serving_api()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            "Expected warmup_batch_size to be a whole number of samples, 1 or more. Received: "
            f"{batch_size!r}."
        )
    return lambda: requests_in(signature.batches(data, specs, "warmup"), specs, batch_size)


def _inputs_to_verify_on(specs, sample, requests):
    """One batch of inputs, and their origin in words."""
    if sample is not None:
        return next(signature.batches(sample, specs, "sample")), "sample"
    if requests is not None:
        return next(requests()), "the first request of warmup"
    inputs = keras.tree.map_structure(_random, specs)
    return inputs, "random numbers in [0, 1), with 64 for unknown sizes"


def _random(spec):
    shape = [64 if size is None else size for size in spec.shape]
    if shape and spec.shape[0] is None:
        shape[0] = 3
    generator = np.random.default_rng(0)
    if spec.dtype == tf.string:
        return tf.fill(shape, "a")
    # Non-negative and small, so that logarithms of images and indices of two classes are fine.
    if spec.dtype.is_integer or spec.dtype.is_bool:
        return tf.cast(generator.integers(0, 2, shape), spec.dtype)
    return tf.cast(generator.random(shape), spec.dtype)


def _require_population(model, stale, *, required):
    if not stale:
        return
    if required:
        raise ValueError(
            "Expected batch norm statistics from a sweep over exactly these weights. "
            f"Received: model {model.name!r}, {stale}. Run tfbn.update_population_stats(model, "
            "data) or `tfbn recalibrate` first, or export without require_population."
        )
    warnings.warn(
        f"The batch norm statistics of model {model.name!r} are not known to be those of its "
        f"population: {stale}. Run tfbn.update_population_stats(model, data) or "
        "`tfbn recalibrate` first.",
        stacklevel=3,
    )
