"""`StatsTracker`: log validation metrics with three kinds of statistics during training."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras

from tfbn.callbacks import swapping
from tfbn.callbacks.callback_lists import enclosing, pickled_state, shallow_copy, shared_copy
from tfbn.callbacks.fit_guard import temporary_attribute
from tfbn.callbacks.shared_iterators import refuse_shared, warn_of_shared_shuffle
from tfbn.callbacks.swept_layers import SweptLayers
from tfbn.callbacks.validation import check_targets, check_validation_data, evaluate, unchanged
from tfbn.models import interception, keras_models
from tfbn.models.keras_models import Structure
from tfbn.models.random_state import unchanged_generators
from tfbn.population import PopulationStats
from tfbn.sweep.adapters import is_one_shot
from tfbn.sweep.data import batches
from tfbn.sweep.first_trace import FirstTrace, check_batch
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.run import run
from tfbn.sweep.trained_layers import PassedOn

WAYS = ("moving_average", "population", "mini_batch")


class StatsTracker(keras.callbacks.Callback):
    """Log validation metrics with moving-average, population and mini-batch statistics.

    Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167, section 3.1) use moving averages
    "to track the accuracy of the model as it trains", and infer with population statistics.
    This callback shows how much the two differ. At the end of every epoch it evaluates
    `validation_data` with batch norm layers that normalise with

    - `moving_average`: the moving averages of the layers;
    - `population`: the statistics of a sweep over `x` with the current weights, see
      `tfbn.collect`;
    - `mini_batch`: the mean and variance of the validation batch, as in training. All other layers
      (dropout, augmentation) infer. These metrics depend on the batch size, and a prediction
      depends on the other samples of its batch.

    ```python
    tracker = tfbn.StatsTracker(x_train, validation_data=(x_val, y_val))
    history = model.fit(x_train, y_train, epochs=20, callbacks=[tracker])
    history.history["val_accuracy_population"]
    ```

    Every metric is added to the epoch's logs as `val_<metric>_<way>`: `val_loss_moving_average`,
    `val_loss_population`, `val_loss_mini_batch`. `History` stores them, and callbacks listed after
    this one can use them: `CSVLogger`, `TensorBoard`, `EarlyStopping` (which requires a `mode` for
    these metrics). At the end of an epoch `stats`, with the current moving averages as
    `stats.previous`, can be logged too:

    ```python
    def histograms(epoch, logs):
        for path, layer in tracker.stats.items():
            shift = (tracker.stats.previous[path].mean - layer.mean) / layer.variance**0.5
            with writer.as_default(step=epoch):
                tf.summary.histogram(f"mean_shift/{path}", shift)

    writer = tf.summary.create_file_writer("logs/batch_norm")
    callbacks = [tracker, keras.callbacks.LambdaCallback(on_epoch_end=histograms)]
    ```

    The callback does not change training: it restores weights, statistics, metrics and the random
    generators of the model, Keras, TensorFlow, NumPy and Python. It costs a sweep and three
    evaluations an epoch. The first one replaces the validation in `fit`, so `fit` does not need
    `validation_data`.

    Args:
        x: The training data, in any form that `tfbn.collect` supports but a generator, because it
            is read in every epoch. If `fit` reads the same `tf.data.Dataset` and it shuffles with a
            seed, every sweep changes the order: pass one that does not shuffle.
        validation_data: `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset` or a
            `keras.utils.PyDataset`, see `model.fit`.
        method: `"exact"`, `"pooled"` or `"algorithm2"`, see `tfbn.collect`.
        batch_size: For the sweep over arrays; 32 by default. One-pass methods require large
            batches.
        steps: Number of batches of the sweep; required for endless data.
        tolerance: For the sweep, see `tfbn.collect`.
        validation_batch_size: For arrays; 32 by default. Use the batch size of training to get the
            mini-batch statistics of training.
        validation_steps: Number of batches to evaluate; required for endless validation data.
        memory_limit: For the sweep, see `tfbn.collect`.

    Attributes:
        stats: The `PopulationStats` of the last sweep, with the moving averages at that time as
            `stats.previous`; `None` before the first.

    Raises:
        ValueError: For an invalid argument, or at the beginning of training, if the model or the
            data cannot be swept.
    """

    def __init__(
        self,
        x: Any,
        *,
        validation_data: Any,
        method: str = "exact",
        batch_size: int | None = None,
        steps: int | None = None,
        validation_batch_size: int | None = None,
        tolerance: float | None = None,
        validation_steps: int | None = None,
        memory_limit: int | None = None,
    ):
        super().__init__()
        check_validation_data(validation_data, validation_steps)
        self.stats: PopulationStats | None = None
        self._x = x
        self._validation_data = validation_data
        self._options = SweepOptions(
            method=method,
            batch_size=batch_size,
            steps=steps,
            tolerance=tolerance,
            memory_limit=memory_limit,
            verbose=0,
        )
        self._validation_batch_size = validation_batch_size
        self._validation_steps = validation_steps
        self._mini_batch_function = None
        self._mini_batch_layers: frozenset[str] = frozenset()
        self._layers: Any = None  # The `SweptLayers` of a running `fit`.
        self._progress_bar = contextlib.ExitStack()

    def __deepcopy__(self, memo: dict) -> "StatsTracker":
        """Return a copy that shares the data and the model."""
        return shared_copy(self, memo, ("_x", "_validation_data", "_model", "stats", "_layers"))

    __copy__ = shallow_copy

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but the state of a running `fit`; raise for unpicklable data."""
        state = pickled_state(self, ("_x", "_validation_data"))
        running: dict[str, Any] = {
            "_layers": None,
            "_progress_bar": contextlib.ExitStack(),
        }
        return {**state, "_mini_batch_function": None, **running}

    def set_model(self, model: keras.Model) -> None:
        """Refuse a model of Keras 2, whose `fit` would fail on a callback of Keras 3."""
        keras_models.refuse_keras_2(model)
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check everything before the first step."""
        if is_one_shot(self._x):
            raise ValueError(
                "Expected repeatable data, like arrays or a tf.data.Dataset. Received: a generator."
            )
        refuse_shared([self._x, self._validation_data])
        warn_of_shared_shuffle(self._x)
        check_targets(self.model, self._validation_data)
        self._layers = SweptLayers(self.model, self.model, False, self._trace)
        self._layers.check()
        if not self._layers.checked:
            batches(self._x, self._options)
        self._mini_batch_function = None  # The model may have been compiled anew.

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Store the moving averages before the first step."""
        self._layers.begin_step()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the layers after the first step."""
        self._layers.end_step()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restore the method of the progress bar."""
        self._progress_bar.close()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sweep, evaluate three ways, and restore everything."""
        # An earlier callback may have swapped population statistics in.
        with swapping.swapped_out(self.model), unchanged(self.model):
            trained = self._layers.paths()
            stats = None
            if trained is None or trained:
                stats = run(
                    self.model,
                    self._x,
                    self._options,
                    trained=trained,
                    warned=self._layers.warned,
                )
            self.stats = stats
            metrics = dict.fromkeys(WAYS, self._evaluate())
            if stats is not None:
                with swapping.swapped_in(self.model, stats):
                    metrics["population"] = self._evaluate()
                # Layers that `fit` does not train use moving averages, as in training.
                metrics["mini_batch"] = self._evaluate_with_mini_batches(frozenset(stats))
        # Keras passes one dict to all callbacks, and to its `History` last.
        if logs is not None:
            self._shorten_progress_bar()
            for way, values in metrics.items():
                logs.update({f"val_{name}_{way}": value for name, value in values.items()})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the method of the progress bar."""
        self._progress_bar.close()

    def _trace(self, **options: Any) -> FirstTrace | None:
        with unchanged_generators(self.model):  # The data may draw random numbers.
            return check_batch(self.model, self._x, self._options, **options)

    def _shorten_progress_bar(self) -> None:
        """Show only Keras's metrics and the population's at the end of this epoch."""
        positions = enclosing(self)
        for callback in positions[-1].callbacks.callbacks if positions else ():
            if isinstance(callback, keras.callbacks.ProgbarLogger):
                finish = functools.partial(_finish_line, callback.on_epoch_end)
                self._progress_bar.enter_context(
                    temporary_attribute(callback, "on_epoch_end", finish)
                )

    def _evaluate(self) -> dict[str, float]:
        return evaluate(
            self.model,
            self._validation_data,
            batch_size=self._validation_batch_size,
            steps=self._validation_steps,
        )

    def _evaluate_with_mini_batches(self, trained: frozenset[str]) -> dict[str, float]:
        # Keras caches its test function. This function is cached too, separately.
        model = self.model
        if trained != self._mini_batch_layers:
            self._mini_batch_function, self._mini_batch_layers = None, trained
        step = functools.partial(
            _with_mini_batches, model, trained, self._layers.partly, model.test_step
        )
        with (
            temporary_attribute(model, "test_function", self._mini_batch_function),
            temporary_attribute(model, "test_step", step),
        ):
            try:
                return self._evaluate()
            finally:
                self._mini_batch_function = model.test_function


