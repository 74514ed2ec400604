"""`PopulationStatsCallback`: sweep during and after `model.fit`."""

import dataclasses
import itertools
import time
import warnings
from typing import Any

import keras

from tfbn.callbacks import freezing, list_order, report, swapping
from tfbn.callbacks.callback_lists import (
    argument_of_fit,
    enclosing,
    pickled_state,
    shallow_copy,
    shared_copy,
)
from tfbn.callbacks.epoch_size import EpochSize
from tfbn.callbacks.fed_data import FedData
from tfbn.callbacks.fit_guard import FitGuard
from tfbn.callbacks.shared_iterators import refuse_shared, warn_of_shared_shuffle
from tfbn.callbacks.swept_layers import SweptLayers
from tfbn.callbacks.validation import check_targets, check_validation_data, evaluate
from tfbn.models import fingerprints, keras_models
from tfbn.models.random_state import unchanged_generators
from tfbn.population import PopulationStats
from tfbn.sweep.adapters import is_one_shot
from tfbn.sweep.first_trace import FirstTrace, check_batch
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.run import run


class PopulationStatsCallback(keras.callbacks.Callback):
    """Give a model its population statistics at the end of `model.fit`.

    Algorithm 2 of Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167): after training
    the network is frozen, the training data is swept (see `tfbn.collect`), and every batch
    norm layer, tfbn's or Keras's, infers with the mean and variance of that population
    instead of the moving averages.

    ```python
    model.fit(
        x_train, y_train, epochs=5,
        callbacks=[tfbn.PopulationStatsCallback(x_train)],
    )
    ```

    With `every_epoch=True`, validation and the callbacks listed after this one use population
    statistics too, at the end of every epoch: metrics, `EarlyStopping` and `ReduceLROnPlateau` see
    the model that will be deployed, and the file that `ModelCheckpoint` saves has the metrics it
    was saved for. Training continues from the moving averages. The order of callbacks:

    ```python
    callbacks=[
        keras.callbacks.BackupAndRestore("backup"),  # the state of training
        keras.callbacks.EarlyStopping(restore_best_weights=True),  # weights to sweep
        keras.callbacks.ReduceLROnPlateau(),
        tfbn.PopulationStatsCallback(x_train, every_epoch=True),
        keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True),  # for inference
    ]
    ```

    Callbacks that replace the weights (`EarlyStopping` with `restore_best_weights=True`,
    `SwapEMAWeights`) or save the state of training come before this one; callbacks that save the
    model for inference come after it. Another order is an error at the beginning of training.
    `BackupAndRestore` deletes its files after the last sweep.

    If `fit` ends with an error or Ctrl-C, the model has the moving averages of its last step, and
    after a regular end the population statistics. If a weight is not finite at the end
    (`TerminateOnNaN`), the model keeps its moving averages, with a warning.

    To resume training exactly, list `ModelCheckpoint("train.keras")` before this callback. It saves
    the moving averages, the flags and the optimizer at the end of every epoch, and
    `load_model("train.keras").fit(..., initial_epoch=...)` continues to the bit. After `fit`,
    `callback.unfreeze()` and `callback.stats.previous.assign(model)` restore them.

    A layer is swept if a step of `fit` has changed its moving statistics and inference uses them.
    The statistics of other layers do not change.

    Under `tf.distribute.MirroredStrategy` all devices share the sweep and get the same statistics.
    During training the moving averages of every device are restored.

    Args:
        x: The training data, in any form that `tfbn.collect` supports, preprocessed as the network
            gets it in training: a callback sees neither `fit`'s data nor the preprocessing in a
            `train_step`, but warns if the moving averages show other data. A generator can be
            swept only once, and must not be the one that `fit` reads. With `every_epoch=True`,
            each sweep changes the order of a `tf.data.Dataset` that shuffles with a seed and that
            `fit` reads too, with a warning.
        method: `"exact"`, `"pooled"` or `"algorithm2"`, see `tfbn.collect`.
        batch_size: For arrays; 32 by default. One-pass methods require large batches.
        steps: Number of batches that make the data; required for endless data.
        every_epoch: Whether to sweep in every epoch, see above. It costs one sweep an epoch.
        freeze: Whether to freeze the model (`trainable=False`) after the sweep at the end of
            training, as in Algorithm 2, so that training mode and `fit` do not overwrite the
            statistics. `unfreeze()` undoes it, and so does another `fit` with such a callback, also
            for a model that reuses a layer (with a warning). Flags that were set to `True` since
            the freeze stay, for example `base.trainable = True` for the next stage of fine-tuning.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line with the time. `"auto"`
            follows `fit`. Unless 0, a report on the moving averages is printed at the end.
        model: The network to sweep, if it is only a part of the trained model, like the generator
            of a GAN. It must be called on a batch before `fit`, or in the first step. If `fit`
            trains none of its layers (an average of weights), the layers that its `call` trains are
            swept.
        tolerance: See `tfbn.collect`.
        validation_data: See `model.fit`; generators are not supported. After the last sweep the
            trained model is evaluated with the moving averages and with the population statistics.
        validation_steps: Number of batches to evaluate; required for endless validation data.
        memory_limit: See `tfbn.collect`.

    Attributes:
        stats: The `PopulationStats` of the last sweep; `None` before the first, and if `fit` has
            trained no batch norm layer.
        validation: With `validation_data`, metric name -> (value before, value after) the last
            sweep; else `None`.

    Raises:
        ValueError: At the beginning of training, for another order of callbacks, and for anything
            that `tfbn.collect` raises on the first batch. After the first step, if it has not
            called or trained the network.
    """

    def __init__(
        self,
        x: Any,
        *,
        method: str = "exact",
        batch_size: int | None = None,
        steps: int | None = None,
        every_epoch: bool = False,
        freeze: bool = True,
        verbose: int | str = "auto",
        model: keras.Model | None = None,
        validation_data: Any = None,
        tolerance: float | None = None,
        validation_steps: int | None = None,
        memory_limit: int | None = None,
    ):
        super().__init__()
        if not isinstance(every_epoch, bool):
            raise ValueError(f"Expected every_epoch to be a bool. Received: {every_epoch!r}.")
        if validation_data is not None:
            check_validation_data(validation_data, validation_steps)
        self.stats: PopulationStats | None = None
        self.validation: dict[str, tuple[Any, Any]] | None = None
        self._x = x
        self._options = SweepOptions(
            method=method,
            batch_size=batch_size,
            steps=steps,
            tolerance=tolerance,
            memory_limit=memory_limit,
        )
        self._every_epoch = every_epoch
        self._freeze = freeze
        self._verbose = verbose
        self._inner = model
        self._validation_data = validation_data
        self._validation_steps = validation_steps
        self._layers: Any = None  # The `SweptLayers` of a running `fit`.
        self._training = False
        self._stepped = True  # Whether a step has run since the last sweep.
        self._guarded = False
        self._epoch_size = EpochSize()
        self._fed: FedData | None = None  # While `fit` runs.
        self._seconds: float | None = None  # Time of the first sweep in an epoch, to be printed.
        self._seconds_printed = False

    def __deepcopy__(self, memo: dict) -> "PopulationStatsCallback":
        """Return a copy that shares the data and the models."""
        shared = ("_x", "_validation_data", "_inner", "_model", "stats", "_fed", "_layers")
        return shared_copy(self, memo, shared)

    __copy__ = shallow_copy

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but the state of a running `fit`; raise for unpicklable data."""
        state = pickled_state(self, ("_x", "_validation_data"))
        return {**state, "_fed": None, "_layers": None}

    def unfreeze(self) -> None:
        """Restore the `trainable` flag of every layer before the freeze. Statistics stay."""
        if self.model is not None and freezing.unfreeze(self._network):
            freezing.retrace(self.model)

    def set_model(self, model: keras.Model) -> None:
        """Refuse a model of Keras 2, whose `fit` would fail on a callback of Keras 3."""
        keras_models.refuse_keras_2(model)
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Undo the freeze of an earlier `fit`, and check everything before the first step."""
        network = self._network
        swapping.swap_out(network)  # A custom loop may have failed.
        positions = enclosing(self)
        for position in positions:
            list_order.check(position, self._every_epoch)
        self._check_repeatable()
        refuse_shared(self._x)
        if self._every_epoch:
            warn_of_shared_shuffle(self._x)
        self._epoch_size = EpochSize(argument_of_fit("steps_per_epoch") is None)
        if self._validation_data is not None:
            check_targets(self.model, self._validation_data)
        self._layers = SweptLayers(self.model, network, self._inner is not None, self._trace)
        reused = freezing.reused(network, self.model)
        with freezing.unchanged_on_error(network, self.model):
            # A part of the model may be swept now, where the whole model was frozen.
            unfrozen = freezing.unfreeze(network) + freezing.unfreeze(self.model, self.model)
            if unfrozen:
                freezing.require_optimizer_for_all(self.model)
            self._layers.check()
        if unfrozen:
            freezing.retrace(self.model)
            self._print(
                f"{report.counted(unfrozen, 'layer')} left frozen by an earlier fit will train."
            )
        if reused:
            warnings.warn(
                f"{', '.join(map(repr, reused))}, frozen by the `fit` of another model, will train "
                "again. To keep it frozen, call `unfreeze()` of the callback that froze it, then "
                "set trainable=False.",
                stacklevel=2,
            )
        for position in positions:
            for sentence in list_order.warnings(position, self._every_epoch):
                warnings.warn(sentence, stacklevel=2)
        self._guarded = bool(positions)
        if positions:
            guard = FitGuard.install(positions[-1].callbacks, self.model)
            guard.add(network, validation=self._every_epoch)
        self._training = self._stepped = True
        self._fed = FedData(self.model, network)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record that the weights will change."""
        self._stepped = True
        self._layers.begin_step()
        if self._fed is not None:
            self._fed.begin_step(batch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the batches, and check the layers after the first step."""
        self._epoch_size.step(batch)
        self._layers.end_step()
        if self._fed is not None:
            self._fed.end_step(batch, (self.params or {}).get("steps"))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Swap population statistics in for validation, with `every_epoch=True`."""
        self._epoch_size.end(self.model)
        if self._training and self._every_epoch:
            self._sweep(verbose=0)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the moving averages."""
        if self._training:
            swapping.swap_out(self._network)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restore the moving averages."""
        swapping.swap_out(self._network)
        self._epoch_size.begin()
        if self._seconds is not None:
            self._print(f"The sweep with every_epoch=True took {self._seconds:.1f} s of the epoch.")
            self._seconds = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Swap population statistics in for later callbacks, with `every_epoch=True`."""
        self._epoch_size.end(self.model)
        if self._fed is not None:
            self._fed.end_epoch((self.params or {}).get("steps"))
        if self._every_epoch:
            self._sweep(verbose=0)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Sweep, report, and freeze the model with `freeze=True`."""
        self._training = False
        network = self._network
        # Another such callback may have ended before.
        swapping.swap_out(network)
        frozen = freezing.unfreeze(network)
        stats = self._sweep(verbose=self._verbosity, last=True)
        if stats is None:
            if frozen:
                freezing.freeze(network, self._layers.by_batch, self.model)
            return
        if self._validation_data is not None:
            data, steps = self._validation_data, self._validation_steps
            after = evaluate(self.model, data, steps=steps)
            with swapping.swapped_out(network):
                before = evaluate(self.model, data, steps=steps)
            self.validation = {name: (before[name], after[name]) for name in before}
        if self._freeze or frozen:
            freezing.freeze(network, self._layers.by_batch, self.model)
            freezing.retrace(self.model)
        if not self._guarded:
            swapping.keep(network)
        for line in report.lines(stats, self.validation, self._freeze):
            self._print(line)

    @property
    def _network(self) -> keras.Model:
        return self.model if self._inner is None else self._inner

    @property
    def _verbosity(self) -> int | str:
        if self._verbose != "auto":
            return self._verbose
        return (self.params or {}).get("verbose", "auto")

    def _print(self, line: str) -> None:
        if self._verbosity:
            print(line)

    def _trace(self, **options: Any) -> FirstTrace | None:
        x = self._x
        if is_one_shot(x):  # The sweep reads the batches of the check again.
            self._x, x = itertools.tee(x)
        with unchanged_generators(self.model):  # The data may draw random numbers.
            return check_batch(self._network, x, self._options, **options)

    def _sweep(self, verbose: int | str, last: bool = False) -> PopulationStats | None:
        """Swap population statistics in, after a new sweep if the weights have changed.

        Returns:
            The statistics; `None` without a layer to sweep, or if a weight is not finite.
        """
        network, stats = self._network, self.stats
        swapping.swap_out(network)
        if stats is None or self._stepped or stats.fingerprint != fingerprints.fingerprint(network):
            trained = self._layers.paths()
            if trained is not None and not trained:
                return None
            start = time.perf_counter()
            with unchanged_generators(self.model):
                options = dataclasses.replace(self._options, verbose=verbose)
                stats = self.stats = run(
                    network, self._x, options, trained=trained, warned=self._layers.warned
                )
            if self._training and self._stepped and not self._seconds_printed:
                self._seconds, self._seconds_printed = time.perf_counter() - start, True
            self._stepped = False
        if last:
            self._compare_with_fit(stats)
        swapping.swap_in(network, stats)
        return stats

    def _compare_with_fit(self, stats: PopulationStats) -> None:
        """Warn if the sweep had other data than `fit`, or less."""
        if self._options.steps is self._options.tolerance is None:
            self._epoch_size.warn_of(stats, is_one_shot(self._x))
        if self._fed is not None:
            self._fed.warn_of(stats, self._epoch_size.batch_size)
            self._fed = None

    def _check_repeatable(self) -> None:
        one_pass = is_one_shot(self._x) and self._options.steps is None
        if self._every_epoch and one_pass:
            raise ValueError(
                "Expected repeatable data for every_epoch=True. Received: a generator. Pass "
                "arrays, a tf.data.Dataset or a PyDataset, or `steps`."
            )
