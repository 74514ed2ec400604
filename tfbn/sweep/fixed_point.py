"""Compute exact statistics of networks that cannot be cut: passes until convergence."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tfbn.stats import moments
from tfbn.stats.moments import Moments

if TYPE_CHECKING:
    from tfbn.sweep.state import Site, SweepState

# Convergence: the measured statistics differ from the ones that the pass used by at most this share
# of a standard deviation, or of a variance. Rounding in float32 stays below it.
_CLOSE = 1e-5


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Passes over the whole network, each with the statistics of the pass before.

    In the first pass every call normalizes with the moments of the batch. Every pass settles one
    more call on the longest path. First, every call of a recurrent layer has a separate population;
    when these have converged, the passes continue for the layers behind them.

    Attributes:
        recurrent: The paths of layers whose calls depend on their own output.
        behind: Whether the recurrent layers have converged.
        passes: The number of the current pass, since `behind` changed.
    """

    recurrent: tuple[str, ...] = ()
    behind: bool = False
    passes: int = 1

    def note(self, recurrent: Iterable[str]) -> "FixedPoint":
        """Return a copy with more recurrent layers."""
        return dataclasses.replace(self, recurrent=tuple(sorted({*self.recurrent, *recurrent})))

    def populations(
        self, settled: Mapping["Site", Moments], layers: Mapping[str, Moments]
    ) -> dict[Any, Moments]:
        """Return the moments that calls normalize with, by path, or by site of recurrent layers.

        Args:
            settled: Site -> moments that the pass before measured.
            layers: Path -> moments of all calls of a layer together.
        """
        separate = {} if self.behind else self._of_recurrent(settled)
        return {**layers, **separate}

    def after_pass(self, state: "SweepState") -> tuple[dict["Site", Moments], "FixedPoint | None"]:
        """Return the measured moments and the next pass, `None` after the last.

        Args:
            state: The state after the batches of a pass.

        Raises:
            ValueError: If the passes, one more than the longest path has calls, do not converge.
        """
        measured = state.moments
        if self.behind:  # Recurrent layers keep the statistics of separate populations.
            measured = measured | self._of_recurrent(state.settled)
        before = state.populations
        after = dataclasses.replace(state, settled=measured).populations
        moving = [key for key in after if not _close(after[key], before.get(key))]
        if not moving:
            if self.recurrent and not self.behind:
                return measured, dataclasses.replace(self, behind=True, passes=1)
            return measured, None
        if self.passes > len(measured) + 1:
            raise ValueError(
                "Expected exact statistics to exist. Received: layer "
                f"{getattr(moving[0], 'path', moving[0])!r} in a loop that feeds its output back, "
                f"not converged after {state.level} passes. Use method='pooled'."
            )
        return measured, dataclasses.replace(self, passes=self.passes + 1)

    def _of_recurrent(self, by_site: Mapping["Site", Moments]) -> dict["Site", Moments]:
        return {site: m for site, m in by_site.items() if site.path in self.recurrent}


def _close(ours: Moments, theirs: Moments | None) -> bool:
    if theirs is None:
        return False
    # Rounding counts where a channel hardly varies.
    variance = moments.variance(theirs) + 1e-6 * theirs.mean**2
    mean_off = np.abs(ours.mean - theirs.mean)
    variance_off = np.abs(moments.variance(ours) - moments.variance(theirs))
    return bool(
        np.all(mean_off <= _CLOSE * np.sqrt(variance)) and np.all(variance_off <= _CLOSE * variance)
    )
