"""The model in each process of a cluster, loaded and traced once for all tasks."""

import dataclasses
import os
import threading
import uuid
import weakref
from collections.abc import Callable

import keras

from tfbn.population import PopulationStats
from tfbn.sweep.batches import BatchReader, prepared
from tfbn.sweep.caveats import warn_of, warn_of_rounding
from tfbn.sweep.model_sources import Source, check_source, load
from tfbn.sweep.shard_sweep import ShardSweep
from tfbn.sweep.state import SweepState
from tfbn.sweep.trained_layers import layers_to_sweep


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a process needs to take part in a sweep, sent with every task.

    Attributes:
        source: Where the model comes from, see `tfbn.sweep.model_sources`; or the model itself, see
            `OnlyHere`.
        method: The name of the method.
        include_frozen: Whether to sweep layers too that `fit` does not train.
        paths: The layers to sweep, by the names that they have where the sweep began: unnamed
            layers of a subclassed model have other numbers in every process.
        sweep: The name of the sweep, other than that of any other.
    """

    source: Source
    method: str
    include_frozen: bool = False
    paths: tuple[str, ...] | None = None
    sweep: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


class OnlyHere:
    """A model that tasks bring along as long as they stay in this process."""

    def __init__(self, model: keras.Model):
        self.model = model

    def __call__(self) -> keras.Model:
        """The model."""
        return self.model

    def __reduce__(self):
        # Keras would pack the whole model into every task, and load it in every task.
        raise ValueError(
            "Expected a source of the model that other processes can load it from. Received: "
            f"model {self.model.name!r} itself, and a map that sends tasks to other processes. "
            "Give the path of a .keras file, or a function that returns the model."
        )


def source_of(model: keras.Model | str | os.PathLike | Callable[[], keras.Model]) -> Source:
    """The source of a model, from the user's argument `model`.

    Raises:
        ValueError: See `tfbn.sweep.model_sources.check_source`.
    """
    return OnlyHere(model) if isinstance(model, keras.Model) else check_source(model)


class Replica:
    """The model of a sweep in this process, and its `ShardSweep`, made once for all tasks.

    Args:
        recipe: The `Recipe` of the sweep.

    Attributes:
        model: The model.
        layers: The layers to sweep, by path.
    """

    def __init__(self, recipe: Recipe):
        self.model = load(recipe.source)
        layers = layers_to_sweep(self.model, recipe.include_frozen)
        # If it has other layers, its fingerprint is another too, which `sweep_level` refuses.
        if recipe.paths is not None and len(recipe.paths) == len(layers):
            layers = dict(zip(recipe.paths, layers.values(), strict=True))
        self.layers = layers
        self._recipe = recipe
        self._lock = threading.Lock()
        self._sweep = ShardSweep(
            self.model,
            self.layers,
            prepared([]),
            recipe.method,
            include_frozen=recipe.include_frozen,
        )

    @property
    def begin(self) -> SweepState:
        """The state that the sweep begins at."""
        return self._sweep.begin

    @property
    def any_batch_size(self) -> bool:
        """Whether the network is known to take batches of any size."""
        return self._sweep.any_batch_size

    def sweep_level(self, state: SweepState, batches: BatchReader) -> SweepState:
        """One level over some batches.

        Args:
            state: The `SweepState` at the beginning of the level.
            batches: The `tfbn.sweep.batches.Batches`, which are read once.

        Returns:
            The state after them, without the levels before, which all processes have.
        """
        with self._lock:
            swept = self._sweep.continue_sweep(state, batches)
        return dataclasses.replace(swept, settled={})

    def finish(self, state: SweepState) -> PopulationStats:
        """The `tfbn.PopulationStats` of a complete sweep, with warnings where they are due."""
        stats = state.finish(self.model, self._sweep.previous_of(state.paths))
        warn_of(state, stats)
        warn_of_rounding(stats, self._sweep.layers)
        return stats


# Here rather than in the tasks, which are new objects every time that they are sent. As long as
# somebody holds them, the replicas of several sweeps; else that of the last one.
_replicas: weakref.WeakValueDictionary[str, Replica] = weakref.WeakValueDictionary()
_last: list[Replica] = []
_making = threading.Lock()
# This one, as soon as TensorFlow runs in it, and those that it was forked from.
_processes: set[int] = set()


def replica(recipe: Recipe) -> Replica:
    """The `Replica` of a sweep in this process, made in the first call.

    Raises:
        ValueError: If the model cannot be loaded or swept, or the process cannot run TensorFlow.
    """
    _processes.add(os.getpid())
    if len(_processes) > 1:
        raise ValueError(
            "Expected processes that start TensorFlow themselves. Received: one that was forked "
            "from a process that runs TensorFlow, in which it may wait for ever. Start processes "
            "with multiprocessing.get_context('spawn')."
        )
    with _making:
        made = _replicas.get(recipe.sweep)
        if made is None:
            _last.clear()
            made = _replicas[recipe.sweep] = Replica(recipe)
        _last[:] = [made]
        return made


def forget(recipe: Recipe) -> None:
    """Let the model go, in this process."""
    with _making:
        if _replicas.get(recipe.sweep) in _last:
            _last.clear()
