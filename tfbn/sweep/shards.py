"""`collect_shards`: sweep data in many shards, as tasks of any `map`."""

import abc
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from tfbn.population import PopulationStats
from tfbn.stats import moments
from tfbn.sweep import data, state_bytes
from tfbn.sweep.batches import Batches
from tfbn.sweep.driver import run_levels, run_sample
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.processes import ReplicaSpec, forget, replica_here, source_of
from tfbn.sweep.random_order import Deal
from tfbn.sweep.replica import Replica
from tfbn.sweep.report import Report
from tfbn.sweep.sampling import JOINED_BYTES, Draw, groups_of, probe_share
from tfbn.sweep.state import SweepState, merge_shards


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
    """Sweep data in many shards, on the engine that `map` belongs to.

    Returns the same as `tfbn.collect` on all data: `"exact"` up to rounding for any shards, the
    one-pass methods for the same batches. Every level is one call of `map`. A task contains the
    populations of the levels before, three numbers per channel, sweeps one shard at one level and
    returns the moments of the layers of that level, ten numbers per channel, seven of them for the
    standard errors. A task that the engine runs twice counts once. Every process loads and traces
    the model once per sweep.

    ```python
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
        stats = tfbn.collect_shards("model.keras", files, map=pool.map, load=np.load)
    ```

    Args:
        model: The path of a `.keras` file that all processes can read, or a function without
            arguments that returns the model, with the same weights in all of them. A model is
            allowed if `map` stays in this process.
        shards: A sequence of names of files, keys or offsets that `load` converts to `x` of
            `tfbn.collect`; the data without `load`. A shard may be empty.
        map: A function like the built-in `map`. It may return results in any order.
        load: Called with a shard, in the process that sweeps it.
        method: See `tfbn.collect`.
        batch_size: See `tfbn.collect`.
        steps: Number of batches of every shard; endless data requires it.
        include_frozen: See `tfbn.collect`.
        tolerance: See `tfbn.collect`. Batches are drawn at random from all shards; from a stream,
            the first ones. Every shard must have a known number of batches, which requires one
            more call of `map`.
        verbose: 0 for silence, 1 for a progress bar over shards and levels. `"auto"` is 1.

    Returns:
        `tfbn.PopulationStats`.

    Raises:
        ValueError: As `tfbn.collect`; if processes load different weights; if a shard changes
            between levels; if the engine loses a shard.
        RuntimeError: If the sweep of a shard fails, with the name of the shard and the error.
    """
    options = SweepOptions(
        method=method,
        batch_size=batch_size,
        steps=steps,
        include_frozen=include_frozen,
        tolerance=tolerance,
    )
    spec = ReplicaSpec(source_of(model), include_frozen)
    tasks = _Tasks(spec, list(shards), map, _Reader(load, options))
    report = Report(method, verbose, len(tasks.shards), unit="shard")
    report.begin()
    try:
        here = replica_here(spec)
        if options.tolerance is None:
            return run_levels(_MapEngine(here, tasks, report))
        return run_sample(_MapSampler(here, tasks), options.tolerance, report)
    finally:
        forget(spec)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads a shard with `load` of `collect_shards` and the `SweepOptions`."""

    load: Callable | None
    options: SweepOptions

    def batches(self, number: int, shard: Any, model: keras.Model) -> Batches:
        """Return the `Batches` of a shard with a number."""
        x = shard if self.load is None else self.load(shard)
        return data.batches(x, self.options, model, may_be_empty=True, shard=number)


class _Size(NamedTuple):
    """The size of a shard.

    Attributes:
        batches: Number of batches.
        samples: Number of samples; 0 if unknown.
        drawn: Whether the batches are in random order.
    """

    batches: int
    samples: int
    drawn: bool


@dataclasses.dataclass(frozen=True)
class _Task(abc.ABC):
    """The work on one shard, to be sent to another process.

    Attributes:
        spec: The `ReplicaSpec` of the sweep.
        reader: The `_Reader`.
    """

    spec: ReplicaSpec
    reader: _Reader

    @abc.abstractmethod
    def run(self, here: Replica, number: int, batches: Batches) -> Any:
        """Return the result for one shard."""

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Any]:
        """Return the number of a shard and the result of `run`."""
        number, shard = item
        try:
            here = replica_here(self.spec)
            return number, self.run(here, number, self.reader.batches(number, shard, here.model))
        except Exception as error:
            # A string, because the error may not be picklable.
            raise RuntimeError(
                f"Expected every shard to be swept. Received: from {_named(number, shard)}, "
                f"{type(error).__name__}: {error}"
            ) from None


@dataclasses.dataclass(frozen=True)
class _Measure(_Task):
    """Compute the `_Size` of a shard."""

    def run(self, here: Replica, number: int, batches: Batches) -> _Size:
        """Return the size."""
        if not batches.repeatable:  # Every group of batches reads it anew.
            raise ValueError(
                "Expected shards that can be read again, for `tolerance`. Received: a generator. "
                "Load arrays or a dataset."
            )
        if batches.total is None:
            raise ValueError(
                "Expected a number of batches that is known for `tolerance`. Set `steps`."
            )
        return _Size(batches.total, batches.population_size, batches.drawn)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Batches of the shards to run a level over, from one state.

    Attributes:
        state: The `SweepState` at the beginning of the level.
        spans: Shard -> its batches (start, stop); `None` for all batches of all shards.
        probe: Whether these are some of the samples, whose batches may be concatenated.
    """

    state: SweepState
    spans: dict[int, tuple[int, int]] | None = None
    probe: bool = False


