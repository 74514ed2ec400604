"""`collect_shards`: one sweep over data in many places, on any engine that has a map."""

import abc
import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbn import arguments
from tfbn.population import PopulationStats
from tfbn.stats import moments
from tfbn.sweep import accumulator_bytes, data
from tfbn.sweep.accumulator import SweepState, merged
from tfbn.sweep.batches import Batches, empty
from tfbn.sweep.methods import METHODS, check_method
from tfbn.sweep.replicas import Recipe, Replica, forget, replica, source_of
from tfbn.sweep.report import Report
from tfbn.sweep.sampling import Pilot


def collect_shards(
    model: keras.Model | str | os.PathLike | Callable[[], keras.Model],
    shards: Iterable[Any],
    *,
    map: Callable[..., Iterable] = map,
    load: Callable[[Any], Any] | None = None,
    method: str = "exact",
    batch_size: int | None = None,
    steps: int | None = None,
    include_frozen: bool = False,
    tolerance: float | None = None,
    verbose: int | str = "auto",
) -> PopulationStats:
    """Sweep data that lies in many shards, on the engine that `map` belongs to.

    The same as `tfbn.collect` on all the data: `"exact"` up to rounding whatever the shards, the
    one-pass methods for the same batches. Every level is one call of `map`. A task brings the
    populations of the levels before, three numbers a channel, sweeps one shard at one level and
    returns the moments of the layers of that level, ten numbers a channel, seven of which are for
    the standard errors; a task that the engine runs twice counts once. Every process loads the
    model, and traces it, once a sweep.

    ```python
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
        stats = tfbn.collect_shards("model.keras", files, map=pool.map, load=np.load)
    ```

    Args:
        model: The path of a `.keras` file that all processes can read, or a function without
            arguments that returns the model, with the same weights in all of them. A model itself
            does where `map` stays in this process.
        shards: A sequence of whatever `load` turns into `x` of `tfbn.collect`: names of files,
            keys, offsets. Without `load`, the data itself. A shard may be empty.
        map: A function that works as the built-in `map` does. It may give results in any order.
        load: Called with a shard, in the process that sweeps it.
        method: See `tfbn.collect`.
        batch_size: See `tfbn.collect`.
        steps: Number of batches of every shard; endless data needs it.
        include_frozen: See `tfbn.collect`.
        tolerance: See `tfbn.collect`. Batches are drawn at random from those of all shards: from a
            shard of arrays as random samples, from other data the first ones. How many there are
            must be known of every shard, and one more call of `map` asks for it.
        verbose: 0 for silence, 1 for a progress bar over shards and levels. `"auto"` is 1.

    Returns:
        `tfbn.PopulationStats`.

    Raises:
        ValueError: As `tfbn.collect`; if processes load other weights; if a shard is other data
            at another level; if the engine loses one.
        RuntimeError: If sweeping a shard fails, with the shard's name and the error's words.
    """
    check_method(method)
    tolerance = arguments.tolerance(tolerance)
    arguments.positive(batch_size=batch_size, steps=steps)
    recipe = Recipe(source_of(model), method, include_frozen)
    reader = _Reader(load, batch_size, steps, sample=tolerance is not None)
    cluster = _Cluster(recipe, list(shards), map, reader, verbose)
    try:
        if tolerance is None:
            return replica(recipe).finish(cluster.sweep())
        return _collect_sample(recipe, cluster, tolerance)
    finally:
        forget(recipe)


