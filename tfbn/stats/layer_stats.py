"""`LayerStats`: the statistics of one batch norm layer."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfbn.stats import blending, moments
from tfbn.stats.methods import METHODS

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
ERRORS = ("mean_error", "variance_error")

# Largest count: float64 represents all integers up to it, so sums of counts are exact.
_MOST = 2**53


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStats:
    """The statistics of one batch norm layer. The arrays are read-only copies.

    Attributes:
        count: Number of values per channel: samples times positions, without masked ones; the
            smallest of them if a mask differs between channels. 0 if unknown. Passed as an int,
            or as an array of shape `(channels,)`.
        mean: Mean per channel, float64, shape `(channels,)`.
        variance: Population variance per channel (divided by `count`; with
            `"algorithm2"` the average of unbiased batch variances), same shape.
        renorm: With `renorm=True`, the values of `moving_stddev`, `renorm_mean` and
            `renorm_stddev` that were read from a layer. `None` for swept statistics, which
            determine them by mean and variance.
        mean_error: Standard error of the mean per channel, same shape, as an estimate for the
            source of the samples, see `tfbn.PopulationStats.population_size`. Computed from the
            spread between batches (see `tfbn.stats.moments`), which requires independent batches,
            not values. NaN with fewer than two batches, and for statistics read from a model.
            For layers behind others, an `"exact"` sweep without `tolerance` overestimates the
            error of the mean: the layers before them normalize with the statistics of the same
            samples, which removes the part that samples share.
        variance_error: Standard error of the variance.
        counts: `count` of every channel, int64, shape `(channels,)`.

    Raises:
        ValueError: If shapes do not match, or a count is not an integer from 0 to 2**53.
            Mean and variance may be any numbers, because a broken model may hold any.
    """

    count: int | np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    renorm: dict[str, np.ndarray] | None = None
    mean_error: np.ndarray = None  # type: ignore[assignment]  # Made NaN below.
    variance_error: np.ndarray = None  # type: ignore[assignment]
    counts: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        given = {"mean": self.mean, "variance": self.variance, **(self.renorm or {})}
        given |= {name: error for name, error in self.errors.items() if error is not None}
        shape = np.shape(self.mean)
        for name, value in given.items():  # Validate before copying: files may be hostile.
            if np.shape(value) != shape or len(shape) != 1 or not shape[0]:
                raise ValueError(
                    f"Expected arrays of shape (channels,). Received: {name} of shape "
                    f"{np.shape(value)}, mean of shape {shape}."
                )
        arrays = dict.fromkeys(ERRORS, np.broadcast_to(np.nan, shape))
        arrays |= {name: _read_only(value, np.float64) for name, value in given.items()}
        if self.renorm is not None and set(self.renorm) != set(RENORM):
            raise ValueError(f"Expected renorm with {RENORM}. Received: {list(self.renorm)}.")
        counts = _counts(self.count, shape)
        fields: dict[str, Any] = {"count": int(counts.min()), "counts": counts, **arrays}
        fields["renorm"] = self.renorm and {name: fields.pop(name) for name in RENORM}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Return whether the two hold the same numbers, to the bit."""
        if not isinstance(other, LayerStats):
            return NotImplemented
        return _bits(self) == _bits(other)

    __hash__ = None  # type: ignore[assignment]

    def impossible(self, where_counted: bool = False) -> str | None:
        """Return a phrase for the first value that no data can have, or `None`.

        Args:
            where_counted: Skip channels with count 0.
        """
        for name, value in {"mean": self.mean, "variance": self.variance, **self.errors}.items():
            bad = np.isinf(value) if name in ERRORS else ~np.isfinite(value)
            if name != "mean":
                bad |= value < 0
            if where_counted:
                bad &= self.counts > 0
            if bad.any():
                channel = int(np.argmax(bad))
                return f"{name} {value[channel]} in channel {channel}"
        return None

    def merge(
        self, other: "LayerStats", method: str, weights: tuple[float, float] = (1.0, 1.0)
    ) -> "LayerStats":
        """Return the statistics of both data sets together, see `tfbn.stats.moments.merge`.

        Args:
            other: Statistics of other data.
            method: The name of the method.
            weights: Weight of each value of these, and of the other statistics.
        """
        if not other.counts.any():
            return self  # To the bit.
        if not self.counts.any():
            return other
        pairs = list(zip((self, other), weights, strict=True))
        ours, theirs = (part._moments(weight) for part, weight in pairs)
        both = moments.merge(ours, theirs, method=method)
        merged = LayerStats(self.counts + other.counts, both.mean, moments.variance(both))
        # Different data: independent errors.
        squares = [
            np.square(part.errors_in(merged, method, weight * part.counts / both.count))
            for part, weight in pairs
        ]
        return merged.with_errors(*np.sqrt(np.sum(squares, axis=0)))

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """Name -> standard errors."""
        return {name: getattr(self, name) for name in ERRORS}

    def with_errors(self, mean_error: np.ndarray, variance_error: np.ndarray) -> "LayerStats":
        """Return a copy with other standard errors."""
        return LayerStats(
            self.counts, self.mean, self.variance, self.renorm, mean_error, variance_error
        )

    def errors_in(
        self, whole: "LayerStats", method: str, share: np.ndarray | None = None
    ) -> np.ndarray:
        """Compute what the standard errors of a part contribute to the errors of the whole.

        With w the `share` of the part, by default its share of the count: w mean_error, and
        w (variance_error + 2 |mean - mean of the whole| mean_error), an upper bound for any
        correlation of mean and variance; for `"algorithm2"` without the second term.
        """
        if share is None:
            share = self.counts / np.maximum(whole.counts, 1)
        distance = 0.0 if METHODS[method].averages_variances else 2 * np.abs(self.mean - whole.mean)
        errors = np.stack([self.mean_error, self.variance_error + distance * self.mean_error])
        return np.where(self.counts > 0, share * errors, 0.0)

    @property
    def relative_error(self) -> float:
        """The larger relative error of mean and standard deviation, in the worst channel.

        The largest of mean_error / sqrt(variance), and of variance_error / (2 variance), the
        relative error of the standard deviation, over all channels with values that vary. 0 for
        a channel whose errors are 0; NaN if any error is unknown.
        """
        varied = (self.counts > 0) & ~self.constant
        errors = np.stack([self.mean_error, self.variance_error])[:, varied]
        variance = self.variance[varied]
        relative = errors / np.stack([np.sqrt(variance), 2 * variance])
        return float(np.max(relative, initial=0.0))

    @property
    def constant(self) -> np.ndarray:
        """Boolean array: whether all values of a channel were equal, up to rounding in float32."""
        return self.variance <= 1e-12 * np.square(self.mean)

    def blend(self, source: "LayerStats", samples: int, field_samples: int) -> "LayerStats":
        """Return a weighted average with the statistics of a source, see `PopulationStats.blend`.

        Args:
            source: The statistics of the same layer over the source.
            samples: N, the number of samples that the source counts for.
            field_samples: n, the number of samples behind these statistics. (`count` is the
                number of values: samples times positions.)

        Returns:
            Mean and variance N / (N + n) source + n / (N + n) self, with the count of `self`, and
            n / (N + n) of its standard errors, as for a source without error.

        Raises:
            ValueError: If the shapes differ, if a number is not an integer, or if the source has
                a mean or variance that is not finite, or a negative variance.
        """
        share = blending.share(samples, field_samples)
        require_same_shape("of both", self, source)
        impossible = source.impossible()
        if impossible is not None:
            raise ValueError(
                f"Expected finite statistics as source. Received: {impossible}. Sweep it again."
            )
        blended = LayerStats(self.counts, *blending.weighted(self, source, share))
        return blended.with_errors(*((1 - share) * error for error in self.errors.values()))

    def _moments(self, weight: float) -> moments.Moments:
        count = weight * self.counts
        return moments.of_values(count, self.mean, self.variance * count)


