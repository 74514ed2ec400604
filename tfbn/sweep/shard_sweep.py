"""The sweep over one shard, in one process: every level, over the shard's batches."""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import assignment, keras_models
from tfbn.population import PopulationStats
from tfbn.stats import moments
from tfbn.stats.moments import Moments
from tfbn.sweep import digests
from tfbn.sweep.batches import Batch, Batches, BatchReader, nbytes
from tfbn.sweep.caveats import warn_of_loops
from tfbn.sweep.checkpoint import Checkpoint
from tfbn.sweep.cut_passes import CutPasses, Shown
from tfbn.sweep.devices import devices, in_turn
from tfbn.sweep.frontiers import Frontier, Frontiers
from tfbn.sweep.methods import METHODS
from tfbn.sweep.network import Network, UnobservableError, flatten
from tfbn.sweep.observation import CallMoments
from tfbn.sweep.report import Report
from tfbn.sweep.state import Site, SweepState
from tfbn.sweep.trained_layers import require_trained, trained_calls
from tfbn.sweep.uncut_passes import UncutPasses


class _BatchResult(NamedTuple):
    """The results of a pass for one batch.

    Attributes:
        batch: The `Batch`.
        frontier: The `Frontier` that it has reached.
        site_moments: (site, moments) of the calls that were observed.
        levels: By path the levels of the layers; `None` if the network cannot be cut there.
        shown: What it has shown of the network.
        recurrent: The paths of layers whose calls depend on their own output, in whole passes.
    """

    batch: Batch
    frontier: Frontier
    site_moments: list[tuple[Site, Moments]]
    levels: dict[str, int] | None
    shown: Shown | None
    recurrent: frozenset[str] = frozenset()


