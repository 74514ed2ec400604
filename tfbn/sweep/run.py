"""`collect`: run a sweep, from its arguments to its result."""

import os
from collections.abc import Collection
from typing import Any

import keras

from tfbn.population import PopulationStats
from tfbn.sweep import data, memory
from tfbn.sweep.batches import Batches
from tfbn.sweep.checkpoint import Checkpoint
from tfbn.sweep.driver import run_levels, run_sample
from tfbn.sweep.local_engine import LocalEngine
from tfbn.sweep.local_sampler import LocalSampler
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.replica import Replica
from tfbn.sweep.report import Report
from tfbn.sweep.trained_layers import layers_to_sweep
from tfbn.sweep.workers import Workers


def collect(
    model: keras.Model,
    x: Any,
    *,
    method: str = "exact",
    batch_size: int | None = None,
    steps: int | None = None,
    include_frozen: bool = False,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    verbose: int | str = "auto",
) -> PopulationStats:
    """Sweep data through a model and return its population statistics.

    The network is run in inference mode (dropout, noise and augmentation inactive), with
    only its batch norm layers observed. With m_b the count, mu_b the mean and sigma2_b the
    biased variance per channel of the values that enter a layer in batch b:

    - `"exact"`: mean = sum(m_b mu_b) / N and variance = sum(m_b (sigma2_b + (mu_b - mean)^2)) / N
      with N = sum(m_b), while all layers before the layer normalize with their population
      statistics. So inference reproduces these statistics: a second sweep changes nothing. Equal
      to one pass in training mode over the whole data as a single batch ("B = N" of Wu & Johnson
      2021, Table 2, https://arxiv.org/abs/2105.07576), for any batch size and order. Requires one
      pass over a part of the network per level of batch norm layers; with room for `memory_limit`
      bytes these add up to about one pass.
    - `"pooled"`: the same formulas in one pass, while layers normalize with the statistics of the
      batch, as in training.
    - `"algorithm2"`: mean = E[mu_b] and variance = E[m_b / (m_b - 1) sigma2_b], batches
      weighted by their count: Algorithm 2, step 10, of Ioffe & Szegedy 2015
      (https://arxiv.org/abs/1502.03167). One pass, like `"pooled"`.

    A layer that is called several times gets the mean and variance of all its calls together. For
    `"exact"`, layers behind it are measured as in inference, with that one mean and variance for
    all calls. Only in a layer that feeds itself (a cell that is called at every step), each call
    normalizes by the population of that call, because repeated inference passes need not converge
    there. A warning reports calls whose populations differ.

    Layers that `fit` does not train, because they are frozen or called with `training=False`, do
    not change. A trace of `call` in training mode determines these layers. A custom `train_step`
    is observed inside `fit` only, by `PopulationStatsCallback`. Layers that inference does not
    call, or runs with `training=True`, are left out with a warning. Layers that draw random numbers
    in inference draw different ones for every batch, and the same in every pass and sweep.

    The model does not change: no weight, no other state, no random seed. The network is traced
    once for all sweeps of a model.

    A model built under `tf.distribute.MirroredStrategy` is swept on all of its devices, which
    take the batches in turn. Under `tf.distribute.MultiWorkerMirroredStrategy` all workers sweep
    together: each calls `collect` with its shard of the data, which may be empty, and all return
    the statistics of all data. They exchange ten numbers per channel: count, mean, variance, and
    the spread between batches, from which the errors are computed.

    ```python
    stats = tfbn.collect(model, x_train, batch_size=256)
    stats.save("population.safetensors")
    previous = stats.assign(model)  # previous.assign(model) undoes it
    ```

    Args:
        model: A built Keras model. Its batch norm layers may be tfbn's or Keras's, nested,
            shared, or in wrappers and custom layers.
        x: The training data, as `model.fit` takes it: arrays or tensors (one, a list or a
            dict), `tf.data.Dataset`, `keras.utils.PyDataset`, generator, or the
            `tf.distribute.DistributedDataset` of a strategy. Targets and sample weights are
            ignored: a dataset of pairs is x and y, so give several inputs as ((x1, x2), y) or as
            a dict. Masked positions do not count. A model that preprocesses its data inside
            `fit`, as KerasHub's tasks do, is swept on the preprocessed data.
        method: See above.
        batch_size: For arrays; 32 by default. One-pass methods require large batches.
        steps: Number of batches to read; endless data requires it.
        include_frozen: Whether to sweep layers that `fit` does not train as well.
        tolerance: Sweep only a sample, so large that the standard error of every channel's mean is
            at most `tolerance` population standard deviations, and the relative standard error of
            its standard deviation at most `tolerance` (`LayerStats.relative_error`). Samples of
            arrays and batches of a `PyDataset` or another sequence are drawn at random without
            replacement, from the first `steps` batches if given, the same in every call. A stream
            is read in its order, which must be random: a warning reports a sample whose halves
            differ. The sample has at least 20 batches, and grows until the errors are small
            enough, which takes a few passes over the sample. If the data ends first, all of it is
            swept, and `summary` prints "not reached". `tfbn.sweep.sampling` describes what the
            errors require, when they are NaN, and when they are too small.
        memory_limit: For `"exact"`: bytes of main memory for the tensors between levels; by
            default a quarter of the free memory of the host or container. An accelerator stores
            its tensors in as many bytes, at most half of its free memory. Tensors that do not fit
            are computed again from the data, which must be the same, in any order.
        checkpoint: Name of a file that stores the state of a long sweep, written in at most 2 % of
            the time. After a crash the same call resumes there, with the same result; a complete
            sweep deletes the file. The order of the data must be the same every time, which is
            validated. With several workers, each appends its number to the name. Not supported
            with a `tolerance`.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line with the time. `"auto"` is 1.

    Returns:
        `tfbn.PopulationStats`; its `assign(model)` stores the statistics in the model.

    Raises:
        ValueError: If the model is not built, has no batch norm layer to sweep, or cannot
            run on a batch; if its inference on one batch depends on the batch before (a stateful
            RNN); if the data is empty, endless without `steps`, shorter than `steps`, without a
            batch axis, or other data when it is read again; if the data holds NaN, or if the
            values that enter a layer are not finite (the error names layer and batch); for
            `"algorithm2"`, if a batch has only one value per channel; if the data cannot be
            resumed, or the checkpoint belongs to another sweep.
        RuntimeError: If the data raises an error, from that error; on all workers, if one of them
            fails.
    """
    options = SweepOptions(
        method=method,
        batch_size=batch_size,
        steps=steps,
        include_frozen=include_frozen,
        tolerance=tolerance,
        memory_limit=memory_limit,
        checkpoint=checkpoint,
        verbose=verbose,
    )
    return run(model, x, options)


