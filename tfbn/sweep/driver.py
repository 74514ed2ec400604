"""The loops of a sweep, over any engine: its levels, and the sample that a tolerance needs."""

from collections.abc import Sequence
from typing import Protocol

from tfbn.population import PopulationStats
from tfbn.sweep.report import Report
from tfbn.sweep.sampling import Draw, Sample, first_size, next_size, replicates_after
from tfbn.sweep.state import SweepState, merge_shards


class Engine(Protocol):
    """Sweeps all data: in this process, with other workers, or by a map of tasks."""

    def initial_state(self) -> SweepState:
        """The state at which the sweep begins, or resumes."""
        ...

    def run_level(self, state: SweepState) -> SweepState:
        """The state after all batches of one level.

        It has no batches if the data has none. It has a `fixed_point` as soon as the network
        turns out not to be cut at its levels.
        """
        ...

    def finish(self, state: SweepState) -> PopulationStats:
        """The result of a complete state. The progress bar ends, temporary files are deleted."""
        ...


class GroupEngine(Protocol):
    """Sweeps a sample in groups of batches.

    Attributes:
        groups: The number of groups.
    """

    groups: int

    def begin(self) -> SweepState:
        """The state at which the sweep begins."""
        ...

    def run_level(
        self, state: SweepState, probes: Sequence[SweepState]
    ) -> tuple[list[SweepState], list[SweepState]]:
        """Run one level.

        Args:
            state: The state at the beginning of the level.
            probes: Other states to run the first few batches of the sample from.

        Returns:
            The states after each group of batches alone, and those after the first few batches
            from each of `probes`.
        """
        ...


class Sampler(Protocol):
    """Draws batches of the data, each once."""

    def draw(self, more: int) -> Draw:
        """Draw that many more batches, or fewer where the data ends."""
        ...

    def engine(self) -> GroupEngine:
        """An engine for all batches drawn so far."""
        ...

    def finish(self, state: SweepState) -> PopulationStats:
        """The result of a complete state."""
        ...


def run_levels(engine: Engine) -> PopulationStats:
    """Run a sweep level by level."""
    state = engine.initial_state()
    while not state.complete:
        state = state.advance(engine.run_level(state))
    return engine.finish(state)


def run_sample(sampler: Sampler, tolerance: float, report: Report) -> PopulationStats:
    """Run a sweep over as many batches as a tolerance needs.

    The sample grows until its standard errors are small enough or the data ends. Each time all of
    it is swept anew, because exact statistics of parts do not add up.
    """
    drawn = sampler.draw(first_size(None))
    if 0 < drawn.batches < (least := first_size(drawn)) and not drawn.ended:
        drawn = sampler.draw(least - drawn.batches)
    while True:
        report.begin_round(drawn.batches, drawn.samples)
        sample = run_groups(sampler.engine(), drawn)
        report.begin_level(sample.state.level)
        report.end_round(sample.relative_error, tolerance)
        size = next_size(sample, tolerance)
        if size <= drawn.batches:
            report.end()
            return sample.finish(sampler.finish(sample.state), tolerance)
        drawn = sampler.draw(size - drawn.batches)


def run_groups(engine: GroupEngine, drawn: Draw) -> Sample:
    """Run a sweep of a sample level by level, with what each group adds to its error."""
    state = engine.begin()
    replicates = [state] * engine.groups
    while not state.complete:
        # At the first level there is nothing before the layers that could be off.
        probes = [state, *replicates] if state.settled else []
        groups, probed = engine.run_level(state, probes)
        after = state.advance(merge_shards(groups, state))
        replicates = replicates_after(after, groups, replicates, probed)
        state = after
    return Sample(state, replicates, drawn)
