"""Run passes over the whole network for every batch, and observe all calls at once."""

import contextlib

import tensorflow as tf

from tfbn.sweep.batches import Batch, flatten
from tfbn.sweep.cut_passes import Observed, Populations
from tfbn.sweep.frontiers import Frontier
from tfbn.sweep.network import Network
from tfbn.sweep.observation import UnobservableError
from tfbn.sweep.state import NetworkFacts, Site
from tfbn.sweep.trace import Trace


class UncutPasses:
    """The passes of a sweep over a network that is not cut at its levels.

    In the first pass every call normalizes with the moments of the batch. In each later pass the
    layers normalize with the statistics of the pass before.

    Args:
        network: A `tfbn.sweep.network.Network`.
        static: See `Network.trace`.
        eager: Whether to run the model without a graph.
    """

    def __init__(self, network: Network, static: bool, eager: bool):
        self._network = network
        self._static = static
        self._eager = eager
        self._untraceable = False

    def run(
        self, batch: Batch, start: Frontier | None, level: int, populations: Populations
    ) -> Observed:
        """Run a batch through the network, see `CutPasses.run`. Returns no frontier."""
        run = self._run_eagerly if self._eager else self._run_graph
        return run(batch, populations)

    def _run_eagerly(self, batch: Batch, populations: Populations) -> Observed:
        def population(site: Site, channels: int) -> list[tf.Tensor] | None:
            given = populations.get(site, populations.get(site.path))
            return None if given is None else tf.unstack(given)

        run = self._network.observer.run(batch.inputs, batch.number, population)
        calls = [(call.site, call.measure(*(call.fetches or ()))) for call in run.calls]
        trace = self._trace_if_any(batch)
        facts = NetworkFacts() if trace is None else trace.facts
        return Observed(calls, None, facts._replace(random=run.draws > 0, by_batch=run.by_batch))

    def _trace_if_any(self, batch: Batch) -> Trace | None:
        """Return a trace of a model that runs eagerly, for more facts; `None` if tracing fails."""
        if self._untraceable:
            return None
        try:
            return self._network.trace(batch.inputs, settled=False, static=self._static)
        except UnobservableError:
            raise
        except Exception:
            self._untraceable = True
            return None

    def _run_graph(self, batch: Batch, populations: Populations) -> Observed:
        trace = self._network.trace(batch.inputs, settled=bool(populations), static=self._static)

        def population(site: Site) -> tf.Tensor:
            given = populations.get(site, populations.get(site.path))
            if given is not None:
                return given
            # Mean 0 and variance 1 for a layer that the pass before did not reach.
            _, channels = trace.populations[site].shape
            return tf.stack([tf.zeros(channels, tf.float64), tf.ones(channels, tf.float64)])

        whole = trace.whole
        # Concurrent runs would mix the moments of calls in loops in one queue.
        with contextlib.nullcontext() if trace.cuttable else trace.lock:
            calls, _ = whole.run([*flatten(batch.inputs), batch.number], population)
        return Observed(calls, None, trace.facts)
