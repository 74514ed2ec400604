"""`PopulationStatsCallback`: when to sweep during `model.fit`."""

import inspect

import keras

from tfbn import keras_models
from tfbn.population import PopulationStats
from tfbn.sweep import batches as data
from tfbn.sweep.methods import check_method
from tfbn.sweep.run import check, collect


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
    `restore_best_weights=True`, and `SwapEMAWeights`. List it before `ModelCheckpoint`, so
    that what is saved has the population statistics.

    Under `tf.distribute.MirroredStrategy` all devices share the sweep and get the same
    statistics. In the middle of training each gets its own moving averages back.

    Args:
        x: The training data, as `tfbn.collect` takes it. A callback never sees the data
            given to `fit`. A generator can be swept only once. A `tf.data.Dataset` that
            shuffles with a seed, and that `fit` reads too, would be in another order after
            every reading in the middle of training: give one that does not shuffle.
        method: `"pooled"`, `"algorithm2"` or `"exact"`, see `tfbn.collect`.
        batch_size: For arrays; 32 by default. One-pass methods want it large.
        steps: Number of batches that make the data; endless data needs it.
        every_n_epochs: Also at the end of every n-th epoch, after its validation: for
            `ModelCheckpoint`. The next epoch goes on from the moving averages, as if no
            sweep had been.
        before_validation: Also before every validation inside `fit`, whose metrics are
            then those with population statistics. After it the moving averages are back.
        freeze: Whether to leave the model frozen (`trainable=False`) after the sweep at the
            end of training, as in Algorithm 2. It keeps `model(x, training=True)` from
            overwriting the statistics. `unfreeze()` undoes it, and so does another `fit`
            with this callback.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line per pass. `"auto"`
            follows `fit`.

    Attributes:
        stats: The `PopulationStats` of the latest sweep; `None` before the first.

    Raises:
        ValueError: At the beginning of training, if a callback listed after this one would
            replace the weights that were swept; whatever `tfbn.collect` raises.
    """

    def __init__(
        self,
        x,
        method="pooled",
        batch_size=None,
        steps=None,
        every_n_epochs=None,
        before_validation=False,
        freeze=True,
        verbose="auto",
    ):
        super().__init__()
        check_method(method)
        data.check_positive(every_n_epochs=every_n_epochs)
        self.stats = None
        self._x = x
        self._method = method
        self._batch_size = batch_size
        self._steps = steps
        self._every_n_epochs = every_n_epochs
        self._before_validation = before_validation
        self._freeze = freeze
        self._verbose = verbose
        self._training = False
        self._replaced = None
        self._flags = []

    def unfreeze(self):
        """Put every layer's `trainable` flag back to what it was before the freeze.

        The statistics stay as they are.
        """
        # Setting a layer's flag sets those of the layers inside it: outer layers come first.
        for layer, trainable in self._flags:
            layer.trainable = trainable
        self._flags = []

    def on_train_begin(self, logs=None):
        """Unfreeze what an earlier `fit` froze, and check all that can be checked by now."""
        self.unfreeze()
        self._check_order()
        check(self.model, self._x, self._batch_size, self._steps)
        self._training = True

    def on_test_begin(self, logs=None):
        """Validate with population statistics, if asked to."""
        if self._training and self._before_validation:
            self._assign(verbose=0)

    def on_test_end(self, logs=None):
        """Go back to the moving averages."""
        self._restore()

    def on_epoch_begin(self, epoch, logs=None):
        """Train on from the moving averages."""
        self._restore()

    def on_epoch_end(self, epoch, logs=None):
        """Sweep for the callbacks after this one, if it is the epoch to."""
        if self._every_n_epochs and (epoch + 1) % self._every_n_epochs == 0:
            self._assign(verbose=0)

    def on_train_end(self, logs=None):
        """Sweep, and freeze if asked to."""
        self._training = False
        self._restore()
        self._assign(verbose=self.params.get("verbose", "auto"))
        self._replaced = None
        if self._freeze:
            self._flags = [
                (layer, layer.trainable) for layer in keras_models.layers(self.model).values()
            ]
            self.model.trainable = False

    def _assign(self, verbose):
        """Put population statistics in, and remember the moving averages."""
        if self.stats is None or self.stats.fingerprint != keras_models.fingerprint(self.model):
            self.stats = collect(
                self.model,
                self._x,
                method=self._method,
                batch_size=self._batch_size,
                steps=self._steps,
                verbose=verbose if self._verbose == "auto" else self._verbose,
            )
        held = keras_models.Snapshot(self.model, keras_models.all_statistics(self.model))
        before = self.stats.assign(self.model)
        self._replaced = before, held, PopulationStats.read(self.model)

    def _restore(self):
        """Put the moving averages back, unless something else has replaced them since."""
        if self._replaced is None:
            return
        before, held, put = self._replaced
        self._replaced = None
        if put == PopulationStats.read(self.model):
            before.assign(self.model)
            for variable, value in held:
                variable.assign(value)

    def _check_order(self):
        # A callback is not told of the others, and Keras keeps their list in a local variable
        # of `fit`. The list itself is what calls `on_train_begin`: find it among the callers.
        frame = inspect.currentframe()
        while frame and not isinstance(frame.f_locals.get("self"), keras.callbacks.CallbackList):
            frame = frame.f_back
        callbacks = frame.f_locals["self"].callbacks if frame else [self]
        for other in callbacks[callbacks.index(self) + 1 :]:
            restores = isinstance(other, keras.callbacks.EarlyStopping)
            swaps = isinstance(other, keras.callbacks.SwapEMAWeights)
            if (restores and other.restore_best_weights) or (
                swaps and (self._before_validation or self._every_n_epochs)
            ):
                raise ValueError(
                    f"Expected PopulationStatsCallback after {type(other).__name__}, which puts "
                    "other weights into the model than those that would be swept. Received: "
                    "callbacks in the other order. Swap the two in the list."
                )
