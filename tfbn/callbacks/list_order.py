"""The order of callbacks that works, and what is said about others before the first epoch.

Before `PopulationStatsCallback` belong the callbacks that put other weights into the model or save
the state of training; after it, with `every_epoch`, those that save the model for inference.
"""

from collections.abc import Iterator
from typing import Any

import keras
from keras import callbacks as kinds

from tfbn.callbacks.callback_lists import Place, members

_NAME = "PopulationStatsCallback"


def check(place: Place, every_epoch: bool) -> None:
    """Raise `ValueError` if files or restored weights would be other ones than those swept.

    Args:
        place: The list with `PopulationStatsCallback`.
        every_epoch: Its option.
    """
    if every_epoch:
        for callback in members(place.before):
            if _saves_epochs(callback, kinds.ModelCheckpoint) and _is_about_validation(callback):
                raise ValueError(
                    f"Expected ModelCheckpoint that monitors validation after {_NAME}, so that its "
                    "files give the metrics they were saved for. Received: callbacks in the other "
                    "order. Swap the two in the list."
                )
    for callback in members(place.after):
        if isinstance(callback, kinds.EarlyStopping) and callback.restore_best_weights:
            raise _swap(callback, "which puts other weights into the model than those swept")
        if every_epoch and isinstance(callback, kinds.SwapEMAWeights):
            raise _swap(callback, "which puts other weights into the model than those swept")
        if every_epoch and _saves_epochs(callback, kinds.BackupAndRestore):
            raise _swap(callback, "which would save the population statistics to resume from")


def warnings(place: Place, every_epoch: bool) -> Iterator[str]:
    """A sentence for each thing that works, but probably not as meant."""
    callbacks = members([*place.before, *place.after])
    choosing = [callback for callback in callbacks if _chooses_by_moving_averages(callback)]
    if choosing and not every_epoch:
        names = ", ".join(dict.fromkeys(type(callback).__name__ for callback in choosing))
        yield (
            f"{names}: choosing by {choosing[0].monitor}, which is validated with moving averages. "
            f"Pass {_NAME}(..., every_epoch=True) to validate with population statistics."
        )
    saves = [_saves_epochs(callback, kinds.ModelCheckpoint) for callback in callbacks]
    if every_epoch and any(saves) and not any(saves[len(members(place.before)) :]):
        yield (
            f"ModelCheckpoint before {_NAME} saves the moving averages, to resume training from. "
            "List another one after it to save the model with population statistics."
        )


def _saves_epochs(callback: Any, kind: type) -> bool:
    return isinstance(callback, kind) and getattr(callback, "save_freq", None) == "epoch"


def _is_about_validation(checkpoint: keras.callbacks.ModelCheckpoint) -> bool:
    """Whether a file is saved for a metric of validation, which chooses or names it."""
    chosen = checkpoint.save_best_only and checkpoint.monitor.startswith("val_")
    return chosen or "{val_" in str(checkpoint.filepath)


def _chooses_by_moving_averages(callback: keras.callbacks.Callback) -> bool:
    # Any callback that has a `monitor`: EarlyStopping, ReduceLROnPlateau and custom ones.
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str) or not monitor.startswith("val_"):
        return False
    if isinstance(callback, kinds.ModelCheckpoint):
        return callback.save_best_only
    return not monitor.endswith(("_population", "_mini_batch"))  # Metrics of `StatsTracker`.


def _swap(callback: keras.callbacks.Callback, why: str) -> ValueError:
    return ValueError(
        f"Expected {_NAME} after {type(callback).__name__}, {why}. Received: callbacks in the "
        "other order. Swap the two in the list."
    )