def of_calls(calls: list[moments.Moments], method: str) -> LayerStats:
    """Compute the statistics of a layer from the moments of its calls.

    Calls on one batch depend on each other in an unknown way, so the standard errors are upper
    bounds: the sums over the calls.
    """
    each = [
        LayerStats(
            call.count, call.mean, moments.variance(call), None, *moments.standard_errors(call)
        )
        for call in calls
    ]
    if len(each) == 1:
        return each[0]
    merge = functools.partial(moments.merge, method=method)
    together = functools.reduce(merge, calls)
    whole = LayerStats(together.count, together.mean, moments.variance(together))
    mean_error, variance_error = functools.reduce(
        np.add, [call.errors_in(whole, method) for call in each]
    )
    return whole.with_errors(mean_error, variance_error)


def checked(layers: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """Return a validated copy of a mapping from path to `LayerStats`; raise `ValueError` if not."""
    layers = dict(layers)
    for path, stats in layers.items():
        if not isinstance(path, str) or not isinstance(stats, LayerStats):
            raise ValueError(
                f"Expected LayerStats by path. Received: {type(stats)} under {path!r}."
            )
    return layers


def require_possible(layers: Mapping[str, LayerStats], where_counted: bool = False) -> None:
    """Raise `ValueError` for impossible statistics, see `LayerStats.impossible`."""
    for path, stats in layers.items():
        why = stats.impossible(where_counted)
        if why is not None:
            raise ValueError(
                f"Expected finite means and variances >= 0. Received: {why} of layer {path!r}. "
                "Look for NaN, Inf or large values in the data."
            )


def require_values(layers: Mapping[str, LayerStats]) -> None:
    """Raise `ValueError` if a layer has no values."""
    for path, stats in layers.items():
        if not stats.counts.any():
            raise ValueError(
                f"Expected values for layer {path!r}. Received: none or masked ones. Check masks."
            )


def require_same_layers(a: Mapping[str, LayerStats], b: Mapping[str, LayerStats]) -> None:
    """Raise `ValueError` unless the two have the same layers, in order, of the same shapes."""
    for ours, theirs in itertools.zip_longest(a, b):
        if ours != theirs:
            raise ValueError(
                f"Expected the same layers. Received: {ours!r} and {theirs!r}, of different models."
            )
    for path in a:
        require_same_shape(path, a[path], b[path])


def require_same_shape(path: str, ours: LayerStats, theirs: LayerStats) -> None:
    """Raise `ValueError` unless the two have the same number of channels."""
    a, b = ours.mean.shape, theirs.mean.shape
    if a != b:
        raise ValueError(
            f"Expected the same shapes. Received: {a} and {b} for layer {path!r}, of two models."
        )


def _read_only(value: Any, dtype: type) -> np.ndarray:
    value = np.array(value, dtype)
    value.flags.writeable = False
    return value


def _counts(count: Any, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.asarray(count)
    fits = numbers.dtype.kind in "iuf" and numbers.shape in ((), shape)
    if not fits or not np.all((numbers >= 0) & (numbers <= _MOST) & (numbers == np.floor(numbers))):
        raise ValueError(
            f"Expected count from 0 to 2**53, one integer or {shape[0]}. Received: {count}."
        )
    return np.broadcast_to(_read_only(numbers, np.int64), shape)


def _bits(stats: LayerStats) -> list[bytes]:
    arrays = [stats.counts, stats.mean, stats.variance, stats.mean_error, stats.variance_error]
    arrays += (stats.renorm or {}).values()
    return [array.tobytes() for array in arrays]