def _with_mini_batches(
    model: keras.Model,
    trained: frozenset[str],
    partly: frozenset[str],
    test_step: Callable,
    data: Structure,
) -> Structure:
    """Run a model's test step with mini-batch statistics, without a change to moving averages.

    The layers are patched only while the step is traced, and only in the calls that `fit` trains:
    calls with `training=False` are not patched for layers that train in some calls only.
    """
    layers = keras_models.batch_norm_layers(model)

    def called(call, layer, *args, **kwargs):
        if layer is model and kwargs.get("training") is False:
            kwargs["training"] = PassedOn()
        return call(layer, *args, **kwargs)

    def observe(call: interception.LayerCall) -> Structure:
        fixed = call.path in partly and not isinstance(call.training, PassedOn)
        if call.path not in trained or fixed:
            return call.run()
        # The scope receives the new moving averages and discards them.
        with keras.StatelessScope():
            return call.run(training=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(interception.inlined_functions())
        stack.enter_context(interception.observed_calls(layers, observe))
        if partly:
            stack.enter_context(interception.patch_in_thread(keras.Layer, "__call__", called))
        return test_step(data)


def _finish_line(
    finish: Callable[..., None], epoch: int, logs: dict[str, Any] | None = None
) -> None:
    hidden = tuple(f"_{way}" for way in WAYS if way != "population")
    shown = {name: value for name, value in (logs or {}).items() if not name.endswith(hidden)}
    finish(epoch, shown)
