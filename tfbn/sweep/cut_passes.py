"""Run passes over a network that is cut at its levels: each computes one level of a batch."""

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from tfbn.sweep.batches import Batch, flatten
from tfbn.sweep.frontiers import Frontier
from tfbn.sweep.network import Network
from tfbn.sweep.observation import UnobservableError
from tfbn.sweep.state import NetworkFacts, Site
from tfbn.sweep.trace import SiteMoments

# Path, or site if calls differ -> mean and variance, shape (2, channels).
Populations = Mapping[str | Site, tf.Tensor]


class Observed(NamedTuple):
    """The result of a pass for one batch.

    Attributes:
        calls: (site, moments of the input) of each call of the level.
        frontier: The `Frontier` where the next level starts; `None` to start from the batch.
        facts: The `NetworkFacts` of the trace.
    """

    calls: list[SiteMoments]
    frontier: Frontier | None
    facts: NetworkFacts


class CutPasses:
    """The passes of a sweep, one for each level of batch norm layers.

    Args:
        network: A `tfbn.sweep.network.Network`.
        static: See `Network.trace`.
    """

    def __init__(self, network: Network, static: bool):
        self._network = network
        self._static = static

    def run(
        self, batch: Batch, start: Frontier | None, level: int, populations: Populations
    ) -> Observed:
        """Run a batch up to a level.

        Args:
            batch: The `Batch`.
            start: The `Frontier` of the batch at a lower level, `None` to start from its inputs.
            level: The level.
            populations: Path -> mean and variance of the layers of all lower levels.

        Returns:
            The observed calls: empty if the network cannot be cut.
        """
        if start is None:
            trace = self._network.trace(batch.inputs, settled=True, static=self._static)
            start = Frontier(trace, 0, [*flatten(batch.inputs), batch.number])
        trace, values = start.trace, start.values
        if trace.facts.levels is None:
            return Observed([], None, trace.facts)
        if level > trace.cut.depth:  # Another signature has more levels.
            return Observed([], start, trace.facts)
        if start.level < level - 1 and trace.cut.drawn is not None:
            raise UnobservableError(
                "Expected random numbers that can be drawn again. Received: operation "
                f"{trace.cut.drawn!r}. Use keras.random with a SeedGenerator, or method='pooled'."
            )

        def population(site: Site) -> tf.Tensor:
            if site.path not in populations:
                raise UnobservableError(
                    "Expected the same data in every pass. Received: a batch that reaches layer "
                    f"{site.path!r}, which no batch of an earlier pass did. Seed the pipeline."
                )
            return populations[site.path]

        calls: list[SiteMoments] = []
        for number in range(start.level + 1, level + 1):
            calls, values = trace.segment(number).run(values, population)
        return Observed(calls, Frontier(trace, level, values), trace.facts)
