"""Population statistics in a model for a while, in place of the moving averages of training.

The moving averages are kept by model and not by callback, so that several callbacks of one `fit`
agree on them.
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
    """The statistics of a model before population statistics were swapped in, and these."""

    moving: Snapshot
    previous: PopulationStats
    stats: PopulationStats
    population: Snapshot | None  # `None` until all of it is in.


_swapped: weakref.WeakKeyDictionary[keras.Model, _Swapped] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def population_stats(model: keras.Model, x: Any, **options: Any) -> Iterator[PopulationStats]:
    """Infer with population statistics inside a `with` block, and train on after it.

    The block of a custom training loop in which the model is evaluated or saved:

    ```python
    for epoch in range(epochs):
        train_one_epoch(model)
        with tfbn.population_stats(model, x_train, verbose=0):
            model.evaluate(x_val, y_val)
            model.save("best.keras")
    ```

    The data is swept when the block begins (see `tfbn.collect`). When it ends, also by an error
    or Ctrl-C, the model holds the statistics from before, to the bit, on every device. Statistics
    that the block has changed, by a training step, stay.

    Args:
        model: See `tfbn.collect`.
        x: See `tfbn.collect`.
        **options: The other arguments of `tfbn.collect`.

    Yields:
        The `PopulationStats` that the model holds inside the block.

    Raises:
        ValueError: As `tfbn.collect`; the block then does not run, and the model is unchanged.
    """
    with swapped_out(model):
        stats = collect(model, x, **options)
        with swapped_in(model, stats):
            yield stats


def swap_in(model: keras.Model, stats: PopulationStats) -> None:
    """Assign statistics to a model, and remember its moving averages."""
    swap_out(model)
    variables = keras_models.all_statistics(model)
    previous = PopulationStats.read(model, fingerprint=False)
    # Remembered first, because Ctrl-C may come at any point.
    begun = _swapped[model] = _Swapped(Snapshot(model, variables), previous, stats, None)
    stats.assign(model)
    _swapped[model] = begun._replace(population=Snapshot(model, variables))


def swap_out(model: keras.Model) -> PopulationStats | None:
    """Undo `swap_in`, unless something else has replaced the statistics since.

    Returns:
        The statistics that were in the model, or `None` if there were none.
    """
    swapped = _swapped.get(model)
    if swapped is None:
        return None
    intact = swapped.population is None or swapped.population.holds()
    if intact:
        swapped.previous.assign(model)  # It also forgets that statistics are assigned.
        swapped.moving.restore()
    del _swapped[model]
    return swapped.stats if intact else None


def keep(model: keras.Model) -> None:
    """Make the statistics of `swap_in` final."""
    _swapped.pop(model, None)


@contextlib.contextmanager
def swapped_in(model: keras.Model, stats: PopulationStats) -> Iterator[None]:
    """A context in which a model has some statistics."""
    try:
        swap_in(model, stats)
        yield
    finally:
        swap_out(model)


@contextlib.contextmanager
def swapped_out(model: keras.Model) -> Iterator[None]:
    """A context in which a model has its moving averages, also inside `swapped_in`."""
    stats = swap_out(model)
    try:
        yield
    finally:
        swap_out(model)
        if stats is not None:
            swap_in(model, stats)
