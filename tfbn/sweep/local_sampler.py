"""The sampler of one process, or of the workers of a TensorFlow strategy."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

from tfbn.models.keras_models import Structure
from tfbn.population import PopulationStats
from tfbn.sweep.batches import Batch, Batches, nbytes, too_large
from tfbn.sweep.local_engine import LocalEngine
from tfbn.sweep.random_order import Deal
from tfbn.sweep.replica import Replica
from tfbn.sweep.report import Report
from tfbn.sweep.sampling import JOINED_BYTES, Draw, groups_of, probe_share
from tfbn.sweep.state import SweepState, merge_shards
from tfbn.sweep.workers import Workers


class LocalSampler:
    """Draw batches of this process and of the other workers.

    Args:
        replica: The `Replica` of the model.
        batches: The `Batches` to draw from, in their order.
        method: The name of the method.
        workers: The `Workers`.
        memory_limit: Bytes of main memory for the sample and for tensors between levels.
    """

    def __init__(
        self,
        replica: Replica,
        batches: Batches,
        method: str,
        workers: Workers,
        memory_limit: int,
    ):
        self._replica = replica
        self._workers = workers

        def size() -> tuple[int, int]:
            """Return the numbers of batches, -1 for a stream, and of samples to draw from."""
            # Computed here so that an error is raised on all workers.
            self._begin = replica.initial_state(method, batches.first())
            if not batches.drawn or batches.total is None:
                return -1, 0
            return batches.total, batches.population_size

        sizes = workers.gather_numbers(size)
        self._kept = _Kept(batches, memory_limit)
        self._memory_limit = memory_limit
        totals = [total for total, _ in sizes]
        drawn = all(total >= 0 for total in totals)
        self._deal = Deal(totals) if drawn else None
        populations = [population for _, population in sizes]
        known = all(p or not t for t, p in zip(totals, populations, strict=True))
        self._population_size = sum(populations) if drawn and known else 0
        self._asked = 0
        self._taken: list[int] = []

    def draw(self, more: int) -> Draw:
        """Draw `more` batches from all workers, or fewer if the data ends."""
        start, self._asked = self._asked, self._asked + more
        mine = math.ceil(more / self._workers.count)
        if self._deal is not None:
            counts = self._deal.counts(start, self._asked)
            mine = counts.get(self._workers.index, 0)
        drawn = self._workers.gather_numbers(lambda: self._kept.read(mine))
        self._taken = [batches for batches, _, _ in drawn]
        batches, samples = sum(self._taken), sum(samples for _, samples, _ in drawn)
        if self._deal is None:
            ended = all(ended for _, _, ended in drawn)
            return Draw(batches, samples, ended, 0, 0)
        total = len(self._deal)
        return Draw(batches, samples, batches >= total, total, self._population_size)

    def engine(self) -> "LocalGroups":
        """Create an engine for all batches drawn so far."""
        limit = max(self._memory_limit - self._kept.nbytes, 0)
        return LocalGroups(
            self._replica, self._begin, self._kept, self._taken, self._workers, limit
        )

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result of a complete state."""
        return self._replica.finish(state)


class LocalGroups:
    """Sweep a sample in groups.

    Args:
        replica: The `Replica` of the model.
        begin: The state where a sweep begins in this process.
        kept: The batches that this worker has drawn.
        taken: Number of batches that each worker has drawn.
        workers: The `Workers`.
        memory_limit: Bytes of main memory for tensors between levels.
    """

    def __init__(
        self,
        replica: Replica,
        begin: SweepState,
        kept: "_Kept",
        taken: Sequence[int],
        workers: Workers,
        memory_limit: int,
    ):
        total = sum(taken)
        self.groups = groups_of(total)
        self._begin = begin
        self._workers = workers
        before, mine = sum(taken[: workers.index]), taken[workers.index]
        ends = [round(number * total / self.groups) for number in range(self.groups + 1)]
        cuts = [min(max(end - before, 0), mine) for end in ends]
        share = probe_share(kept.samples * workers.count)
        probe = kept.part(0, math.ceil(share * mine))
        if len(probe) and replica.any_batch_size:
            thinned = kept.part(0, mine).batches.thinned(share, JOINED_BYTES)
            probe = probe if thinned is None else _Part(thinned, len(probe))
        parts = [kept.part(*cut) for cut in itertools.pairwise(cuts)] + [probe] * (self.groups + 1)
        room = memory_limit // max(sum(len(part) for part in parts), 1)
        engines = [
            LocalEngine(
                replica.fork(),
                part.batches,
                begin.method,
                room * len(part),
                Report(begin.method, 0, None),
            )
            for part in parts
        ]
        self._groups, self._probes = engines[: self.groups], engines[self.groups :]

    def begin(self) -> SweepState:
        """Return the state where the sweep begins."""
        begins = self._workers.gather(lambda: self._begin)
        return max(begins, key=lambda begin: len(begin.paths))

    def run_level(
        self, state: SweepState, probes: Sequence[SweepState]
    ) -> tuple[list[SweepState], list[SweepState]]:
        """Run one level over each group, and over some of the samples from each probe."""
        groups = [self._run(engine, state) for engine in self._groups]
        return groups, [self._run(*pair) for pair in zip(self._probes, probes, strict=False)]

    def _run(self, engine: LocalEngine, state: SweepState) -> SweepState:
        compute = functools.partial(engine.run_level, state)
        return merge_shards(self._workers.gather(compute, settled=state.settled), state)


class _Part:
    """Some of the drawn batches, and their number."""

    def __init__(self, batches: Batches, number: int):
        self.batches = batches
        self._number = number

    def __len__(self) -> int:
        return self._number


class _Kept:
    """The drawn batches, stored in memory or read again.

    Args:
        batches: The `Batches` to draw from, in their order.
        limit: Largest number of bytes to store.

    Attributes:
        nbytes: Number of stored bytes.
    """

    def __init__(self, batches: Batches, limit: int):
        self._batches = batches
        self._iterator: Iterator[Batch] = iter(batches)
        self._limit = limit
        self._inputs: list[Structure] | None = []
        self._sizes: list[int] = []
        self.nbytes = 0

    def read(self, more: int) -> tuple[int, int, bool]:
        """Load more batches; return numbers of batches and samples, and whether the data ended."""
        asked = len(self._sizes) + more
        for batch in itertools.islice(self._iterator, more):
            self._sizes.append(batch.samples)
            self._keep(batch.inputs)
        ended = len(self._sizes) < asked or len(self._sizes) == self._batches.total
        return len(self._sizes), self.samples, ended

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self._sizes)

    def part(self, start: int, stop: int) -> _Part:
        """Return the batches from `start` to `stop`."""
        stop = min(stop, len(self._sizes))
        if self._inputs is None and stop > start:
            return _Part(self._batches.part(start, stop), stop - start)
        inputs = (self._inputs or [])[start:stop]
        return _Part(self._batches.holding(inputs, start), len(inputs))

    def _keep(self, inputs: Structure) -> None:
        if self._inputs is None:
            return
        self._inputs.append(inputs)
        self.nbytes += nbytes(inputs)
        if self.nbytes > self._limit:
            if not self._batches.repeatable:
                raise too_large(len(self._sizes), self._limit)
            self._inputs, self.nbytes = None, 0