@dataclasses.dataclass(frozen=True)
class _RunLevel(_Task):
    """Sweep a shard at one level, for every `_Work` with batches of it."""

    works: Sequence[_Work]

    def run(self, here: Replica, number: int, batches: Batches) -> dict[int, bytes]:
        """Return number of the work -> bytes of the state after it."""
        results, parts = {}, {}
        for index, work in enumerate(self.works):
            if not work.spans:
                part = batches
            elif number in work.spans:
                span = work.spans[number]
                if span not in parts:
                    parts[span] = batches.part(*span)
                    if work.probe and here.any_batch_size:
                        parts[span] = parts[span].thinned(1.0, JOINED_BYTES) or parts[span]
                part = parts[span]
            else:
                continue
            results[index] = state_bytes.pack(here.sweep_shard(work.state, part))
        return results


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """The shards, and the map that runs tasks on them.

    Attributes:
        spec: The `ReplicaSpec` of the sweep.
        shards: All shards.
        map: See `collect_shards`.
        reader: The `_Reader`.
    """

    spec: ReplicaSpec
    shards: Sequence[Any]
    map: Callable[..., Iterable]
    reader: _Reader

    def sizes(self) -> list[_Size]:
        """Compute the `_Size` of every shard."""
        numbers = range(len(self.shards))
        results = dict(self._results(_Measure(self.spec, self.reader), numbers))
        return [_Size(*results[number]) for number in numbers]

    def run_level(self, works: Sequence[_Work]) -> Iterator[tuple[int, dict[int, SweepState]]]:
        """Yield (number, number of the work -> state) for each shard with work."""
        sent = [dataclasses.replace(work, state=_of_populations(work.state)) for work in works]
        spec = dataclasses.replace(self.spec, paths=works[0].state.paths)
        everywhere = range(len(self.shards))
        numbers = {*itertools.chain(*(work.spans or everywhere for work in works))}
        task = _RunLevel(spec, self.reader, sent)
        for number, results in self._results(task, sorted(numbers)):
            yield number, {at: state_bytes.unpack(state) for at, state in results.items()}

    def _results(self, task: _Task, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) once per shard, in the order of the engine."""
        missing = set(numbers)
        items = [(number, self.shards[number]) for number in numbers]
        for number, result in self.map(task, items) if items else ():
            if number in missing:  # An engine may run a task twice.
                missing.remove(number)
                yield number, result
        if missing:
            number = min(missing)
            raise ValueError(
                "Expected a result for every shard. Received: none for "
                f"{_named(number, self.shards[number])}. Check `map`."
            )


class _SameData:
    """Raises an error for a shard that changes between levels."""

    def __init__(self, shards: Sequence[Any]):
        self._shards = shards
        self._first: dict[tuple[int, int], tuple[int, int]] = {}

    def require(self, number: int, work: int, reached: SweepState, begin: SweepState) -> None:
        if reached.turned_uncut(begin):
            return
        if begin.level == 1:
            self._first[number, work] = reached.samples, reached.data
        now = reached.samples, reached.data
        before = self._first.setdefault((number, work), now)
        if before != now:
            raise ValueError(
                "Expected the same data at every level. Received: "
                f"{_named(number, self._shards[number])}, which had {before[0]} samples at level "
                f"1, and at level {begin.level} {now[0]}, or other ones."
            )


class _MapEngine:
    """Sweep all shards: one task for every shard and level."""

    def __init__(self, here: Replica, tasks: _Tasks, report: Report):
        self._here = here
        self._tasks = tasks
        self._report = report
        self._same = _SameData(tasks.shards)

    def initial_state(self) -> SweepState:
        """Return the state where the sweep begins."""
        return self._here.initial_state(self._tasks.reader.options.method)

    def run_level(self, state: SweepState) -> SweepState:
        """Return the merged state of all shards after one level."""
        self._report.begin_level(state.level)
        swept = {}
        for number, results in self._tasks.run_level([_Work(state)]):
            swept[number] = results[0]
            self._same.require(number, 0, results[0], state)
            self._report.batch(max(results[0].levels.values(), default=0))
        # Merge in the order of the shards, so that rounding does not depend on the engine.
        return merge_shards((swept[number] for number in sorted(swept)), state)

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result of a complete state."""
        stats = self._here.finish(state)
        self._report.end()
        return stats


