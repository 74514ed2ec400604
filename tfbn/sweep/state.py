"""The state of a sweep: add batches, merge shards, advance to the next level."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfbn.stats import layer_stats, moments
from tfbn.stats.layer_stats import LayerStats
from tfbn.stats.methods import METHODS
from tfbn.stats.moments import Moments
from tfbn.sweep.batches import Batch, empty
from tfbn.sweep.fixed_point import FixedPoint


class Site(NamedTuple):
    """One call of one batch norm layer.

    Attributes:
        path: The path of the layer.
        call: The number of the call in one run of the model, from 0.
    """

    path: str
    call: int


class NetworkFacts(NamedTuple):
    """Facts about a network from one trace.

    Attributes:
        levels: Path -> level of a layer; `None` if the network cannot be cut at levels, because a
            layer is called in a loop or branch or depends on its own output.
        recurrent: The paths of layers whose calls depend on their own output.
        looping: The paths of layers in loops that feed themselves.
        random: Whether the network draws random numbers.
        by_batch: The paths of layers that inference normalizes by the batch.
        not_nan: The positions of the inputs where NaN is an error.
    """

    levels: dict[str, int] | None = None
    recurrent: frozenset[str] = frozenset()
    looping: frozenset[str] = frozenset()
    random: bool = False
    by_batch: frozenset[str] = frozenset()
    not_nan: Sequence[int] = ()


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


def _either(ours: FixedPoint | None, theirs: FixedPoint | None, method: str) -> FixedPoint | None:
    if ours is None or theirs is None:
        return ours or theirs
    return ours.note(theirs.recurrent)


def _by_site(
    ours: dict[Site, Moments], theirs: dict[Site, Moments], method: str
) -> dict[Site, Moments]:
    both = [site for site in theirs if site in ours]
    merge = functools.partial(moments.merge, method=method)
    merged = moments.together(merge, [(ours[site], theirs[site]) for site in both])
    return {**ours, **theirs, **dict(zip(both, merged, strict=True))}


def _field(merge: Callable[[Any, Any, str], Any], default: Any) -> Any:
    """Create a field of `SweepState` with the function that merges it from two shards."""
    return dataclasses.field(default=default, metadata={"merge": merge})


@dataclasses.dataclass(frozen=True)
class SweepState:
    """A sweep between two batches, over one shard of the data or several merged ones.

    Attributes:
        method: The name of the method, see `tfbn.sweep.options`.
        fingerprint: Digest of the weights, see `tfbn.models.fingerprints.fingerprint`.
        paths: The layers to sweep.
        fixed_point: The passes in place of levels, if the network cannot be cut.
        level: The current level, or the number of the pass, from 1.
        settled: Site -> moments of the levels before, or of the pass before.
        first: `samples`, `data` and `keys` of level 1; `None` at level 1.
        complete: Whether all levels are done.
        levels: Path -> level of every layer in the traces so far.
        by_batch: The paths of the layers that inference normalizes by the batch.
        random: Whether the passes require the same batches, because the network draws random
            numbers, seeded by the keys of the batches, or normalizes by the batch.
        samples: Number of samples of this level so far.
        batches: Number of batches of this level so far.
        batch_size: Size of the largest batch.
        data: Sum of the digests of these samples, independent of order and batches.
        keys: Sum of the keys of these batches.
        moments: Site -> moments of this level.
    """

    method: str = _field(_equal, "exact")
    fingerprint: str = _field(_equal, "")
    paths: tuple[str, ...] = _field(_equal, ())
    fixed_point: FixedPoint | None = dataclasses.field(default=None, metadata={"merge": _either})
    level: int = _field(_equal, 1)
    settled: dict[Site, Moments] = dataclasses.field(
        default_factory=dict, metadata={"merge": _equal}
    )
    first: tuple[int, int, int] | None = _field(_equal, None)
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

    def add(self, batch: Batch, site_moments: Iterable[tuple[Site, Moments]]) -> "SweepState":
        """Return the state with one more batch.

        Args:
            batch: The `tfbn.sweep.batches.Batch`.
            site_moments: (site, moments) of the calls observed in the batch.
        """
        by_site: dict[Site, Moments] = {}
        for site, of_call in site_moments:  # A loop has several moments for one site.
            before = by_site.get(site)
            merge = functools.partial(moments.merge_one_batch, method=self.method)
            by_site[site] = of_call if before is None else merge(before, of_call)
        return dataclasses.replace(
            self,
            samples=self.samples + batch.samples,
            batches=self.batches + 1,
            batch_size=max(self.batch_size, batch.samples),
            data=_sum_of_digests(self.data, batch.data, self.method),
            keys=_sum_of_digests(self.keys, batch.key, self.method),
            moments=_by_site(self.moments, by_site, self.method),
        )

    def note(self, facts: NetworkFacts) -> "SweepState":
        """Return the state with the facts of one more trace, which may switch to uncut passes."""
        fixed_point, levels = self.fixed_point, self.levels
        if fixed_point is not None:
            fixed_point = fixed_point.note(facts.recurrent)
        elif METHODS[self.method].by_level:
            if facts.levels is None or _disagree(levels, facts.levels):
                fixed_point = FixedPoint()
            else:
                levels = levels | facts.levels
        return dataclasses.replace(
            self,
            fixed_point=fixed_point,
            levels=levels,
            random=self.random or facts.random or bool(facts.by_batch),
            by_batch=_union_of_paths(self.by_batch, facts.by_batch, self.method),
        )

    def turned_uncut(self, begin: "SweepState") -> bool:
        """Return whether a level that began at `begin` has switched to uncut passes."""
        return self.fixed_point is not None and begin.fixed_point is None

    def without_batches(self) -> "SweepState":
        """Return the state at the beginning of its level."""
        zero = dict.fromkeys(("samples", "batches", "batch_size", "data", "keys"), 0)
        nothing: dict[str, Any] = {**zero, "moments": {}, "levels": {}}
        return dataclasses.replace(self, **nothing)

    def uncut(self) -> "SweepState":
        """Return the first state of a sweep by passes over the whole network."""
        return SweepState(self.method, self.fingerprint, self.paths, FixedPoint())

    def merge(self, other: "SweepState") -> "SweepState":
        """Merge the states of two shards.

        Raises:
            ValueError: If the states belong to different levels or sweeps.
        """
        self._check_same_sweep(other)
        merged = {
            field.name: field.metadata["merge"](
                getattr(self, field.name), getattr(other, field.name), self.method
            )
            for field in dataclasses.fields(self)
        }
        if _disagree(self.levels, other.levels):
            merged["fixed_point"] = merged["fixed_point"] or FixedPoint()
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
                    f"Expected shards of one sweep. Received: {name} {ours!r} and {theirs!r}. "
                    f"{advice}"
                )
        if self.settled is not other.settled and not _same_moments(self.settled, other.settled):
            raise ValueError(
                "Expected shards of one sweep. Received: shards with different earlier levels."
            )

    @functools.cached_property
    def layers(self) -> dict[str, Moments]:
        """Path -> moments of all calls of a layer of a settled level."""
        return _by_path(self.settled, self.method)

    @property
    def populations(self) -> dict[Any, Moments]:
        """Path, or site if calls differ -> the moments that calls normalize with.

        All calls of a layer share one mean and variance, as in inference.
        """
        if self.fixed_point is None:
            return self.layers
        return self.fixed_point.populations(self.settled, self.layers)

    def advance(self, reached: "SweepState") -> "SweepState":
        """Return the next state, after a level that began at this state.

        Args:
            reached: The state after all batches of the level.

        Returns:
            The next level, or the complete state after the last. If the network cannot be cut at
            its levels, the first state of a sweep by passes over the whole network.

        Raises:
            ValueError: For empty data, or other data than at the first level.
        """
        if reached.turned_uncut(self):
            return reached.uncut()
        if not reached.batches:
            raise empty()
        return reached.next_level()

    def next_level(self) -> "SweepState":
        """Return the state at the beginning of the next level, or the complete state.

        Raises:
            ValueError: If the data differs from the first level; if the passes of a network that
                cannot be cut do not converge.
        """
        swept = self.samples, self.data, self.keys
        if self.first is not None:
            _check_same_data(self.first, swept, self.random)
        settled, fixed_point = self.settled | self.moments, self.fixed_point
        complete = self.level >= max(self.levels.values(), default=0)
        if fixed_point is not None:
            settled, fixed_point = fixed_point.after_pass(self)
            complete = fixed_point is None
        after = dataclasses.replace(self, settled=settled, complete=complete, first=swept)
        if complete:
            return after
        begin = dataclasses.replace(after.without_batches(), levels=self.levels)
        return dataclasses.replace(begin, level=self.level + 1, fixed_point=fixed_point)

    def statistics(self) -> dict[str, LayerStats]:
        """Return path -> `LayerStats` of the layers of all settled levels."""
        calls: dict[str, list[Moments]] = {}
        for site, of_site in self.settled.items():
            calls.setdefault(site.path, []).append(of_site)
        return {path: layer_stats.of_calls(each, self.method) for path, each in calls.items()}


def merge_shards(states: Iterable[SweepState], begin: SweepState) -> SweepState:
    """Merge the states of several shards after one level; `begin` if no shard has a batch.

    Args:
        states: The states of the shards.
        begin: The `SweepState` at the beginning of the level.
    """
    # The paths of an empty shard include layers that training does not call.
    filled = [state for state in states if state.batches or state.turned_uncut(begin)]
    shards = [dataclasses.replace(state, settled=begin.settled) for state in filled]
    return functools.reduce(SweepState.merge, shards) if shards else begin


def _check_same_data(first: Sequence[int], now: Sequence[int], random: bool) -> None:
    if first[:2] != now[:2]:
        raise ValueError(
            f"Expected the same data in every pass. Received: other data ({first[0]} samples then, "
            f"{now[0]} now), as from augmentation, or padding to the longest sample of a shuffled "
            "batch. Raise `memory_limit` to read it once; shuffle with "
            "reshuffle_each_iteration=False; seed the augmentation; or use method='pooled'."
        )
    if random and first != now:
        raise ValueError(
            "Expected the same batches in every pass, because inference draws random numbers or "
            "normalizes by the batch. Received: the same data in other batches. Raise "
            "`memory_limit`, do not shuffle, or use method='pooled'."
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


def _disagree(ours: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Return whether two traces differ in the level of a layer."""
    return any(theirs.get(path, level) != level for path, level in ours.items())
