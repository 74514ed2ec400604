"""The loops that drive a sweep, and the protocols `Engine` and `Sampler` that they drive."""

from collections.abc import Sequence
from typing import Protocol

from tfbn.population import PopulationStats
from tfbn.sweep.report import Report
from tfbn.sweep.sampling import Draw, Sample, first_size, next_size, replicates_after
from tfbn.sweep.state import SweepState, merge_shards


class Engine(Protocol):
    """Sweep all data: in this process, with other workers, or with a map of tasks."""

    def initial_state(self) -> SweepState:
        """Return the state where the sweep begins or resumes."""
        ...

    def run_level(self, state: SweepState) -> SweepState:
        """Return the state after all batches of one level.

        Empty data returns a state without batches. The state has a `fixed_point` if the network
        cannot be cut at its levels.
        """
        ...

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result; end the progress bar and delete temporary files."""
        ...


class GroupEngine(Protocol):
    """Sweep a sample in groups of batches.

    Attributes:
        groups: The number of groups.
    """

    groups: int

    def begin(self) -> SweepState:
        """Return the state where the sweep begins."""
        ...

    def run_level(
        self, state: SweepState, probes: Sequence[SweepState]
    ) -> tuple[list[SweepState], list[SweepState]]:
        """Run one level.

        Args:
            state: The state at the beginning of the level.
            probes: Other states from which to run some of the samples.

        Returns:
            The states after each group of batches alone, and the states after these samples from
            each of `probes`.
        """
        ...


class Sampler(Protocol):
    """Draw batches of the data, each once."""

    def draw(self, more: int) -> Draw:
        """Draw `more` batches, or fewer if the data ends."""
        ...

    def engine(self) -> GroupEngine:
        """Create an engine for all batches drawn so far."""
        ...

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result of a complete state."""
        ...


def run_levels(engine: Engine) -> PopulationStats:
    """Run a sweep level by level."""
    state = engine.initial_state()
    while not state.complete:
        state = state.advance(engine.run_level(state))
    return engine.finish(state)


def run_sample(sampler: Sampler, tolerance: float, report: Report) -> PopulationStats:
    """Run a sweep over as many batches as a tolerance requires.

    The sample grows until its standard errors are small enough or the data ends. Each time the
    whole sample is swept again, because exact statistics of parts do not add up.
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
    """Run a sweep of a sample level by level, and compute what each group adds to the error."""
    state = engine.begin()
    replicates = [state] * engine.groups
    while not state.complete:
        # Layers of the first level have no layers before them.
        probes = [state, *replicates] if state.settled else []
        groups, probed = engine.run_level(state, probes)
        after = state.advance(merge_shards(groups, state))
        replicates = replicates_after(after, groups, replicates, probed)
        state = after
    return Sample(state, replicates, drawn)
