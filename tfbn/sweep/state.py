"""The accumulator of a sweep: moments of batches, merged, advanced and finished."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbn.population import PopulationStats
from tfbn.stats import drift, layer_stats, moments
from tfbn.stats.layer_stats import LayerStats
from tfbn.stats.moments import Moments
from tfbn.sweep.batches import Batch
from tfbn.sweep.caveats import unused
from tfbn.sweep.methods import METHODS

# A pass has settled where the statistics that it measured are those that it was made with, up to
# this share of a standard deviation, or of a variance. Rounding in float32 stays below it.
_SETTLED = 1e-5


class Site(NamedTuple):
    """One call of one batch norm layer.

    Attributes:
        path: The path of the layer.
        call: Which of its calls in one run of the model, from 0.
    """

    path: str
    call: int


def _equal(ours: Any, theirs: Any, method: str) -> Any:
    return ours


def _sum(ours: int, theirs: int, method: str) -> int:
    return ours + theirs


def _sum_of_digests(ours: int, theirs: int, method: str) -> int:
    return (ours + theirs) % 2**64


def _largest(ours: int, theirs: int, method: str) -> int:
    return max(ours, theirs)


def _union(ours: dict[str, int], theirs: dict[str, int], method: str) -> dict[str, int]:
    return ours | theirs


def _union_of_paths(ours: Iterable[str], theirs: Iterable[str], method: str) -> tuple[str, ...]:
    return tuple(sorted({*ours, *theirs}))


def _by_site(
    ours: dict[Site, Moments], theirs: dict[Site, Moments], method: str
) -> dict[Site, Moments]:
    both = [site for site in theirs if site in ours]
    merge = functools.partial(moments.merge, method=method)
    merged = moments.together(merge, [(ours[site], theirs[site]) for site in both])
    return {**ours, **theirs, **dict(zip(both, merged, strict=True))}


def _field(merge: Callable[[Any, Any, str], Any], default: Any) -> Any:
    """A field of `SweepState`, with the function that merges it from two shards."""
    return dataclasses.field(default=default, metadata={"merge": merge})


@dataclasses.dataclass(frozen=True)
class SweepState:
    """A sweep between two batches, over one shard of the data or several merged ones.

    Attributes:
        method: Its name, see `tfbn.sweep.methods`.
        fingerprint: Of the weights, see `tfbn.models.fingerprints.fingerprint`.
        paths: The layers to sweep.
        whole: Whether every pass observes all calls, because the network cannot be cut at levels.
        level: The level whose calls are being observed, or the number of the whole pass, from 1.
        settled: By site the moments of the levels before, or of the whole pass before.
        recurrent: The paths of the layers whose calls depend on their own output, in whole passes.
        behind: Whether these have settled, and the passes go on for the layers behind them.
        first: `samples`, `data` and `keys` of level 1; `None` at level 1.
        settling: In whole passes, how many there were for the layers that are settling now.
        complete: Whether no level is left.
        levels: By path the level of every layer that a batch has shown.
        by_batch: The paths of the layers that inference normalizes by the batch.
        random: Whether the passes need the same batches, because the network draws random numbers,
            which follow from the batches' keys, or normalizes by the batch.
        samples: How many samples this level has seen; `batches` in how many batches;
            `batch_size` the size of the largest.
        data: The digests of these samples, summed: whatever their order and their batches.
        keys: The keys of these batches, summed.
        moments: By site the moments of this level.
    """

    method: str = _field(_equal, "exact")
    fingerprint: str = _field(_equal, "")
    paths: tuple[str, ...] = _field(_equal, ())
    whole: bool = _field(_largest, False)
    level: int = _field(_equal, 1)
    settled: dict[Site, Moments] = dataclasses.field(
        default_factory=dict, metadata={"merge": _equal}
    )
    recurrent: tuple[str, ...] = _field(_union_of_paths, ())
    behind: bool = _field(_equal, False)
    first: tuple[int, int, int] | None = _field(_equal, None)
    settling: int = _field(_equal, 1)
    complete: bool = _field(_equal, False)
    levels: dict[str, int] = dataclasses.field(default_factory=dict, metadata={"merge": _union})
    by_batch: tuple[str, ...] = _field(_union_of_paths, ())
    random: bool = _field(_largest, False)
    samples: int = _field(_sum, 0)
    batches: int = _field(_sum, 0)
    batch_size: int = _field(_largest, 0)
    data: int = _field(_sum_of_digests, 0)
    keys: int = _field(_sum_of_digests, 0)
    moments: dict[Site, Moments] = dataclasses.field(
        default_factory=dict, metadata={"merge": _by_site}
    )

    def add(
        self,
        batch: Batch,
        site_moments: Iterable[tuple[Site, Moments]],
        levels: dict[str, int],
        random: bool,
        recurrent: Iterable[str] = (),
        by_batch: Iterable[str] = (),
    ) -> "SweepState":
        """The state with one batch more.

        Args:
            batch: The `tfbn.sweep.batches.Batch`.
            site_moments: (site, moments) of the calls that the batch has run through.
            levels: By path the level of the layers that it has shown.
            random: Whether it has shown random draws.
            recurrent: The paths of recurrent layers that it has shown.
            by_batch: The paths of layers that it has shown to normalize by the batch.
        """
        by_site: dict[Site, Moments] = {}
        for site, of_call in site_moments:  # The body of a loop has several for one site.
            before = by_site.get(site)
            merge = functools.partial(moments.merge_one_batch, method=self.method)
            by_site[site] = of_call if before is None else merge(before, of_call)
        shard = dataclasses.replace(
            self.without_batches(),
            moments=by_site,
            levels=levels,
            random=random or bool(by_batch),
            recurrent=tuple(recurrent),
            by_batch=tuple(by_batch),
            samples=batch.samples,
            batches=1,
            batch_size=batch.samples,
            data=batch.data,
            keys=batch.key,
        )
        return self.merge(shard)

    def without_batches(self) -> "SweepState":
        """The state at the beginning of its level."""
        zero = dict.fromkeys(("samples", "batches", "batch_size", "data", "keys"), 0)
        nothing: dict[str, Any] = {**zero, "moments": {}, "levels": {}}
        return dataclasses.replace(self, **nothing)

    def whole_passes(self) -> "SweepState":
        """The state of a sweep that begins anew, by whole passes."""
        return SweepState(self.method, self.fingerprint, self.paths, whole=True)

    def merge(self, other: "SweepState") -> "SweepState":
        """The state of two shards together.

        Raises:
            ValueError: If they are not of one level of one sweep.
        """
        self._check_same_sweep(other)
        merged = {
            field.name: field.metadata["merge"](
                getattr(self, field.name), getattr(other, field.name), self.method
            )
            for field in dataclasses.fields(self)
        }
        if any(other.levels.get(path, level) != level for path, level in self.levels.items()):
            merged["whole"] = True
        return SweepState(**merged)

    def _check_same_sweep(self, other: "SweepState") -> None:
        for name, advice in (
            ("method", "Sweep all shards with one method."),
            ("fingerprint", "Use the same weights for all shards."),
            ("paths", "Use the same model for all shards, with the same layers frozen."),
            ("level", "Merge the shards of one level before the next."),
            ("first", "Give all shards the state that the level before was merged to."),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"Expected shards of one sweep. Received: shards whose {name} differs, "
                    f"{ours!r} and {theirs!r}. {advice}"
                )
        if self.settled is not other.settled and not _same_moments(self.settled, other.settled):
            raise ValueError(
                f"Expected shards of one sweep. Received: shards at level {self.level} that "
                "differ in the levels before. Give all shards the same merged state."
            )

    @functools.cached_property
    def layers(self) -> dict[str, Moments]:
        """By path the moments of the layers of all settled levels: those of all their calls."""
        return _by_path(self.settled, self.method)

    @property
    def populations(self) -> dict[Any, Moments]:
        """By path, or by site where a call has its own, the moments that calls normalise with.

        All calls of a layer share one mean and variance, as in inference, but for the calls of
        recurrent layers until these have settled.
        """
        if self.behind:
            return self.layers
        own = {site: m for site, m in self.settled.items() if site.path in self.recurrent}
        return {**self.layers, **own}

    def spreads(self) -> dict[str, tuple[int, dict[str, float]]]:
        """By path, for layers of several calls: how many, and the drift of the furthest one.

        The drift is that of `tfbn.stats.drift.of_layer`, of the call from all calls together.
        """
        calls: dict[str, list[Moments]] = {}
        for site, of_site in self.settled.items():
            if np.any(of_site.count):
                calls.setdefault(site.path, []).append(of_site)
        spreads = {}
        for path, of_layer in calls.items():
            if len(of_layer) > 1:
                single = [layer_stats.of_calls([one], self.method) for one in of_layer]
                together = layer_stats.of_calls([self.layers[path]], self.method)
                drifts = [drift.of_layer(together, one) for one in single]
                furthest = max(drifts, key=lambda off: off["mean_shift"] + off["std_ratio_max"])
                spreads[path] = len(single), furthest
        return spreads

    def next_level(self) -> "SweepState":
        """The state at the beginning of the next level, or the complete one after the last.

        Raises:
            ValueError: If the level was swept over other data than the first; if whole passes
                do not settle.
        """
        swept = self.samples, self.data, self.keys
        if self.first is not None:
            _check_same_data(self.first, swept, self.random)
        if not METHODS[self.method].by_level:
            return self._after(self.moments, complete=True, first=swept)
        if self.whole:
            return self._after_whole_pass(swept)
        done = self.level >= max(self.levels.values(), default=0)
        return self._after(self.settled | self.moments, complete=done, first=swept)

    def _after(
        self, settled: dict[Site, Moments], *, complete: bool, **changes: Any
    ) -> "SweepState":
        after = dataclasses.replace(self, settled=settled, complete=complete, **changes)
        if complete:
            return after
        begin = after.without_batches()
        return dataclasses.replace(begin, level=self.level + 1, levels=self.levels)

    def _after_whole_pass(self, swept: tuple[int, int, int]) -> "SweepState":
        """The state after a whole pass: complete when nothing has moved since the one before.

        The statistics of recurrent layers are those of the passes in which each of their calls
        normalised by its own. Then only the layers behind them go on.
        """
        settled = self.moments
        if self.behind:
            settled = settled | {s: m for s, m in self.settled.items() if s.path in self.recurrent}
        now = dataclasses.replace(self, settled=settled).populations
        moving = [key for key in now if not _close(now[key], self.populations.get(key))]
        if not moving:
            if self.recurrent and not self.behind:
                return self._after(settled, complete=False, behind=True, first=swept, settling=1)
            return self._after(settled, complete=True, first=swept)
        # Every pass settles one more call on the longest path.
        if self.settling > len(settled) + 1:
            moved = moving[0].path if isinstance(moving[0], Site) else moving[0]
            raise ValueError(
                "Expected a network whose batch norm layers have exact statistics. Received: layer "
                f"{moved!r}, which is called in a loop that feeds its output back to it, and whose "
                f"statistics still move after {self.level} passes. Use method='pooled'."
            )
        return self._after(settled, complete=False, first=swept, settling=self.settling + 1)

    def statistics(self) -> dict[str, LayerStats]:
        """By path the `LayerStats` of the layers of all settled levels."""
        calls: dict[str, list[Moments]] = {}
        for site, of_site in self.settled.items():
            calls.setdefault(site.path, []).append(of_site)
        return {path: layer_stats.of_calls(each, self.method) for path, each in calls.items()}

    def finish(self, model: keras.Model, previous: PopulationStats) -> PopulationStats:
        """The result of a complete sweep, without layers whose statistics inference does not use.

        Args:
            model: The model that was swept.
            previous: The `PopulationStats` that it holds.

        Raises:
            ValueError: If no layer is left, or if one was called without any value.
        """
        statistics = {path: s for path, s in self.statistics().items() if path in self.paths}
        if not statistics:
            raise unused(model, self.paths, self.by_batch)
        for path, of_layer in statistics.items():
            if not of_layer.counts.any():
                raise ValueError(
                    f"Expected values for layer {path!r}. Received: none, or only masked ones. "
                    "Look at the data and its masks."
                )
        if unswept := previous.keys() - statistics.keys():
            held = {path: previous[path] for path in previous if path not in unswept}
            previous = previous.replace(layers=held)
        return PopulationStats(
            {path: statistics[path] for path in self.paths if path in statistics},
            method=self.method,
            samples=self.samples,
            batches=self.batches,
            batch_size=self.batch_size,
            fingerprint=self.fingerprint,
            levels=self.level,
            previous=previous,
        )


def merged(states: Iterable[SweepState], begin: SweepState) -> SweepState | None:
    """The states of several shards after one level as one, or `None` if none has a batch.

    Args:
        states: Of the shards.
        begin: The `SweepState` at the beginning of the level.
    """
    whole = None
    for state in states:
        # An empty shard does not show which layers are called in training.
        if state.batches or (state.whole and not begin.whole):
            state = dataclasses.replace(state, settled=begin.settled)
            whole = state if whole is None else SweepState.merge(whole, state)
    return whole


def _check_same_data(first: Sequence[int], now: Sequence[int], random: bool) -> None:
    if first[:2] != now[:2]:
        raise ValueError(
            "Expected the same data in every pass. Received: data that differs from that of the "
            f"first pass ({first[0]} samples then, {now[0]} now), as random augmentation makes it, "
            "or padding to the longest sample of a shuffled batch. Raise `memory_limit`, so that "
            "method='exact' reads the data once; shuffle with reshuffle_each_iteration=False; "
            "seed the augmentation; sweep fewer samples with `steps`; or use method='pooled', "
            "which reads it once."
        )
    if random and first != now:
        raise ValueError(
            "Expected the same batches in every pass, because inference draws random numbers for "
            "every batch, or normalizes by the batch. Received: the same data in other batches. "
            "Raise `memory_limit`, do not shuffle, or use method='pooled'."
        )


def _by_path(by_site: Mapping[Site, Moments], method: str) -> dict[str, Moments]:
    merged: dict[str, Moments] = {}
    for site, of_site in by_site.items():
        before = merged.get(site.path)
        merged[site.path] = (
            of_site if before is None else moments.merge(before, of_site, method=method)
        )
    return merged


def _same_moments(ours: Mapping[Site, Moments], theirs: Mapping[Site, Moments]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[site].rows, theirs[site].rows) for site in ours
    )


def _close(ours: Moments, theirs: Moments | None) -> bool:
    if theirs is None:
        return False
    # Rounding counts where a channel hardly varies.
    variance = moments.variance(theirs) + 1e-6 * theirs.mean**2
    mean_off = np.abs(ours.mean - theirs.mean)
    variance_off = np.abs(moments.variance(ours) - moments.variance(theirs))
    return bool(
        np.all(mean_off <= _SETTLED * np.sqrt(variance))
        and np.all(variance_off <= _SETTLED * variance)
    )