def _collect_sample(recipe: Recipe, cluster: "_Cluster", tolerance: float) -> PopulationStats:
    """Sweep as much of all shards as a tolerance takes."""
    here = replica(recipe)
    by_level = METHODS[recipe.method].by_level
    begin = here.begin_by("pooled") if by_level else here.begin
    sizes = cluster.sizes()
    owners = np.repeat(np.arange(len(sizes)), [size.batches for size in sizes])
    owners = np.random.default_rng(0).permutation(owners)
    taken = 0

    def sweep(more: int) -> SweepState | None:
        nonlocal taken
        start, taken = taken, min(taken + more, len(owners))
        return cluster.sweep_level(begin, _Parts(owners, start, taken))

    known = all(size.samples for size in sizes if size.batches)
    pilot = Pilot(sweep, sum(size.samples for size in sizes) if known else 0)
    pilot.reach(tolerance)
    state = cluster.sweep(_Parts(owners, 0, taken)) if by_level else pilot.state
    return pilot.with_errors(here.finish(state), tolerance)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """How a task reads its shard. See `collect_shards`, and `tfbn.sweep.data` for `sample`."""

    load: Callable | None
    batch_size: int | None
    steps: int | None
    sample: bool

    def batches(self, number: int, shard: Any, model: keras.Model) -> Batches:
        """The `Batches` of a shard, given its number too."""
        x = shard if self.load is None else self.load(shard)
        return data.batches(
            x,
            self.batch_size,
            self.steps,
            may_be_empty=True,
            model=model,
            sample=self.sample,
            shard=number,
        )


class _Size(NamedTuple):
    """How many batches a shard has, and how many samples; 0 where that is not known."""

    batches: int
    samples: int


@dataclasses.dataclass(frozen=True)
class _Task(abc.ABC):
    """The work on one shard, to be sent to another process.

    Attributes:
        recipe: The `Recipe` of the sweep.
        reader: The `_Reader`.
    """

    recipe: Recipe
    reader: _Reader

    @abc.abstractmethod
    def run(self, here: Replica, number: int, batches: Batches) -> Any:
        """The result for one shard."""

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Any]:
        """The number of a shard, and the result of `run` for it."""
        number, shard = item
        try:
            here = replica(self.recipe)
            return number, self.run(here, number, self.reader.batches(number, shard, here.model))
        except Exception as error:
            # A string alone: the error itself may not survive the way back.
            raise RuntimeError(
                f"Expected every shard to be swept. Received: from {_named(number, shard)}, "
                f"{type(error).__name__}: {error}"
            ) from None


@dataclasses.dataclass(frozen=True)
class _Measure(_Task):
    """Asks for the `_Size` of a shard."""

    def run(self, here: Replica, number: int, batches: Batches) -> tuple[int, int]:
        """The size."""
        if batches.total is None:
            raise ValueError(
                "Expected a number of batches that is known before they are read, for `tolerance`. "
                "Received: data that does not tell. Give `steps`, or arrays."
            )
        return batches.total, batches.population_size


@dataclasses.dataclass(frozen=True)
class _SweepLevel(_Task):
    """Sweeps a shard at one level.

    Attributes:
        state: The state at the beginning of the level.
        parts: The `_Parts` of the shards to sweep, or `None` for all of them.
    """

    state: SweepState
    parts: Any

    def run(self, here: Replica, number: int, batches: Batches) -> bytes:
        """The bytes of the state after the level."""
        if self.parts is not None:
            batches = batches.part(*self.parts.of(number))
        return accumulator_bytes.pack(here.sweep_level(self.state, batches))


class _Parts:
    """The batches from `start` to `stop` of all shards in random order.

    Args:
        owners: For every batch, in that order, the number of its shard.
    """

    def __init__(self, owners: np.ndarray, start: int, stop: int):
        self._before = collections.Counter(owners[:start].tolist())
        self._taken = collections.Counter(owners[start:stop].tolist())

    def of(self, number: int) -> tuple[int, int]:
        """Which of its batches a shard gives, from and to."""
        start = self._before[number]
        return start, start + self._taken[number]

    def shards(self) -> list[int]:
        """The numbers of the shards that give any, in order."""
        return sorted(self._taken)