class ShardSweep:
    """A sweep as one process takes part in it.

    Args:
        model: A built model.
        layers: The layers to sweep, by path.
        batches: The `tfbn.sweep.batches.Batches` of this process.
        method: The name of the method.
        include_frozen: Whether to sweep layers too that `fit` does not train.
        observed: Whether `layers` are those that training was seen to change, so that no trace
            needs to show which ones train.
        reported: Whether the warnings about loops have been given.
        memory_limit: See `collect`; `None` where this process sweeps one level only, so that
            nothing is read or computed again.
        checkpoint: See `collect`.
        verbose: See `collect`.

    Attributes:
        begin: The state to begin at: that of a new sweep, or of the checkpoint.
        layers: The layers to sweep, by path.
        report: The `Report` of progress.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Mapping[str, keras.Layer],
        batches: Batches,
        method: str,
        *,
        include_frozen: bool = False,
        observed: bool = False,
        reported: bool = False,
        memory_limit: int | None = None,
        checkpoint: str | os.PathLike | None = None,
        verbose: int | str = 0,
    ):
        self._method = method
        self.report = Report(method, verbose, batches.total)
        self.report.begin()
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, batches)
        by_level = METHODS[method].by_level
        if by_level and memory_limit is not None and not batches.repeatable:
            batches = batches.in_memory(memory_limit)
            memory_limit -= sum(nbytes(batch.inputs) for batch in batches)
        self._batches: BatchReader = batches
        stats = PopulationStats.read(model)
        path_of = {id(layer): path for path, layer in keras_models.batch_norm_layers(model).items()}
        self._previous = {path: stats[path_of[id(layer)]] for path, layer in layers.items()}
        self._model = model
        self.layers = layers
        self._include_frozen = include_frozen
        self._observed = observed
        self._reported = reported
        self._eager = model.run_eagerly
        whole = by_level and self._eager
        self.begin = SweepState(method, stats.fingerprint, tuple(layers), whole)
        self._choose_layers(batches)
        self._memory_limit = memory_limit or 0
        self.forget_frontiers()
        # The state in the checkpoint, and the digest of its batches.
        self._saved = None if self._checkpoint is None else self._checkpoint.read(self.begin)
        if self._saved is not None:
            state, _ = self._saved
            self.begin = dataclasses.replace(state.without_batches(), levels=state.levels)

    def previous_of(self, paths: Iterable[str]) -> PopulationStats:
        """The `PopulationStats` that some layers held at the beginning."""
        return PopulationStats(
            {path: self._previous[path] for path in paths},
            method="assigned",
            fingerprint=self.begin.fingerprint,
        )

    def continue_sweep(self, state: SweepState, batches: BatchReader) -> SweepState:
        """The state after one level of a sweep that began in another process.

        Args:
            state: The state at the beginning of the level.
            batches: The `tfbn.sweep.batches.Batches` to sweep, which are read once.

        Raises:
            ValueError: If the weights are others there.
        """
        if state.fingerprint != self.begin.fingerprint:
            raise ValueError(
                "Expected every process to load the same weights. Received: fingerprints "
                f"{state.fingerprint[:12]} where the sweep began and "
                f"{self.begin.fingerprint[:12]} here. Give all the same file."
            )
        if batches.first() is None:
            return state
        if not self._chosen:
            self._choose_layers(batches)
        self._batches = batches
        self.forget_frontiers()  # They are of the batches before.
        return self.sweep_level(state)

    @property
    def any_batch_size(self) -> bool:
        """Whether the network is known to take batches of any size."""
        inputs = getattr(self._model, "inputs", None) or []
        return bool(inputs) and all(tensor.shape[0] is None for tensor in inputs)

    def over(self, batches: Batches, memory_limit: int) -> "ShardSweep":
        """The same network's sweep of other batches, with a cache of its own."""
        other = copy.copy(self)
        other._batches = batches
        other._memory_limit = memory_limit
        other.report = Report(self._method, 0, None)
        other._populations = [{} for _ in self._networks]
        other.forget_frontiers()
        return other

    def forget_frontiers(self) -> None:
        """Begin anew, with nothing kept from one level to the next."""
        self._frontiers = Frontiers(self._memory_limit)
        self._all_kept = False

    def sweep_level(self, state: SweepState) -> SweepState:
        """Sweep one level.

        Args:
            state: The `SweepState` at the beginning of the level.

        Returns:
            The state after this process's data. If its `whole` is set and that of `state` was
            not, the network cannot be cut at levels, and the sweep begins anew by whole passes.
        """
        if state.level == 1 and self._chosen:
            # The state may begin in a process without data, which does not show these.
            state = dataclasses.replace(state, paths=self.begin.paths)
        reached, digest = state, b""
        if self._saved is not None and self._saved[0].level == state.level:
            reached, digest = self._saved
        self._saved = None
        self._begin_passes(state)
        try:
            for result in in_turn(self._jobs(state, reached, digest), len(self._networks)):
                batch, frontier, site_moments, levels, shown, recurrent = result
                self._warn_of_loops(frontier)
                if levels is None or shown is None:
                    return dataclasses.replace(reached, whole=True)
                self._frontiers.put(batch, frontier)
                added = reached.add(
                    batch, site_moments, levels, shown.random, recurrent, shown.by_batch
                )
                # As one, because Ctrl-C may come at any point.
                reached, digest = added, digests.of_sequence(digest, batch.key)
                if reached.whole and not state.whole:
                    return reached
                self.report.batch(max(reached.levels.values(), default=0))
                if self._checkpoint is not None and self._checkpoint.due:
                    self._checkpoint.save(reached, digest)
        except BaseException:
            if self._checkpoint is not None and reached.batches:
                with contextlib.suppress(OSError):  # The error that ended the sweep matters more.
                    self._checkpoint.save(reached, digest)
            raise
        self._frontiers.end_pass()
        self._all_kept = len(self._frontiers) == reached.batches
        return reached

    def end(self) -> None:
        """Delete the checkpoint, and finish the report, of a sweep that is done."""
        self.report.end()
        if self._checkpoint is not None:
            self._checkpoint.remove()

    def _warn_of_loops(self, frontier: Frontier) -> None:
        """Warn, before the first batch is added, that the passes may not settle."""
        if not self._reported and METHODS[self._method].by_level:
            warn_of_loops(self._passes[0].looping(frontier))
        self._reported = True

    def _choose_layers(self, batches: BatchReader) -> None:
        """Leave out the layers that, as the first batch of this process shows, do not train."""
        layers = self.layers
        ignored: frozenset[Site] = frozenset()
        self._chosen = True
        if not (self._include_frozen or keras_models.always_passes_training_on(self._model)):
            first = batches.first()
            self._chosen = first is not None
            if first is not None:
                frozen, _, ignored = trained_calls(self._model, layers, first.inputs)
                if not self._observed:
                    require_trained(self._model, layers, frozen)
                    layers = {path: layer for path, layer in layers.items() if path not in frozen}
        self.begin = dataclasses.replace(self.begin, paths=tuple(layers))
        places = devices(self._model)
        self._networks = [Network(self._model, layers, ignored, device) for device in places]
        # For each network, by path or site, the moments and their tensor on its device.
        self._populations: list[dict[str | Site, tuple[Moments, tf.Tensor]]]
        self._populations = [{} for _ in self._networks]

    def _begin_passes(self, state: SweepState) -> None:
        by_level = METHODS[self._method].by_level and not (state.whole or self._eager)
        self.report.begin_level(state.level)
        static = self._batches.static
        self._passes: list[CutPasses | UncutPasses] = [
            CutPasses(network, static) if by_level else UncutPasses(network, static, self._eager)
            for network in self._networks
        ]
        populations = state.populations
        for network, placed in zip(self._networks, self._populations, strict=True):
            for gone in placed.keys() - populations.keys():
                del placed[gone]
            with network.placed():
                for key, population in populations.items():
                    before, _ = placed.get(key, (None, None))
                    if population is not before:  # A settled level stays as it is.
                        values = population.mean, moments.variance(population)
                        if isinstance(key, str):  # As inference will read them.
                            values = assignment.as_held(key, *values, self.layers[key])
                        placed[key] = population, tf.constant(np.stack(values))

    def _jobs(
        self, state: SweepState, reached: SweepState, expected: bytes
    ) -> Iterator[Callable[[], _BatchResult]]:
        """A function for every batch that the level still lacks, on each device in turn."""
        digest, index, checkpoint = b"", -1, self._checkpoint
        for batch in self._frontiers if self._all_kept else self._batches:
            index = batch.index
            if index >= reached.batches:
                yield functools.partial(self._run, batch, state)
                continue
            digest = digests.of_sequence(digest, batch.key)
            if checkpoint is not None and index + 1 == reached.batches and digest != expected:
                raise checkpoint.other_data(reached.batches)
        if checkpoint is not None and index + 1 < reached.batches:
            raise checkpoint.other_data(reached.batches)

    def _run(self, batch: Batch, state: SweepState) -> _BatchResult:
        level = state.level
        place = batch.index % len(self._networks)
        passes = self._passes[place]
        with self._networks[place].placed():
            with naming(self._model, batch):
                frontier = start = self._frontiers.get(batch) or passes.start(batch)
                levels = passes.levels(frontier)
                if levels is None:
                    return _BatchResult(batch, frontier, [], None, None)
                recurrent: frozenset[str] = frozenset()
                if state.whole and isinstance(passes, UncutPasses):
                    recurrent = passes.recurrent(frontier)
                populations = {path: value for path, (_, value) in self._populations[place].items()}
                called, frontier, shown = passes.advance(frontier, level, populations)
            site_moments = self._moments(
                batch, [(site, values) for site, entered in called for values in entered]
            )
            if level == 1:
                _refuse_nan(batch, passes.not_nan(start))
        return _BatchResult(batch, frontier, site_moments, levels, shown, recurrent)

    def _moments(
        self, batch: Batch, entered: Sequence[tuple[Site, CallMoments]]
    ) -> list[tuple[Site, Moments]]:
        """(site, moments) of a batch; an error that names site and batch if not finite."""
        if not entered:
            return []
        sites = [site for site, _ in entered]
        values = [[np.asarray(value) for value in values] for _, values in entered]
        # As one, because there may be many sites of few channels.
        counts, means, variances = zip(
            *(np.broadcast_arrays(*value) for value in values), strict=True
        )
        batch_moments = moments.of_batch(
            *map(np.concatenate, (counts, means, variances)), method=self._method
        )
        finite = moments.finite(batch_moments)
        channels = list(map(len, means))
        if not finite.all():
            first = np.searchsorted(np.cumsum(channels), np.argmin(finite), side="right")
            self._refuse(batch, sites[first], *values[first])
        return list(zip(sites, batch_moments.split(channels), strict=True))

    def _refuse(
        self, batch: Batch, site: Site, count: np.ndarray, mean: np.ndarray, variance: np.ndarray
    ) -> NoReturn:
        """Raise the error for moments that are not finite."""
        finite = moments.finite(moments.of_batch(count, mean, variance, method=self._method))
        if self._method == "algorithm2" and np.isfinite(variance).all() and count.min() == 1:
            raise ValueError(
                "Expected at least two values per channel in every batch, because "
                "method='algorithm2' divides by m - 1. Received: m = 1 for layer "
                f"{site.path!r}, in {batch.name}. Use another batch size, or method='pooled'."
            )
        channel = int(np.argmin(finite))
        raise ValueError(
            f"Expected finite values to enter layer {site.path!r}. Received: in {batch.name}, "
            f"channel {channel}, values with mean {mean[channel]} and variance "
            f"{variance[channel]}. {_reason(batch)}"
        )


