"""Swap population statistics into a model and out again.

The moving averages are stored by model and not by callback, so that several callbacks of one `fit`
share them.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from tfbn.models import keras_models
from tfbn.models.keras_models import Snapshot
from tfbn.population import PopulationStats
from tfbn.sweep.run import collect


class _Swapped(NamedTuple):
    """The statistics of a model before and after population statistics were swapped in."""

    moving: Snapshot
    previous: PopulationStats
    stats: PopulationStats
    population: Snapshot | None  # `None` until the assignment is complete.


_swapped: weakref.WeakKeyDictionary[keras.Model, _Swapped] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def population_stats(model: keras.Model, x: Any, **options: Any) -> Iterator[PopulationStats]:
    """Infer with population statistics inside a `with` block, and continue training after it.

    Use it in a custom training loop, where the model is evaluated or saved:

    ```python
    for epoch in range(epochs):
        train_one_epoch(model)
        with tfbn.population_stats(model, x_train, verbose=0):
            model.evaluate(x_val, y_val)
            model.save("best.keras")
    ```

    The data is swept at the beginning of the block (see `tfbn.collect`). At its end, also by an
    error or Ctrl-C, the earlier statistics are restored, to the bit, on every device. Statistics
    that the block has changed by a training step stay.

    Args:
        model: See `tfbn.collect`.
        x: See `tfbn.collect`.
        **options: The other arguments of `tfbn.collect`.

    Yields:
        The `PopulationStats` of the model inside the block.

    Raises:
        ValueError: See `tfbn.collect`. The block then does not run, and the model is unchanged.
    """
    with swapped_out(model):
        stats = collect(model, x, **options)
        with swapped_in(model, stats):
            yield stats


def swap_in(model: keras.Model, stats: PopulationStats) -> None:
    """Store the moving averages of a model, and assign statistics."""
    swap_out(model)
    variables = keras_models.all_statistics(model)
    previous = PopulationStats.read(model, fingerprint=False)
    # Stored before the assignment, which Ctrl-C may interrupt.
    swapped = _swapped[model] = _Swapped(Snapshot(model, variables), previous, stats, None)
    stats.assign(model)
    _swapped[model] = swapped._replace(population=Snapshot(model, variables))


def swap_out(model: keras.Model) -> PopulationStats | None:
    """Undo `swap_in`, unless the statistics have changed since.

    Returns:
        The statistics that were swapped in, or `None`.
    """
    swapped = _swapped.get(model)
    if swapped is None:
        return None
    intact = swapped.population is None or swapped.population.holds()
    if intact:
        swapped.previous.assign(model)  # This also deletes the record of a sweep.
        swapped.moving.restore()
    del _swapped[model]
    return swapped.stats if intact else None


def swapped_stats(model: keras.Model) -> PopulationStats | None:
    """Return the statistics of `swap_in`, or `None`."""
    return _swapped[model].stats if model in _swapped else None


def keep(model: keras.Model) -> None:
    """Make the statistics of `swap_in` final."""
    _swapped.pop(model, None)


@contextlib.contextmanager
def swapped_in(model: keras.Model, stats: PopulationStats) -> Iterator[None]:
    """Swap statistics into a model within the context."""
    try:
        swap_in(model, stats)
        yield
    finally:
        swap_out(model)


@contextlib.contextmanager
def swapped_out(model: keras.Model) -> Iterator[None]:
    """Swap moving averages into a model within the context, also inside `swapped_in`."""
    stats = swap_out(model)
    try:
        yield
    finally:
        swap_out(model)
        if stats is not None:
            swap_in(model, stats)
