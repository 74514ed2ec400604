"""`PopulationStatsCallback`: when to sweep during `model.fit`."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfbn import arguments
from tfbn.callbacks import fit_guard
from tfbn.callbacks.callback_lists import (
    argument_of_fit,
    enclosing,
    pickled_state,
    shallow_copy,
    shared_copy,
)
from tfbn.callbacks.epoch_size import EpochSize
from tfbn.callbacks.fed_data import FedData
from tfbn.callbacks.shared_iterators import refuse_shared
from tfbn.callbacks.swept_layers import SweptLayers
from tfbn.callbacks.validation import check_targets, check_validation_data, evaluate
from tfbn.models import fingerprints
from tfbn.models.random_state import unchanged_generators
from tfbn.population import PopulationStats
from tfbn.stats import drift
from tfbn.sweep.adapters import is_one_shot
from tfbn.sweep.first_trace import FirstTrace, check_batch
from tfbn.sweep.methods import check_method
from tfbn.sweep.run import collect_trained


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

    List it after callbacks that put other weights into the model: `EarlyStopping` with
    `restore_best_weights=True`, and `SwapEMAWeights`. Of several such callbacks the last one
    listed has the last word.

    While `fit` runs, population statistics are in the model only for validation
    (`before_validation`) and for the callbacks after this one at the end of an epoch
    (`every_n_epochs`). However `fit` ends, also by an error or Ctrl-C, the model holds the moving
    averages of its last step, or after a regular end the population statistics.

    To resume training exactly, keep the state of training: `ModelCheckpoint("train.keras")` listed
    before this callback saves at the end of every epoch the moving averages, the flags and the
    optimizer, and `load_model("train.keras").fit(..., initial_epoch=...)` goes on to the bit. After
    `fit`, `callback.unfreeze()` and `callback.stats.previous.assign(model)` bring them back.

    A layer is swept if a step of `fit` has changed its moving statistics, whatever `train_step` and
    `call` look like, and if inference uses these. Others hold what they have.

    Under `tf.distribute.MirroredStrategy` all devices share the sweep and get the same
    statistics. In the middle of training each gets its own moving averages back.

    Args:
        x: The training data, as `tfbn.collect` takes it, preprocessed as the network gets it in
            training: what a `train_step` of your own does to the data is not done here. A callback
            never sees the data given to `fit`; a warning says so where the moving averages show
            other data. A generator can be swept only once, and must not be the one that
            `fit` reads. A `tf.data.Dataset` that shuffles with a seed, and that `fit` reads too,
            would be in another order after every reading in the middle of training: give one that
            does not shuffle.
        method: `"exact"`, `"pooled"` or `"algorithm2"`, see `tfbn.collect`.
        batch_size: For arrays; 32 by default. One-pass methods want it large.
        steps: Number of batches that make the data; endless data needs it.
        every_n_epochs: Also at the end of every n-th epoch, after its validation: for
            `ModelCheckpoint`, listed after this callback. The next epoch goes on from the moving
            averages, as if no sweep had been.
        before_validation: Also before every validation inside `fit`, whose metrics are
            then those with population statistics. After it the moving averages are back.
        freeze: Whether to leave the model frozen (`trainable=False`) after the sweep at the
            end of training, as in Algorithm 2. It keeps training mode and `fit` from
            overwriting the statistics. `unfreeze()` undoes it, and so does another `fit` with
            such a callback.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line per pass. `"auto"`
            follows `fit`. Unless it is silent, a few lines at the end say how far the moving
            averages were off.
        model: The network to sweep, where the model that is trained only holds it: the generator
            of a GAN. It must have seen a batch before `fit`, or in its first step. If `fit` trains
            none of its layers (an average of weights), those that its `call` trains are swept.
        tolerance: See `tfbn.collect`.
        validation_data: As `model.fit` takes it, but no generator. After the last sweep the
            trained model is evaluated with the moving averages and with the population statistics.
        validation_steps: Number of batches to evaluate; endless validation data needs it.
        memory_limit: See `tfbn.collect`.

    Attributes:
        stats: The `PopulationStats` of the last sweep; `None` before the first, and if `fit` has
            trained no batch norm layer.
        validation: With `validation_data`, the metrics by name, each a tuple of the one before
            the last sweep and the one after it; else `None`.

    Raises:
        ValueError: At the beginning of training, if another callback is listed where it would
            replace the weights that were swept, or save the wrong statistics; and whatever
            `tfbn.collect` raises on the first batch. After the first step, if nothing trains the
            network, or nothing calls it.
    """

    def __init__(
        self,
        x: Any,
        method: str = "exact",
        batch_size: int | None = None,
        steps: int | None = None,
        every_n_epochs: int | None = None,
        before_validation: bool = False,
        freeze: bool = True,
        verbose: int | str = "auto",
        model: keras.Model | None = None,
        validation_data: Any = None,
        tolerance: float | None = None,
        validation_steps: int | None = None,
        memory_limit: int | None = None,
    ):
        super().__init__()
        check_method(method)
        arguments.positive(every_n_epochs=every_n_epochs)
        if validation_data is not None:
            check_validation_data(validation_data, validation_steps)
        self.stats: PopulationStats | None = None
        self.validation: dict[str, tuple[Any, Any]] | None = None
        self._x = x
        self._options: dict[str, Any] = {
            "method": method,
            "batch_size": batch_size,
            "steps": steps,
            "tolerance": arguments.tolerance(tolerance),
        }
        self._every_n_epochs = every_n_epochs
        self._before_validation = before_validation
        self._freeze = freeze
        self._verbose = verbose
        self._inner = model
        self._validation_data = validation_data
        self._validation_steps = validation_steps
        self._memory_limit = memory_limit
        self._layers: Any = None  # The `SweptLayers` of a running `fit`.
        self._training = False
        self._stepped = True  # Since the last sweep.
        self._guarded = False
        self._epoch_size = EpochSize()
        self._fed: FedData | None = None  # While `fit` runs.

    def __deepcopy__(self, memo: dict) -> "PopulationStatsCallback":
        """A copy that shares the data and the models."""
        shared = ("_x", "_validation_data", "_inner", "_model", "stats", "_fed", "_layers")
        return shared_copy(self, memo, shared)

    __copy__ = shallow_copy

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but those of a running `fit`, unless the data cannot be pickled."""
        state = pickled_state(self, ("_x", "_validation_data"))
        return {**state, "_fed": None, "_layers": None}

    def unfreeze(self) -> None:
        """Put every layer's `trainable` flag back to its value before the freeze.

        The statistics stay as they are.
        """
        if self.model is not None and fit_guard.unfreeze(self._network):
            _trace_anew(self.model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Undo the freeze of an earlier `fit`, and check all that can be checked by now."""
        network = self._network
        fit_guard.put_back(network)  # Left by a loop of the user's own that failed.
        lists = enclosing(self)
        for _, before, after in lists:
            self._check_order(before, after)
        self._check_repeatable()
        refuse_shared(self._x)
        self._epoch_size = EpochSize(argument_of_fit("steps_per_epoch") is None)
        if self._validation_data is not None:
            check_targets(self.model, self._validation_data)
        frozen = fit_guard.unfreeze(network)
        self._layers = SweptLayers(self.model, network, self._inner is not None, self._trace)
        try:
            self._layers.check()
        except BaseException:
            if frozen:
                fit_guard.freeze(network)
            raise
        if frozen:
            _trace_anew(self.model)
            self._say("The model, which an earlier fit had left frozen, is trained further.")
        self._guarded = bool(lists)
        if lists:
            fit_guard.guard(lists[-1].callbacks, network)
        if self._before_validation:
            fits = lists[-1].callbacks if lists else None
            fit_guard.guard_validation(self.model, network, fits)
        self._training = self._stepped = True
        self._fed = FedData(self.model, network)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Note that the weights will change."""
        self._stepped = True
        self._layers.begin_step()
        if self._fed is not None:
            self._fed.begin_step(batch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the batches, and check what only the first step shows."""
        self._epoch_size.step(batch)
        self._layers.end_step()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validate with population statistics, if asked to."""
        self._epoch_size.end(self.model)
        if self._training and self._before_validation:
            self._sweep(verbose=0)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Go back to the moving averages."""
        if self._training:
            fit_guard.put_back(self._network)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Train on from the moving averages."""
        fit_guard.put_back(self._network)
        self._epoch_size.begin()
        if self._fed is not None:
            self._fed.begin_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sweep for the callbacks after this one, if it is the epoch to."""
        self._epoch_size.end(self.model)
        if self._fed is not None:
            self._fed.end_epoch((self.params or {}).get("steps"))
        if self._every_n_epochs and (epoch + 1) % self._every_n_epochs == 0:
            self._sweep(verbose=0)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Sweep, say how far the moving averages were off, and freeze if asked to."""
        self._training = False
        fit_guard.release(self.model)
        # Another such callback may have come to its end before.
        fit_guard.put_back(self._network)
        frozen = fit_guard.unfreeze(self._network)
        before = self._evaluate()
        stats = self._sweep(verbose=self._verbosity, last=True)
        after = self._evaluate()
        if before is not None and after is not None:
            self.validation = {name: (before[name], after[name]) for name in before}
        if (self._freeze and stats is not None) or frozen:
            fit_guard.freeze(self._network, self._layers.by_batch)
            _trace_anew(self.model)
        if not self._guarded:
            fit_guard.keep(self._network)
        for line in () if stats is None else self._report(stats):
            self._say(line)

    @property
    def _network(self) -> keras.Model:
        return self.model if self._inner is None else self._inner

    @property
    def _verbosity(self) -> int | str:
        if self._verbose != "auto":
            return self._verbose
        return (self.params or {}).get("verbose", "auto")

    def _say(self, line: str) -> None:
        if self._verbosity:
            print(line)

    def _trace(self, **options: Any) -> FirstTrace | None:
        x = self._x
        if is_one_shot(x):  # The batches that the check reads come again.
            self._x, x = itertools.tee(x)
        with unchanged_generators(self.model):  # The data may draw random numbers.
            return check_batch(self._network, x, **self._options, **options)

    def _sweep(self, verbose: int | str, last: bool = False) -> PopulationStats | None:
        """Put population statistics in, from a new sweep if the weights are others.

        Returns:
            The statistics; `None` if there is no layer to sweep.
        """
        network, stats = self._network, self.stats
        fit_guard.put_back(network)
        if (
            stats is None
            or self._stepped
            or not fingerprints.has_fingerprint(network, stats.fingerprint)
        ):
            trained = self._layers.paths()
            if trained is not None and not trained:
                return None
            with unchanged_generators(self.model):
                stats = self.stats = collect_trained(
                    network,
                    self._x,
                    trained,
                    verbose=verbose,
                    memory_limit=self._memory_limit,
                    reported=self._layers.known,
                    **self._options,
                )
            self._stepped = False
        if last:
            self._compare_with_fit(stats)
        fit_guard.put_in(network, stats)
        return stats

    def _compare_with_fit(self, stats: PopulationStats) -> None:
        """Warn if the sweep had other data than `fit`, or less."""
        if self._options["steps"] is self._options["tolerance"] is None:
            self._epoch_size.warn_of(stats, is_one_shot(self._x))
        if self._fed is not None:
            self._fed.warn_of(stats)
            self._fed = None

    def _evaluate(self) -> dict[str, Any] | None:
        """The metrics on the validation data, without a trace in the model."""
        if self._validation_data is None:
            return None
        with fit_guard.unchanged(self.model):
            return evaluate(self.model, self._validation_data, steps=self._validation_steps)

    def _report(self, stats: PopulationStats) -> Iterator[str]:
        """The lines about the changes that the last sweep has made."""
        drifts = drift.of_layers(stats, stats.previous or {})
        if drifts:
            shift, factor = _overall(drifts.values())
            worst, off = next(iter(drifts.items()))
            yield (
                f"Population statistics of {len(drifts)} layers: the moving averages were off by "
                f"{shift:.3f} std in the mean and a factor of {factor:.3f} in the std, most in "
                f"{worst!r} ({off['mean_shift']:.3f} std, {off['std_ratio']:.3f})."
            )
        if self.validation is not None:
            changes = (
                f"{name} {old:.4g} -> {new:.4g}"
                for name, (old, new) in self.validation.items()
                if isinstance(old, float)  # A metric may give anything.
            )
            yield f"Validation before and after: {', '.join(changes)}."
        if self._freeze:
            yield (
                "The model is now frozen. To train it further, call `unfreeze()` of the callback, "
                "or pass it freeze=False."
            )

    def _check_repeatable(self) -> None:
        several = self._every_n_epochs or self._before_validation
        if several and is_one_shot(self._x) and self._options["steps"] is None:
            raise ValueError(
                "Expected data that can be swept several times, for every_n_epochs or "
                "before_validation. Received: a generator, which can be read only once. Pass "
                "arrays, a tf.data.Dataset or a PyDataset, or `steps` of an endless generator."
            )

    def _check_order(
        self, before: Sequence[keras.callbacks.Callback], after: Sequence[keras.callbacks.Callback]
    ) -> None:
        callbacks = keras.callbacks
        saves = _saves_epochs(before, callbacks.ModelCheckpoint)
        # Of two, the one before is for training to go on from.
        if self._every_n_epochs and saves and not _saves_epochs(after, callbacks.ModelCheckpoint):
            raise ValueError(
                "Expected ModelCheckpoint after PopulationStatsCallback with every_n_epochs, so "
                "that its files have the population statistics. Received: callbacks in the other "
                "order. Swap the two in the list, or leave out every_n_epochs."
            )
        for other in after:
            restores = isinstance(other, callbacks.EarlyStopping) and other.restore_best_weights
            in_training = self._before_validation or self._every_n_epochs
            swaps = isinstance(other, callbacks.SwapEMAWeights) and in_training
            backs_up = self._every_n_epochs and _saves_epochs([other], callbacks.BackupAndRestore)
            if restores or swaps or backs_up:
                why = (
                    "which would save the population statistics for training to go on from"
                    if backs_up
                    else "which puts other weights into the model than those that would be swept"
                )
                raise ValueError(
                    f"Expected PopulationStatsCallback after {type(other).__name__}, {why}. "
                    "Received: callbacks in the other order. Swap the two in the list."
                )


def _saves_epochs(
    callbacks: Iterable[keras.callbacks.Callback], kind: type[keras.callbacks.Callback]
) -> list[keras.callbacks.Callback]:
    """Those of one of Keras's kinds that save at the end of an epoch."""
    return [cb for cb in callbacks if isinstance(cb, kind) and cb.save_freq == "epoch"]


def _overall(drifts: Iterable[Mapping[str, float]]) -> tuple[float, float]:
    """Over layers: the root mean square of the shifts, and exp of that of log(ratio)."""
    shifts, ratios = zip(*((off["mean_shift"], off["std_ratio"]) for off in drifts), strict=True)
    return np.sqrt(np.mean(np.square(shifts))), np.exp(np.sqrt(np.mean(np.log(ratios) ** 2)))


def _trace_anew(model: keras.Model) -> None:
    """Have `fit` trace its step again: Keras keeps the trace whatever becomes trainable."""
    if model.train_function is not None:
        model.make_train_function(force=True)
