"""`PopulationStats`: the statistics of all layers, from a sweep or from a model."""

import collections.abc
import dataclasses
import html
import os
from typing import Any

import keras
import numpy as np

from tfbn import arguments
from tfbn.files import atomic
from tfbn.models import assignment, fingerprints, keras_models, staleness
from tfbn.stats import blending, drift, layer_stats, stats_file, summary
from tfbn.stats.layer_stats import LayerStats
from tfbn.stats.methods import METHODS

_METHODS = (*METHODS, "assigned")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PopulationStats(collections.abc.Mapping):
    """Population statistics of a model: a mapping from layer path to `LayerStats`.

    Returned by `tfbn.collect`. It is immutable, and stores no model, only the paths of its batch
    norm layers and a fingerprint of its weights.

    Attributes:
        method: `"exact"`, `"pooled"`, `"algorithm2"`, or `"assigned"` for statistics that
            were read from a model.
        samples: Number of samples (entries of the batch axis of the model's inputs).
        batches: Number of batches.
        batch_size: Size of the largest batch, in samples.
        fingerprint: A digest of the weights during the sweep, see `mismatch`; `""` if unknown.
        previous: The `PopulationStats` that the model held when it was swept, or `None`.
        levels: Number of levels of batch norm layers that were swept in order; 1 for one-pass
            methods.
        population_size: Number of samples from which a sweep drew its samples at random. The
            errors of the layers then refer to these, and have the factor
            sqrt(1 - samples / population_size). 0 for data swept in its order: the errors then
            refer to the source of the data, of any size.
        tolerance: The requested `tolerance`, or `None`.
        prior_samples: Number of samples that a blended source counts for, see `blend`; 0 without
            a source.
    """

    layers: dataclasses.InitVar[collections.abc.Mapping[str, LayerStats]]
    _: dataclasses.KW_ONLY
    method: str
    samples: int = 0
    batches: int = 0
    batch_size: int = 0
    fingerprint: str = ""
    previous: "PopulationStats | None" = None
    levels: int = 1
    population_size: int = 0
    tolerance: float | None = None
    prior_samples: int = 0
    _layers: dict[str, LayerStats] = dataclasses.field(init=False)

    def __post_init__(self, layers: collections.abc.Mapping[str, LayerStats]) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"Expected one of the methods {_METHODS}. Received: {self.method!r}.")
        if not isinstance(self.fingerprint, str):
            raise ValueError(f"Expected a string as fingerprint. Received: {self.fingerprint!r}.")
        for field in dataclasses.fields(self):
            if field.type is int:
                number = arguments.integer(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, number)
        object.__setattr__(self, "tolerance", arguments.tolerance(self.tolerance))
        object.__setattr__(self, "_layers", layer_stats.checked(layers))
        for path, before in ({} if self.previous is None else self.previous).items():
            if path in self._layers:
                layer_stats.require_same_shape(path, self[path], before)

    @property
    def attributes(self) -> dict[str, Any]:
        """Name -> value of all fields but the layers and `previous`, for files and reports."""
        return {name: getattr(self, name) for name in _attributes()}

    def replace(self, **changes: Any) -> "PopulationStats":
        """Return a copy with some arguments of the class replaced."""
        kept = {"layers": self, "previous": self.previous, **self.attributes}
        return PopulationStats(**(kept | changes))

    def __getitem__(self, path: str) -> LayerStats:
        return self._layers[path]

    def __iter__(self):
        return iter(self._layers)

    def __len__(self):
        return len(self._layers)

    def __repr__(self):
        if self.method == "assigned":
            return f"<PopulationStats layers={len(self)}, as the model held them, not swept>"
        return (
            f"<PopulationStats method={self.method!r} layers={len(self)} "
            f"samples={self.samples} batches={self.batches}>"
        )

    def _repr_html_(self) -> str:
        """Return the table of `summary`, for notebooks."""
        title, head, rows = summary.table(self)
        return f"<p>{html.escape(title)}</p>\n{drift.html_table(head, rows)}"

    @classmethod
    def read(
        cls, model: keras.Model, include_frozen: bool = True, fingerprint: bool = True
    ) -> "PopulationStats":
        """Return the current statistics of a model's batch norm layers, in full precision.

        `method` is `"assigned"` and every count 0, because the data is unknown.

        Args:
            model: A built model.
            include_frozen: Whether to read layers with `trainable=False` too.
            fingerprint: Whether to compute the fingerprint of the weights, which reads all of them.
        """
        layers = {
            path: assignment.from_layer(layer)
            for path, layer in keras_models.batch_norm_layers(model).items()
            if include_frozen or layer.trainable
        }
        known = fingerprints.fingerprint(model) if fingerprint else ""
        return cls(layers, method="assigned", fingerprint=known)

    def assign(self, model: keras.Model) -> "PopulationStats":
        """Store these statistics in the batch norm layers of a model.

        `moving_mean` becomes the mean and `moving_variance` the variance. With `renorm=True`,
        `renorm_mean` becomes the mean too, and `moving_stddev` and `renorm_stddev` become
        sqrt(variance + epsilon), as Keras defines them. All layers are validated before the first
        write, and all are restored if writing is interrupted.

        Args:
            model: The swept model, or one of the same architecture; counters in automatic names
                may differ. It must have every layer of these statistics; its other layers (frozen
                ones, say) do not change.

        Returns:
            The `PopulationStats` before: `previous.assign(model)` undoes it to the bit.

        Raises:
            ValueError: If a layer is missing or a shape differs (the error names the first
                difference), if a value is not finite in the dtype of the variable, if a variance
                is negative, or if a layer had no values; the model is then unchanged. Statistics
                read from a model may be any numbers, and are restored unchanged.
        """
        if self.method != "assigned":
            layer_stats.require_possible(self)
            layer_stats.require_values(self)
        before = assignment.assign(model, self)
        staleness.record(model, self)
        return PopulationStats(before, method="assigned")

    def mismatch(self, model: keras.Model) -> str | None:
        """Return why these are not the current population statistics of a model.

        Returns:
            `None` if the model has the weights of the sweep and its layers hold these statistics;
            else a phrase that names the difference.
        """
        return staleness.mismatch(model, self)

    def merge(self, other: "PopulationStats") -> "PopulationStats":
        """Return the statistics of two sweeps over different data, as from one sweep over both.

        Counts add up, means are weighted by count, and variances follow the method, see
        `tfbn.stats.moments.merge`. Associative and commutative up to rounding. A channel without
        values changes nothing; its mean and variance are ignored.

        Raises:
            ValueError: If method, layers, shapes or the swept weights differ, or for impossible
                values. Also for `"exact"`: exact statistics of parts do not determine the
                statistics of the whole, because deeper layers were normalized with the statistics
                of their part.
        """
        if not isinstance(other, PopulationStats):
            raise ValueError(f"Expected PopulationStats to merge. Received: {type(other)}.")
        if (
            self.method != other.method
            or self.method not in METHODS
            or METHODS[self.method].by_level
        ):
            raise ValueError(
                "Expected two sweeps with method='pooled' or two with 'algorithm2'. Received: "
                f"{self.method!r} and {other.method!r}. Use tfbn.collect_shards for 'exact'."
            )
        if self.prior_samples or other.prior_samples:
            raise ValueError(
                "Expected sweeps not blended yet. Received: prior_samples "
                f"{self.prior_samples} and {other.prior_samples}. Merge first, then blend."
            )
        layer_stats.require_same_layers(self, other)
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                "Expected two sweeps of the same weights. Received: fingerprints "
                f"{self.fingerprint[:12]!r} and {other.fingerprint[:12]!r}. Collect both again."
            )
        for part in (self, other):
            layer_stats.require_possible(part, where_counted=True)
        parts = [self, other]
        sampled = any(part.tolerance is not None or part.population_size for part in parts)
        if sampled:
            parts = [part._of_population() for part in parts]
        weights = [part.population_size / max(part.samples, 1) if sampled else 1 for part in parts]
        ours, theirs = parts
        return PopulationStats(
            {
                path: layer.merge(theirs[path], self.method, tuple(weights))
                for path, layer in ours.items()
            },
            method=self.method,
            samples=self.samples + other.samples,
            batches=self.batches + other.batches,
            batch_size=max(self.batch_size, other.batch_size),
            fingerprint=self.fingerprint,
            previous=other.previous if self.previous is None else self.previous,
            levels=max(self.levels, other.levels),
            population_size=sum(part.population_size for part in parts) if sampled else 0,
        )

    def _of_population(self) -> "PopulationStats":
        """Return these with the size of their population, and with errors that refer to it."""
        if self.population_size:
            return self
        if self.tolerance is not None:
            raise ValueError(
                "Cannot merge a sample of a stream. Sweep all of it, without `tolerance`."
            )
        layers = {p: s.with_errors(0 * s.mean, 0 * s.variance) for p, s in self.items()}
        return self.replace(layers=layers, population_size=self.samples)

    def blend(self, source: "PopulationStats", *, samples: int) -> "PopulationStats":
        """Return a weighted average of these statistics of few samples and the source's.

        With n = `self.samples` and N = `samples`, for every channel of every layer

            mean     = N / (N + n) mean_source     + n / (N + n) mean_these
            variance = N / (N + n) variance_source + n / (N + n) variance_these

        as if N samples of the source had been added: N = 0 returns these statistics, and a large N
        the source's (Schneider et al. 2020, section 3, https://arxiv.org/abs/2006.16971). The
        variance is this plain weighted average. The variance of the mixture of both populations
        would be larger by N n / (N + n)^2 (mean_source - mean_these)^2 (law of total variance),
        but the aim is to estimate the variance of the field, not of a mixture.

        It is insurance, and has a price. Use N = 0 if a monitor reports drift, or with 16 samples
        or more, and N = 4 for fewer samples of data that may not have moved:
        `tfbn.stats.blending` has the measurements.

        Args:
            source: Statistics of the training data, or the statistics that the model held before:
                `stats.previous`. It may have more layers than these.
            samples: N, an integer.

        Returns:
            A `PopulationStats` with the layers, counts, samples and method of these, and
            `prior_samples` N. It can be assigned, undone, saved and exported like any other.

        Raises:
            ValueError: If these are not from a sweep or already blended, if the source has other
                weights or layers, or impossible statistics.
        """
        blending.require_blendable(self, source)
        blended = {}
        for path, stats in self.items():
            layer_stats.require_same_shape(path, stats, source[path])
            try:
                blended[path] = stats.blend(source[path], samples, self.samples)
            except ValueError as error:
                raise ValueError(f"{error} Layer: {path!r}.") from error
        return self.replace(layers=blended, prior_samples=samples)

    def compare(self, other: "PopulationStats") -> dict[str, dict[str, float]]:
        """Compute how far `other` is from these statistics, per layer, worst first.

        Returns:
            A dict from layer path to a dict of floats. With delta the difference of the
            means in units of this standard deviation, sqrt(variance): `mean_shift` is the
            root mean square of delta over channels and `mean_shift_max` its largest absolute
            value; with r the other standard deviation over this one, `std_ratio` is the
            geometric mean of r over channels, and `std_ratio_max` the largest factor
            max(r, 1 / r). Variances are at least the smallest normal float32.

        Raises:
            ValueError: If the layers or their shapes differ.
        """
        layer_stats.require_same_layers(self, other)
        return drift.of_layers(self, other)

    @property
    def relative_error(self) -> float:
        """The largest `LayerStats.relative_error`; NaN if one is unknown."""
        return float(np.max([stats.relative_error for stats in self.values()], initial=0.0))

    def to_dict(self) -> dict[str, Any]:
        """Convert all but `previous` to numbers, lists and strings that `json.dumps` supports."""
        return summary.as_dict(self)

    def summary(self, print_fn: collections.abc.Callable[[str], Any] | None = None) -> None:
        """Print a table of the layers, ordered by the error of their moving averages.

        Columns: values per channel; `mean_shift` and `std_ratio` (see `compare`) of the statistics
        that the model held before; and the standard error of the worst channel,
        `LayerStats.relative_error`. With more than 40 layers the middle ones are omitted;
        `compare` and `to_dict` return all.

        Args:
            print_fn: Called with each line instead of `print`.
        """
        print_fn = print_fn or print
        title, head, rows = summary.table(self)
        for line in [title, *drift.table(head, rows)]:
            print_fn(line)

    def save(self, path: str | os.PathLike) -> None:
        """Write one file (safetensors), whole or not at all.

        A temporary file in the same folder is written, flushed to disk and renamed, so that a
        crash or a full disk leaves either the old file or the new one. The file has a checksum.

        Args:
            path: File name, used unchanged; `.safetensors` is customary.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the path exists and is not a file.
        """
        atomic.write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PopulationStats":
        """Load a file written by `save`.

        Loading executes nothing, and requires at most twice the bytes of the file as memory, and
        at most 100 MiB.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file is damaged or another kind of file, or has impossible
                statistics.
        """
        content = atomic.read(path)
        try:
            return cls._unpacked(content)
        except ValueError as error:
            raise ValueError(
                "Expected a file written by PopulationStats.save. Received: "
                f"{os.fsdecode(path)!r}, which is damaged or another kind of file ({error})."
            ) from error

    def to_bytes(self) -> bytes:
        """Return the content of the file that `save` writes."""
        return stats_file.pack(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> "PopulationStats":
        """Create statistics from the bytes of `to_bytes`, see `load`.

        Raises:
            ValueError: If the bytes are damaged or others, or have impossible statistics.
        """
        try:
            return cls._unpacked(content)
        except ValueError as error:
            raise ValueError(
                f"Expected the bytes of PopulationStats.to_bytes. Received: {len(content)} other "
                f"bytes ({error})."
            ) from error

    @classmethod
    def _unpacked(cls, content):
        try:
            attributes, previous = stats_file.unpack(content, _attributes())
            stats = cls(previous=None if previous is None else cls(**previous), **attributes)
            if stats.method != "assigned":
                layer_stats.require_possible(stats)
        except ValueError as error:
            # A name in the file may have any length.
            raise ValueError(str(error)[:300]) from error
        return stats


def _attributes() -> list[str]:
    """The names of `PopulationStats.attributes`."""
    fields = dataclasses.fields(PopulationStats)
    return [field.name for field in fields if field.init and field.name != "previous"]