class _Cluster:
    """The shards, and the processes that sweep them.

    Args:
        recipe: The `Recipe` of the sweep.
        shards: All of them.
        map: See `collect_shards`.
        reader: The `_Reader`.
        verbose: See `collect_shards`.
    """

    def __init__(
        self,
        recipe: Recipe,
        shards: Sequence[Any],
        map: Callable[..., Iterable],
        reader: _Reader,
        verbose: int | str,
    ):
        self._recipe = recipe
        self._shards = shards
        self._map = map
        self._reader = reader
        self._verbose = verbose

    def sizes(self) -> list[_Size]:
        """The `_Size` of every shard."""
        results = dict(self._results(_Measure(self._recipe, self._reader), self._asked(None)))
        return [_Size(*results[number]) for number in range(len(self._shards))]

    def sweep(self, parts: _Parts | None = None) -> SweepState:
        """Sweep all levels: the complete state.

        Args:
            parts: The `_Parts` of the shards to sweep; all of them by default.
        """
        state = replica(self._recipe).begin
        seen: dict[int, tuple[int, int]] = {}
        total = len(self._asked(parts))
        report = Report(self._recipe.method, self._verbose, total, unit="shard")
        report.begin()
        while not state.complete:
            report.begin_level(state.level)
            after = self.sweep_level(state, parts, seen, report)
            if after is None:
                raise empty()
            if after.whole and not state.whole:
                state, seen = after.whole_passes(), {}
                continue
            state = after.next_level()
        report.end()
        return state

    def sweep_level(
        self,
        state: SweepState,
        parts: _Parts | None = None,
        seen: dict[int, tuple[int, int]] | None = None,
        report: Report | None = None,
    ) -> SweepState | None:
        """The merged state of all shards after one level, or `None` if they have no batch.

        Args:
            state: The state at the beginning of the level.
            parts: See `sweep`.
            seen: By the number of a shard its samples and digest at level 1; those of shards that
                it lacks are added.
            report: The `Report` to count shards in.
        """
        recipe = dataclasses.replace(self._recipe, paths=state.paths)
        swept = {}
        task = _SweepLevel(recipe, self._reader, _of_populations(state), parts)
        for number, content in self._results(task, self._asked(parts)):
            shard_state = swept[number] = accumulator_bytes.unpack(content)
            if seen is not None and (state.whole or not shard_state.whole):
                self._check_same(number, shard_state, seen, state.level)
            if report is not None:
                report.batch(max(shard_state.levels.values(), default=0))
        # In the order of the shards, so that rounding is the same for any order of results.
        return merged((swept[number] for number in self._asked(parts)), state)

    def _asked(self, parts: _Parts | None) -> Sequence[int]:
        """The numbers of the shards to sweep: loading the others would be for nothing."""
        return range(len(self._shards)) if parts is None else parts.shards()

    def _check_same(
        self, number: int, state: SweepState, seen: dict[int, tuple[int, int]], level: int
    ) -> None:
        now = state.samples, state.data
        if seen.setdefault(number, now) != now:
            raise ValueError(
                "Expected the same data at every level. Received: "
                f"{_named(number, self._shards[number])}, which had {seen[number][0]} samples at "
                f"level 1 and at level {level} has {now[0]}, or other ones. Give shards that do "
                "not change."
            )

    def _results(self, task: _Task, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yield number and result of some shards once, in the order in which they come."""
        missing = set(numbers)
        items = [(number, self._shards[number]) for number in numbers]
        for number, result in self._map(task, items) if items else ():
            if number in missing:  # An engine may run a task twice.
                missing.remove(number)
                yield number, result
        if missing:
            number = min(missing)
            raise ValueError(
                "Expected a result for every shard. Received: none for "
                f"{_named(number, self._shards[number])}. Look at the engine that `map` belongs to."
            )


def _of_populations(state: SweepState) -> SweepState:
    """The state with no more of the levels before than a shard needs: not the standard errors."""
    settled = {site: moments.of_values(m.count, m.mean, m.m2) for site, m in state.settled.items()}
    return dataclasses.replace(state, settled=settled)


def _named(number: int, shard: Any) -> str:
    # Of data itself only the beginning, on one line.
    return f"shard {number} ({' '.join(repr(shard).split())[:100]})"