def run(
    model: keras.Model,
    x: Any,
    options: SweepOptions,
    *,
    trained: Collection[str] | None = None,
    warned: bool = False,
) -> PopulationStats:
    """Sweep data through a model: `collect`, and the callbacks.

    Args:
        model: See `collect`.
        x: See `collect`.
        options: The `SweepOptions`.
        trained: The paths of the layers that training has changed; `None` for the layers that
            `call` trains.
        warned: Whether `check_batch` has issued the warnings about the network.
    """
    workers = Workers(model)
    method, tolerance, limit = options.method, options.tolerance, options.memory_limit
    limit = memory.default_limit() if limit is None else limit
    with workers.failing_together():
        layers, batches = check(
            model, x, options, trained=trained, shard=workers.index, alone=workers.count == 1
        )
        report = Report(method, options.verbose if workers.index == 0 else 0, batches.total)
        report.begin()
        checkpoint = None
        if options.checkpoint is not None:
            checkpoint = Checkpoint(workers.own_name(options.checkpoint), batches)
        replica = Replica(
            model,
            layers,
            include_frozen=options.include_frozen,
            trained=trained is not None,
            warned=warned,
        )
        if tolerance is None:
            local = LocalEngine(replica, batches, method, limit, report, checkpoint)
    if tolerance is None:
        return run_levels(workers.engine(local))
    return run_sample(LocalSampler(replica, batches, method, workers, limit), tolerance, report)


def update_population_stats(
    model: keras.Model,
    x: Any,
    *,
    method: str = "exact",
    batch_size: int | None = None,
    steps: int | None = None,
    include_frozen: bool = False,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    verbose: int | str = "auto",
) -> PopulationStats:
    """Sweep data through a model and store its inference statistics: `collect`, then `assign`.

    Supports trained models with tfbn's layer or Keras's.

    ```python
    stats = tfbn.update_population_stats(model, x_train)
    stats.summary()  # how far the moving averages were off
    stats.previous.assign(model)  # undo
    ```

    Args:
        model: See `collect`, as for all arguments.
        x: The training data.
        method: `"exact"`, `"pooled"` or `"algorithm2"`.
        batch_size: For arrays.
        steps: Number of batches to read.
        include_frozen: Whether to sweep layers that `fit` does not train as well.
        tolerance: Largest standard error of a random sample.
        memory_limit: Bytes for the tensors between two levels.
        checkpoint: A file for the state of a long sweep.
        verbose: 0, 1, 2 or `"auto"`.

    Returns:
        The new statistics; `stats.previous.assign(model)` restores the old ones.

    Raises:
        ValueError: See `collect` and `PopulationStats.assign`; the model is then unchanged.
        RuntimeError: See `collect`.
    """
    stats = collect(
        model,
        x,
        method=method,
        batch_size=batch_size,
        steps=steps,
        include_frozen=include_frozen,
        tolerance=tolerance,
        memory_limit=memory_limit,
        checkpoint=checkpoint,
        verbose=verbose,
    )
    stats.assign(model)
    return stats


def check(
    model: keras.Model,
    x: Any,
    options: SweepOptions,
    *,
    trained: Collection[str] | None = None,
    shard: int = 0,
    alone: bool = True,
) -> tuple[dict[str, keras.Layer], Batches]:
    """Return path -> layer for the layers that `collect` would sweep, and the batches.

    Raises:
        ValueError: Every error that `collect` would raise before it reads the first batch.
    """
    layers = layers_to_sweep(model, options.include_frozen, trained)
    return layers, data.batches(x, options, model, may_be_empty=not alone, shard=shard)
