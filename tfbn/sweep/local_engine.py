"""The engine of one process, with its data, frontier cache, checkpoint and progress bar."""

import contextlib
import dataclasses
from collections.abc import Iterator

from tfbn.population import PopulationStats
from tfbn.stats.methods import METHODS
from tfbn.sweep.batches import Batch, Batches, nbytes, sequence_digest
from tfbn.sweep.checkpoint import Checkpoint
from tfbn.sweep.frontiers import Frontier, Frontiers
from tfbn.sweep.replica import Replica
from tfbn.sweep.report import Report
from tfbn.sweep.state import SweepState


class LocalEngine:
    """Sweep batches in this process.

    Args:
        replica: The `Replica` of the model.
        batches: The `tfbn.sweep.batches.Batches`.
        method: The name of the method.
        memory_limit: Bytes of main memory for tensors between levels.
        report: The `Report` of progress.
        checkpoint: The `Checkpoint`, or `None`.
    """

    def __init__(
        self,
        replica: Replica,
        batches: Batches,
        method: str,
        memory_limit: int,
        report: Report,
        checkpoint: Checkpoint | None = None,
    ):
        self._replica = replica
        self._method = method
        self._report = report
        self._checkpoint = checkpoint
        # The state in the checkpoint, and the digest of its batches.
        self._saved: tuple[SweepState, bytes] | None = None
        if METHODS[method].by_level and not batches.repeatable:
            batches = batches.in_memory(memory_limit)
            memory_limit -= sum(nbytes(batch.inputs) for batch in batches)
        self._batches = batches
        self._frontiers = Frontiers(memory_limit)
        self._all_kept = False

    def initial_state(self) -> SweepState:
        """Return the state of a new sweep, or of the checkpoint at the beginning of its level."""
        state = self._replica.initial_state(self._method, self._batches.first())
        self._saved = None if self._checkpoint is None else self._checkpoint.read(state)
        if self._saved is None:
            return state
        saved, _ = self._saved
        return dataclasses.replace(saved.without_batches(), levels=saved.levels)

    def run_level(self, state: SweepState) -> SweepState:
        """Return the state after all batches of one level; save it in the checkpoint meanwhile."""
        if state.level == 1 and state.fixed_point is not None:  # Uncut passes require no frontiers.
            self._frontiers, self._all_kept = Frontiers(0), False
        reached, digest = self._resumed(state)
        work = self._work(reached.batches, digest)
        self._report.begin_level(state.level)
        try:
            for batch, frontier, after in self._replica.run_level(
                state, work, reached, self._batches.static
            ):
                self._frontiers.put(batch, frontier)
                self._report.batch(max(after.levels.values(), default=0))
                if self._checkpoint is None:
                    reached = after
                    continue
                # One statement, because Ctrl-C may interrupt at any point.
                reached, digest = after, sequence_digest(digest, batch.key)
                if self._checkpoint.due:
                    self._checkpoint.save(reached, digest)
        except BaseException:
            if self._checkpoint is not None and reached.batches:
                with contextlib.suppress(OSError):  # The error that ended the sweep matters more.
                    self._checkpoint.save(reached, digest)
            raise
        self._frontiers.end_pass()
        self._all_kept = len(self._frontiers) == reached.batches
        return reached

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result; end the progress bar and delete the checkpoint."""
        stats = self._replica.finish(state)
        self._report.end()
        if self._checkpoint is not None:
            self._checkpoint.remove()
        return stats

    def _resumed(self, state: SweepState) -> tuple[SweepState, bytes]:
        """Return the state after the batches in the checkpoint, and their digest."""
        saved, self._saved = self._saved, None
        return saved if saved is not None and saved[0].level == state.level else (state, b"")

    def _work(self, done: int, expected: bytes) -> Iterator[tuple[Batch, Frontier | None]]:
        """Yield each remaining batch of the level with its frontier.

        Args:
            done: Number of batches in the checkpoint.
            expected: Digest of these batches.
        """
        digest, index, checkpoint = b"", -1, self._checkpoint
        for batch in self._frontiers if self._all_kept else self._batches:
            index = batch.index
            if index >= done:
                yield batch, self._frontiers.get(batch)
                continue
            digest = sequence_digest(digest, batch.key)
            if checkpoint is not None and index + 1 == done and digest != expected:
                raise checkpoint.other_data(done)
        if checkpoint is not None and index + 1 < done:
            raise checkpoint.other_data(done)
