"""`PopulationStats`: the result of a sweep, and all that is done with it."""

import collections.abc
import dataclasses
import html
import os
from typing import Any

import keras
import numpy as np

from tfbn import arguments
from tfbn.files import atomic
from tfbn.layer import sweep_records
from tfbn.layer.sweep_records import SweepRecord
from tfbn.models import assignment, fingerprints, keras_models
from tfbn.stats import blending, drift, layer_stats, stats_file, summary
from tfbn.stats.layer_stats import LayerStats

_METHODS = ("exact", "pooled", "algorithm2", "assigned")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PopulationStats(collections.abc.Mapping):
    """Population statistics of a model: a mapping from layer path to `LayerStats`.

    It comes from `tfbn.collect`, is never changed, and knows nothing of the model it was
    collected from but the paths of its batch norm layers and a fingerprint of its
    weights.

    Attributes:
        method: `"exact"`, `"pooled"`, `"algorithm2"`, or `"assigned"` for statistics that
            were read from a model and not swept.
        samples: Number of samples (entries of the batch axis of the model's inputs).
        batches: Number of batches they came in.
        batch_size: Size of the largest of these batches, in samples.
        fingerprint: A digest of the weights during the sweep, see `mismatch`; `""` if not known.
        previous: The `PopulationStats` that the model held when it was swept, or `None`.
        levels: Number of levels of batch norm layers that were swept one after the other; 1 for
            methods that take one pass.
        population_size: Number of samples in the population that the errors of the layers are
            about, where the sweep drew its samples from one at random: they then have the factor
            sqrt(1 - samples / population_size) and are 0 if all were drawn. 0 where it took the
            data as it came: the errors are then about the source of that data, however large.
        tolerance: The `tolerance` that was asked for, or `None`.
        prior_samples: Number of samples that a blended source counts for, see `blend`; 0 without.
    """

    layers: dataclasses.InitVar[collections.abc.Mapping[str, LayerStats]]
    method: str = dataclasses.field(kw_only=True)
    samples: int = dataclasses.field(default=0, kw_only=True)
    batches: int = dataclasses.field(default=0, kw_only=True)
    batch_size: int = dataclasses.field(default=0, kw_only=True)
    fingerprint: str = dataclasses.field(default="", kw_only=True)
    previous: "PopulationStats | None" = dataclasses.field(default=None, kw_only=True)
    levels: int = dataclasses.field(default=1, kw_only=True)
    population_size: int = dataclasses.field(default=0, kw_only=True)
    tolerance: float | None = dataclasses.field(default=None, kw_only=True)
    prior_samples: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self, layers: collections.abc.Mapping[str, LayerStats]):
        if self.method not in _METHODS:
            raise ValueError(f"Expected one of the methods {_METHODS}. Received: {self.method!r}.")
        if not isinstance(self.fingerprint, str):
            raise ValueError(
                f"Expected fingerprint to be a string. Received: {self.fingerprint!r}."
            )
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
        """Everything but the layers and `previous`, by name: what a file and a report hold."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "previous")
        return {name: getattr(self, name) for name in names}

    def replace(self, **changes: Any) -> "PopulationStats":
        """These statistics with some of the arguments of the class changed."""
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
        """The table of `summary`, for notebooks."""
        title, head, rows = summary.table(self)
        return f"<p>{html.escape(title)}</p>\n{drift.html_table(head, rows)}"

    @classmethod
    def read(
        cls, model: keras.Model, include_frozen: bool = True, fingerprint: bool = True
    ) -> "PopulationStats":
        """The statistics that a model's batch norm layers hold now, in full precision.

        `method` is `"assigned"` and every count 0: no model tells the data of its moving averages.

        Args:
            model: A built model.
            include_frozen: Whether to read layers with `trainable=False` too.
            fingerprint: Whether to take the fingerprint of the weights, which reads all of them.
        """
        layers = {
            path: assignment.from_layer(layer)
            for path, layer in keras_models.batch_norm_layers(model).items()
            if include_frozen or layer.trainable
        }
        known = fingerprints.fingerprint(model) if fingerprint else ""
        return cls(layers, method="assigned", fingerprint=known)

    def assign(self, model: keras.Model) -> "PopulationStats":
        """Set the inference statistics of a model's batch norm layers to these.

        `moving_mean` becomes the mean and `moving_variance` the variance. With `renorm=True`,
        `renorm_mean` becomes the mean too, and `moving_stddev` and `renorm_stddev` become
        sqrt(variance + epsilon), as Keras defines them. All layers are checked before the first is
        written, and all are put back if writing is interrupted.

        Args:
            model: The model that was swept, or one of the same architecture, where counters in
                automatic names may differ. It must have every layer of these statistics; its other
                layers (frozen ones, say) are left alone.

        Returns:
            The `PopulationStats` before: `previous.assign(model)` undoes it to the bit.

        Raises:
            ValueError: If a layer is missing or a shape differs (the first difference is named), if
                a value is not finite in the dtype of the variable, if a variance is negative, or if
                a layer had no values; the model is then unchanged. Statistics that were read from a
                model may be anything, and are put back as they were.
        """
        if self.method != "assigned":
            layer_stats.require_possible(self)
            layer_stats.require_values(self)
        layers = assignment.matching_layers(model, self)
        writes = [
            write
            for path, stats in self.items()
            for write in assignment.assignments(path, stats, layers[path])
        ]
        previous = PopulationStats(
            {path: assignment.from_layer(layers[path]) for path in self}, method="assigned"
        )
        with keras_models.restored_on_error(model, [variable for variable, _ in writes]):
            for variable, value in writes:
                variable.assign(value)
        sweep_records.delete(layers.values())
        if self.method != "assigned":
            weights = fingerprints.digests_of(model, self.fingerprint)
            if weights is not None:
                weights |= {digest for _, digest in fingerprints.digests_of_statistics(model)}
            for path, layer in layers.items():
                sweep_records.store(layer, SweepRecord(self, path, weights))
        return previous

    def mismatch(self, model: keras.Model) -> str | None:
        """Why these are not the population statistics of a model as it is now, in words.

        Returns:
            `None` if the model's weights are those of the sweep and its layers hold the
            statistics that the sweep found; else a phrase that names the difference.
        """
        difference = assignment.mismatch(model, self)
        if difference is not None:
            return difference
        if not self.fingerprint:
            return "it is not known with which weights the sweep was"
        # Last, because it reads all weights.
        if fingerprints.fingerprint(model) != self.fingerprint:
            return "the weights have changed since the sweep"
        return None

    def merge(self, other: "PopulationStats") -> "PopulationStats":
        """The statistics of two sweeps over different data, as of one sweep over both.

        Counts add up, means are weighted by count, and variances follow the method, see
        `tfbn.stats.moments.merge`. Associative and commutative up to rounding. A channel without
        values changes nothing, whatever its mean and variance are.

        Raises:
            ValueError: If method, layers, shapes or the swept weights differ, or if a value is
                one that no data has. Also for `"exact"`: exact statistics of parts do not
                determine those of the whole, because deeper layers were normalised with the
                part's own statistics.
        """
        if not isinstance(other, PopulationStats):
            raise ValueError(f"Expected PopulationStats to merge. Received: {type(other)}.")
        if self.method != other.method or self.method not in ("pooled", "algorithm2"):
            raise ValueError(
                "Expected two sweeps with method='pooled' or two with 'algorithm2'. Received: "
                f"{self.method!r} and {other.method!r}. For 'exact', sweep all shards together "
                "with tfbn.collect_shards; statistics of other kinds cannot be merged."
            )
        if self.prior_samples or other.prior_samples:
            raise ValueError(
                "Expected two sweeps that are not blended yet. Received: prior samples "
                f"{self.prior_samples} and {other.prior_samples}. Merge first, and blend the whole."
            )
        layer_stats.require_same_layers(self, other)
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                "Expected two sweeps of the same weights. Received: fingerprints "
                f"{self.fingerprint[:12]!r} and {other.fingerprint[:12]!r}. Collect both with "
                "the same weights."
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
        """These with the size of their population, and with errors about that alone."""
        if self.population_size:
            return self
        if self.tolerance is not None:
            raise ValueError(
                "Expected samples of data of a known size. Received: a sample of a stream, which "
                "stands for any number of samples. Sweep all of it, without `tolerance`."
            )
        layers = {p: s.with_errors(0 * s.mean, 0 * s.variance) for p, s in self.items()}
        return self.replace(layers=layers, population_size=self.samples)

    def blend(self, source: "PopulationStats", *, samples: int) -> "PopulationStats":
        """These statistics of few samples, blended with those of the source.

        With n = `self.samples` and N = `samples`, for every channel of every layer

            mean     = N / (N + n) mean_source     + n / (N + n) mean_these
            variance = N / (N + n) variance_source + n / (N + n) variance_these

        as if the source had been seen N times more: N = 0 gives these statistics, and a large N
        the source's. It is Schneider et al. (2020), section 3,
        https://arxiv.org/abs/2006.16971. The variance is this plain weighted average, not the
        variance of the two populations put together, which the law of total variance would make
        larger by N n / (N + n)^2 (mean_source - mean_these)^2: the aim is an estimate of the
        field's own variance, not of a mixture's.

        It is insurance, and has its price. Take N = 0 where a monitor says that the
        data has moved, or from 16 samples on, and N = 4 for fewer samples of data that may not have
        moved: `tfbn.stats.blending` has the measurements.

        Args:
            source: Statistics of the data that the model was trained on, or of what it held
                before: `stats.previous`. Its layers may be more than these.
            samples: N, a whole number of samples.

        Returns:
            A `PopulationStats` of the layers, counts, samples and method of these, with
            `prior_samples` N. It is assigned, undone, saved and exported like any other.

        Raises:
            ValueError: If these are not from a sweep or are blended already, if the source is of
                other weights or layers, or if it has a mean or variance that no data has.
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
        """How far `other` is from these statistics, layer by layer, worst first.

        Returns:
            A dict from layer path to a dict of floats. With delta the difference of the
            means in units of this standard deviation, sqrt(variance): `mean_shift` is the
            root mean square of delta over channels and `mean_shift_max` its largest absolute
            value; with r the other standard deviation over this one, `std_ratio` is the
            geometric mean of r over channels, and `std_ratio_max` the largest factor
            max(r, 1 / r). Variances under the smallest normal float32 count as that.

        Raises:
            ValueError: If the layers or their shapes differ.
        """
        layer_stats.require_same_layers(self, other)
        return drift.of_layers(self, other)

    @property
    def relative_error(self) -> float:
        """The largest `LayerStats.relative_error`; NaN if one is not known."""
        return float(np.max([stats.relative_error for stats in self.values()], initial=0.0))

    def to_dict(self) -> dict[str, Any]:
        """All but `previous`, as plain numbers, lists and strings that `json.dumps` takes."""
        return summary.as_dict(self)

    def summary(self, print_fn: collections.abc.Callable[[str], Any] | None = None) -> None:
        """Print a table of the layers, those whose moving averages were furthest off first.

        Columns: values per channel; how far the statistics that the model held before were off,
        `mean_shift` and `std_ratio` of `compare`; and the standard error of the worst channel,
        `LayerStats.relative_error`. Of more than 40 layers the middle ones are left out; `compare`
        and `to_dict` have all.

        Args:
            print_fn: Called with each line instead of `print`.
        """
        print_fn = print_fn or print
        title, head, rows = summary.table(self)
        for line in [title, *drift.table(head, rows)]:
            print_fn(line)

    def save(self, path: str | os.PathLike) -> None:
        """Write one file (safetensors), whole or not at all.

        The file is written beside its final name, flushed to disk and renamed over it, so
        that a crash or a full disk leaves either the old file or the new one. A checksum is
        over all of it.

        Args:
            path: File name. It is used as it is; `.safetensors` is customary.

        Raises:
            OSError: If it cannot be written.
            ValueError: If there is something under that name that is not a file.
        """
        atomic.write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PopulationStats":
        """Read a file written by `save`.

        Nothing in it is executed, and it takes no more memory than twice the bytes of the file,
        and at most 100 MiB.

        Raises:
            OSError: If there is no such file.
            ValueError: If the file is damaged or is not such a file, or has statistics that no
                data has.
        """
        content = atomic.read(path)
        try:
            return cls._unpacked(content)
        except ValueError as error:
            raise ValueError(
                "Expected a file written by PopulationStats.save. "
                f"Received: {os.fsdecode(path)!r}, which is damaged or another kind of file "
                f"({error}). Collect the statistics again."
            ) from error

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes, for those who send it elsewhere."""
        return stats_file.pack(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> "PopulationStats":
        """Read the bytes of `to_bytes`. See `load`.

        Raises:
            ValueError: If it is damaged or something else, or has statistics that no data has.
        """
        try:
            return cls._unpacked(content)
        except ValueError as error:
            raise ValueError(
                f"Expected the bytes that PopulationStats.to_bytes gave. Received: {len(content)} "
                f"bytes that are not ({error})."
            ) from error

    @classmethod
    def _unpacked(cls, content):
        try:
            names = {field.name for field in dataclasses.fields(cls)} - {"previous"}
            found, previous = stats_file.unpack(content, names)
            stats = cls(previous=None if previous is None else cls(**previous), **found)
            if stats.method != "assigned":
                layer_stats.require_possible(stats)
        except ValueError as error:
            # A name in the file may have any length.
            raise ValueError(str(error)[:300]) from error
        return stats
