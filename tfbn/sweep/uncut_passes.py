"""Passes that run the whole network for every batch, and observe all calls at once."""

import contextlib
from collections.abc import Callable

import tensorflow as tf

from tfbn.models.keras_models import Structure
from tfbn.sweep.batches import Batch
from tfbn.sweep.cut_passes import Populations, Shown, SiteMoments, recurrent
from tfbn.sweep.frontiers import Frontier
from tfbn.sweep.loops import feeding_themselves
from tfbn.sweep.network import Network, Trace, UnobservableError, flatten
from tfbn.sweep.state import Site


class UncutPasses:
    """The passes of a sweep over a network that is not, or cannot be, cut at its levels.

    In the first pass every call normalises with the moments of the batch. In each later pass the
    layers normalise with the statistics of the pass before.

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

    def start(self, batch: Batch) -> Frontier:
        """The batch itself: no pass takes it further."""
        return Frontier(None, 0, [batch.inputs, batch.number])

    def levels(self, frontier: Frontier) -> dict[str, int]:
        """No layer has a level."""
        return {}

    def recurrent(self, frontier: Frontier) -> frozenset[str]:
        """The paths of the layers whose calls depend on their own output."""
        inputs, _ = frontier.values
        trace = self._trace_if_any(inputs, settled=True)
        return frozenset() if trace is None else recurrent(trace)

    def looping(self, frontier: Frontier) -> frozenset[str]:
        """The paths of the layers in loops that feed themselves."""
        inputs, _ = frontier.values
        trace = self._trace_if_any(inputs, settled=True)
        return frozenset() if trace is None else feeding_themselves(trace)

    def not_nan(self, frontier: Frontier) -> list[int]:
        """The places of the inputs in which NaN would be an error."""
        trace = self._trace_if_any(frontier.values[0], settled=False)
        return [] if trace is None else trace.not_nan

    def advance(
        self, frontier: Frontier, level: int, populations: Populations
    ) -> tuple[list[SiteMoments], Frontier, Shown]:
        """Run a batch through the network.

        Args:
            frontier: Of `start`.
            level: The number of the pass.
            populations: By path, or by site where a call has its own, the mean and variance of
                the pass before, a tensor of shape (2, channels).

        Returns:
            For every call its site and the moments of the values that entered, a list of
            (count, mean, variance); the frontier as it was; and what the network has shown.
        """
        inputs, number = frontier.values
        run = self._run_eagerly if self._eager else self._run_graph
        called, shown = run(inputs, number, populations)
        return called, frontier, shown

    def _trace_if_any(self, inputs: Structure, settled: bool) -> Trace | None:
        """The trace, or `None` where there is none; `advance` says if it has to be."""
        if self._untraceable:
            return None
        try:
            return self._network.trace(inputs, settled=settled, static=self._static)
        except UnobservableError:
            raise
        except Exception:
            self._untraceable = True
            return None

    def _run_eagerly(
        self, inputs: Structure, number: tf.Tensor, populations: Populations
    ) -> tuple[list[SiteMoments], Shown]:
        def population(site: Site, channels: int) -> list[tf.Tensor] | None:
            given = populations.get(site, populations.get(site.path))
            return None if given is None else tf.unstack(given)

        run = self._network.observer.run(inputs, number, population)
        called = [(call.site, call.measure(*(call.fetches or ()))) for call in run.calls]
        return called, Shown(run.draws > 0, run.by_batch)

    def _run_graph(
        self, inputs: Structure, number: tf.Tensor, populations: Populations
    ) -> tuple[list[SiteMoments], Shown]:
        trace = self._network.trace(inputs, settled=bool(populations), static=self._static)
        function, sites, fetches = _function_of(trace)
        fed = (_population(trace, populations, site) for site in sites)
        # Two runs at once would take the moments of calls in loops from one queue.
        with contextlib.nullcontext() if trace.cuttable else trace.lock:
            fetched = iter(function(*flatten(inputs), number, *fed)[:fetches])
            called = [
                (call.site, call.measure(*(next(fetched) for _ in call.fetches or ())))
                for call in trace.calls
            ]
        return called, Shown(trace.random, trace.by_batch)


def _population(trace: Trace, populations: Populations, site: Site) -> tf.Tensor:
    given = populations.get(site, populations.get(site.path))
    if given is not None:
        return given
    # Mean 0 and variance 1, for a layer that the pass before did not reach.
    _, channels = trace.populations[site].shape
    return tf.stack([tf.zeros(channels, tf.float64), tf.ones(channels, tf.float64)])


def _function_of(trace: Trace) -> tuple[Callable[..., list[tf.Tensor]], list[Site], int]:
    """The function from a batch and populations to the fetches of all calls, made once.

    Returns:
        The function, the sites whose populations it takes, and how many fetches there are.
    """
    with trace.lock:
        if "whole" not in trace.pieces:
            fetches = sum(len(call.fetches or ()) for call in trace.calls)
            if not trace.populations and not trace.has_effects:
                function, needed = trace.function, list[tf.Tensor]()
            else:
                function, needed = trace.extraction.function(
                    trace.inputs, list(trace.populations.values()), trace.measured
                )
            sites = {id(placeholder): site for site, placeholder in trace.populations.items()}
            trace.pieces["whole"] = function, [sites[id(t)] for t in needed], fetches
        return trace.pieces["whole"]