def _refuse_nan(batch: Batch, places: Iterable[int]) -> None:
    # By NumPy: this runs on the devices' threads, and while an iterator ends in another thread,
    # TensorFlow gives its error to whatever operation copies between devices.
    flat = flatten(batch.inputs)
    if any(np.isnan(flat[place].numpy()).any() for place in places):
        raise ValueError(f"Expected finite data. Received: NaN in {batch.name}. Clean the data.")


def _reason(batch: Batch) -> str:
    if batch.inputs is None:  # Its frontier was kept, so an earlier pass has seen it finite.
        return "The values overflow inside the network. Look at its weights and dtypes."
    floating = [value for value in flatten(batch.inputs) if value.dtype.is_floating]
    if all(np.isfinite(value.numpy()).all() for value in floating):
        return (
            "The data is finite, so the values overflow inside the network. Look at its weights "
            "and dtypes."
        )
    return "The data holds NaN or Inf. Clean it."


@contextlib.contextmanager
def naming(model: keras.Model, batch: Batch) -> Iterator[None]:
    """Turn whatever a model raises on a batch into a `ValueError` that names the batch."""
    try:
        yield
    except UnobservableError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        shapes = keras.tree.map_structure(
            lambda value: f"{value.dtype.name}{value.shape}", batch.inputs
        )
        raise ValueError(
            f"Expected batches that model {model.name!r} takes. Received: {batch.name} with inputs "
            f"{shapes}, on which it raised {type(error).__name__}: {error}"
        ) from error