class _MapSampler:
    """Draw batches of all shards at random."""

    def __init__(self, here: Replica, tasks: _Tasks):
        sizes = tasks.sizes()
        known = all(size.samples for size in sizes if size.batches)
        self._drawn = all(size.drawn for size in sizes if size.batches)
        self._population_size = sum(size.samples for size in sizes) if known else 0
        self._sizes = sizes
        self._deal = Deal([size.batches for size in sizes])
        self._taken = 0
        self._here = here
        self._tasks = tasks

    def draw(self, more: int) -> Draw:
        """Draw `more` batches, or fewer if the shards end."""
        total = len(self._deal)
        self._taken = min(self._taken + more, total)
        ended = self._taken == total
        if not self._drawn:
            return Draw(self._taken, self._samples(), ended, 0, 0)
        return Draw(self._taken, self._samples(), ended, total, self._population_size)

    def _samples(self) -> int:
        if not self._population_size:
            return self._taken
        return round(self._population_size * self._taken / max(len(self._deal), 1))

    def engine(self) -> "_MapGroups":
        """Create an engine for all batches drawn so far."""
        return _MapGroups(self._here, self._tasks, self._deal, self._taken, self._samples())

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result of a complete state."""
        return self._here.finish(state)


class _MapGroups:
    """Sweep a sample of all shards in groups: one task for every shard and level."""

    def __init__(self, here: Replica, tasks: _Tasks, deal: Deal, taken: int, samples: int):
        self.groups = groups_of(taken)
        self._here = here
        self._tasks = tasks
        ends = [round(number * taken / self.groups) for number in range(self.groups + 1)]
        begun: dict[int, int] = {}  # Shard -> its next batch.
        self._spans = []
        for start, stop in itertools.pairwise(ends):
            counts = deal.counts(start, stop)
            spans = {n: (begun.get(n, 0), begun.get(n, 0) + count) for n, count in counts.items()}
            begun |= {number: stop for number, (_, stop) in spans.items()}
            self._spans.append(spans)
        counts = deal.counts(0, math.ceil(probe_share(samples) * taken))
        self._probe = {number: (0, count) for number, count in counts.items()}
        self._same = _SameData(tasks.shards)

    def begin(self) -> SweepState:
        """Return the state where the sweep begins."""
        return self._here.initial_state(self._tasks.reader.options.method)

    def run_level(
        self, state: SweepState, probes: Sequence[SweepState]
    ) -> tuple[list[SweepState], list[SweepState]]:
        """Run one level over each group, and over some of the samples from each probe."""
        works = [_Work(state, spans) for spans in self._spans]
        works += [_Work(probe, self._probe, probe=True) for probe in probes]
        swept: list[dict[int, SweepState]] = [{} for _ in works]
        for number, results in self._tasks.run_level(works):
            for at, reached in results.items():
                swept[at][number] = reached
                if at < self.groups:
                    self._same.require(number, at, reached, state)
        states = [
            merge_shards((reached[number] for number in sorted(reached)), work.state)
            for work, reached in zip(works, swept, strict=True)
        ]
        return states[: self.groups], states[self.groups :]


def _of_populations(state: SweepState) -> SweepState:
    """Return the state without the standard errors of the levels before, to send less."""
    settled = {site: moments.of_values(m.count, m.mean, m.m2) for site, m in state.settled.items()}
    return dataclasses.replace(state, settled=settled)


def _named(number: int, shard: Any) -> str:
    # The beginning of the `repr`, on one line: a shard may be the data.
    return f"shard {number} ({' '.join(repr(shard).split())[:100]})"
