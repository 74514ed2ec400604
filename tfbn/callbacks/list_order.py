"""Check the order of callbacks before the first epoch.

Callbacks that replace weights or save the state of training come before `PopulationStatsCallback`;
with `every_epoch`, callbacks that save the model for inference come after it.
"""

from collections.abc import Iterator
from typing import Any

import keras
from keras import callbacks as kinds

from tfbn.callbacks.callback_lists import ListPosition, members

_NAME = "PopulationStatsCallback"


def check(position: ListPosition, every_epoch: bool) -> None:
    """Raise `ValueError` if a callback would replace swept weights or save wrong statistics.

    Args:
        position: The position of `PopulationStatsCallback`.
        every_epoch: Its option.
    """
    if every_epoch:
        for callback in members(position.before):
            if _saves_epochs(callback, kinds.ModelCheckpoint) and _uses_validation(callback):
                raise ValueError(
                    f"ModelCheckpoint before {_NAME} saves moving averages, not the population. "
                    "Swap the two in the list."
                )
    for callback in members(position.after):
        if isinstance(callback, kinds.EarlyStopping) and callback.restore_best_weights:
            raise _wrong_order(callback, "replaces the swept weights")
        if every_epoch and isinstance(callback, kinds.SwapEMAWeights):
            raise _wrong_order(callback, "replaces the swept weights")
        if every_epoch and _saves_epochs(callback, kinds.BackupAndRestore):
            raise _wrong_order(callback, "saves population statistics to resume from")


def warnings(position: ListPosition, every_epoch: bool) -> Iterator[str]:
    """Yield a sentence for each order that works, but probably not as intended."""
    before, after = members(position.before), members(position.after)
    choosing = list(filter(_chooses_by_moving_averages, [*before, *after]))
    if choosing and not every_epoch:
        names = ", ".join(dict.fromkeys(type(callback).__name__ for callback in choosing))
        yield (
            f"{names}: choosing by {choosing[0].monitor}, computed with moving averages. Pass "
            f"{_NAME}(..., every_epoch=True) to validate with population statistics."
        )
    saves, saves_after = (
        any(_saves_epochs(callback, kinds.ModelCheckpoint) for callback in callbacks)
        for callbacks in (before, after)
    )
    if every_epoch and saves and not saves_after:
        yield (
            f"ModelCheckpoint before {_NAME} saves moving averages, to resume training. List "
            "another one after it to save population statistics."
        )


def _saves_epochs(callback: Any, kind: type) -> bool:
    return isinstance(callback, kind) and getattr(callback, "save_freq", None) == "epoch"


def _uses_validation(checkpoint: keras.callbacks.ModelCheckpoint) -> bool:
    """Whether a metric of validation chooses or names the files."""
    chosen = checkpoint.save_best_only and checkpoint.monitor.startswith("val_")
    return chosen or "{val_" in str(checkpoint.filepath)


def _chooses_by_moving_averages(callback: keras.callbacks.Callback) -> bool:
    # EarlyStopping, ReduceLROnPlateau and custom callbacks with `monitor`.
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str) or not monitor.startswith("val_"):
        return False
    if isinstance(callback, kinds.ModelCheckpoint):
        return callback.save_best_only
    return not monitor.endswith(("_population", "_mini_batch"))  # Metrics of `StatsTracker`.


def _wrong_order(callback: keras.callbacks.Callback, effect: str) -> ValueError:
    name = type(callback).__name__
    return ValueError(f"{name} after {_NAME} {effect}. Swap the two in the list.")
