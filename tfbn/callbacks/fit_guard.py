"""Moving averages and flags of training, while a model has population statistics or is frozen.

It is kept by model and not by callback, so that several callbacks of one `fit` agree on it.
"""

import contextlib
import functools
import weakref
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import keras

from tfbn.models import keras_models
from tfbn.models.keras_models import Snapshot
from tfbn.models.random_state import unchanged_generators
from tfbn.population import PopulationStats

# The hooks of a `keras.callbacks.CallbackList` that run the callbacks while population statistics
# may be in the model.
_HOOKS = ("on_epoch_end", "on_test_begin", "on_test_end", "on_train_end")

# By model: by path, a layer's `trainable` before the freeze.
_flags: weakref.WeakKeyDictionary[keras.Model, dict[str, bool]] = weakref.WeakKeyDictionary()
# Model -> the paths of the layers that the freeze has left as they are.
_left_trainable: weakref.WeakKeyDictionary[keras.Model, frozenset[str]]
_left_trainable = weakref.WeakKeyDictionary()


class _Exchanged(NamedTuple):
    """The statistics of a model before population statistics were put in, and these."""

    moving: Snapshot
    previous: PopulationStats
    stats: PopulationStats
    put: Snapshot | None  # `None` until all of it is in.


_exchanged: weakref.WeakKeyDictionary[keras.Model, _Exchanged] = weakref.WeakKeyDictionary()


def put_in(model: keras.Model, stats: PopulationStats) -> None:
    """Assign statistics to a model, in place of the moving averages, which are remembered."""
    put_back(model)
    variables = keras_models.all_statistics(model)
    previous = PopulationStats.read(model, fingerprint=False)
    # Remembered first, because Ctrl-C may come at any point.
    begun = _exchanged[model] = _Exchanged(Snapshot(model, variables), previous, stats, None)
    stats.assign(model)
    _exchanged[model] = begun._replace(put=Snapshot(model, variables))


def put_back(model: keras.Model) -> PopulationStats | None:
    """Undo `put_in`, unless something else has replaced the statistics since.

    Returns:
        The statistics that were in the model, or `None` if there were none.
    """
    exchanged = _exchanged.get(model)
    if exchanged is None:
        return None
    intact = exchanged.put is None or exchanged.put.holds()
    if intact:
        exchanged.previous.assign(model)  # It also forgets that statistics are assigned.
        exchanged.moving.restore()
    del _exchanged[model]
    return exchanged.stats if intact else None


def keep(model: keras.Model) -> None:
    """Make the statistics of `put_in` final."""
    _exchanged.pop(model, None)


@contextlib.contextmanager
def unchanged(model: keras.Model) -> Iterator[None]:
    """A stretch of evaluations, after which metrics, counters and generators are as before."""
    state = Snapshot(model, model.non_trainable_variables + model.metrics_variables)
    with unchanged_generators(model):
        try:
            yield
        finally:
            state.restore()


def freeze(model: keras.Model, by_batch: Collection[str] = ()) -> None:
    """Set `trainable=False` in all layers, and remember the flags.

    Args:
        model: The model.
        by_batch: The paths of the layers that inference normalizes by the batch, which it would not
            do if they were frozen. They stay as they are.
    """
    layers = keras_models.layers(model)
    _flags[model] = {path: layer.trainable for path, layer in layers.items()}
    model.trainable = False
    _left_trainable[model] = frozenset(by_batch)
    for path in by_batch:
        layers[path].trainable = True


def unfreeze(model: keras.Model) -> bool:
    """Undo `freeze`, unless someone else has unfrozen a layer since.

    Returns:
        Whether the model was frozen.
    """
    flags = _flags.pop(model, None)
    layers = keras_models.layers(model)
    left = _left_trainable.pop(model, frozenset())
    if flags is None or any(v.trainable and path not in left for path, v in layers.items()):
        return False
    # Setting a layer's flag sets those of the layers inside it: outer layers come first.
    for path, layer in layers.items():
        layer.trainable = flags.get(path, True)
    return True


def guard(callbacks: keras.callbacks.CallbackList, model: keras.Model) -> None:
    """See to it that a model gets its moving averages back whatever callbacks raise.

    Also after every epoch's end, before the next step of training. The end of training is final
    when all callbacks have come to it.

    Args:
        callbacks: The list that `fit` calls.
        model: The model into which they may put population statistics.
    """
    models = vars(callbacks).setdefault("_tfbn_guarded", weakref.WeakSet())
    models.add(model)
    for name in _HOOKS:
        if name not in vars(callbacks):  # A list may serve several times.
            hook = functools.partial(_guarded, name, getattr(callbacks, name), models)
            setattr(callbacks, name, hook)


def guard_validation(
    trained: keras.Model, model: keras.Model, callbacks: keras.callbacks.CallbackList | None
) -> None:
    """The same for whatever `evaluate` raises, until `release`.

    It is away while a step of training runs, in which Ctrl-C mostly comes: nothing of `fit` would
    be called to take it away then.

    Args:
        trained: The model whose `fit` evaluates.
        model: The model into which population statistics may be put.
        callbacks: The list that `fit` calls, `None` if it cannot be told.
    """
    evaluate = trained.evaluate
    if hasattr(evaluate, "guards"):
        evaluate.guards.add(model)
        return
    models = weakref.WeakSet([model])

    @functools.wraps(evaluate)
    def guarded(*args, **kwargs):
        try:
            return evaluate(*args, **kwargs)
        except BaseException:
            release(trained)
            for model in models:
                put_back(model)
            raise

    vars(guarded).update(guards=models, original=vars(trained).get("evaluate"))
    trained.evaluate = guarded
    if callbacks is not None:
        _take_away_in_steps(guarded, trained, callbacks)


def _take_away_in_steps(guarded, trained, callbacks):
    begin, end = callbacks.on_train_batch_begin, callbacks.on_train_batch_end

    def on_train_batch_begin(*args, **kwargs):
        release(trained)
        begin(*args, **kwargs)

    def on_train_batch_end(*args, **kwargs):
        end(*args, **kwargs)
        trained.evaluate = guarded

    callbacks.on_train_batch_begin = on_train_batch_begin
    callbacks.on_train_batch_end = on_train_batch_end


def release(trained: keras.Model) -> None:
    """Undo `guard_validation`."""
    guarded = vars(trained).get("evaluate")
    if hasattr(guarded, "guards"):
        del trained.evaluate
        if guarded.original is not None:
            trained.evaluate = guarded.original


def _guarded(name: str, hook: Any, models: weakref.WeakSet, *args: Any, **kwargs: Any) -> None:
    try:
        hook(*args, **kwargs)
        for model in models:
            if name == "on_epoch_end":
                put_back(model)
            elif name == "on_train_end":
                keep(model)
    except BaseException:  # Ctrl-C at any point.
        release(hook.__self__.model)
        for model in models:
            if put_back(model) is not None and name == "on_train_end":
                unfreeze(model)
        raise
