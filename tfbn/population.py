"""`PopulationStats`: what a sweep found, and everything one does with it."""

import collections.abc
import dataclasses
import functools
import io
import json
import os
import pathlib
import tempfile
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfbn import keras_models, moments
from tfbn._version import __version__
from tfbn.keras_models import Site

_FORMAT = 2
_ATTRIBUTES = ("method", "samples", "batches", "batch_size", "fingerprint", "level", "levels")

# What was last assigned to a model, for as long as the model lives. A model has no place
# of its own for it: stock layers and their configs must stay as they are.
_assigned = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStats:
    """The statistics of one batch norm layer.

    Attributes:
        count: Number of values per channel that the statistics were taken from: all
            samples and all positions, less the masked ones. 0 if it is not known.
        mean: Mean per channel, float64, shape `(channels,)`.
        variance: Population variance per channel (divided by `count`; with
            `"algorithm2"` the average of unbiased batch variances), same shape.
        renorm: With `renorm=True`, the values of `moving_stddev`, `renorm_mean` and
            `renorm_stddev` as they were read from a layer. `None` for swept statistics,
            where they follow from mean and variance.
    """

    count: int
    mean: np.ndarray
    variance: np.ndarray
    renorm: dict | None = None

    def __eq__(self, other):
        """Whether the two hold the same numbers, to the bit."""
        if not isinstance(other, LayerStats):
            return NotImplemented
        return (
            np.array_equal(self.count, other.count)
            and np.array_equal(self.mean, other.mean)
            and np.array_equal(self.variance, other.variance)
            and (self.renorm is None) == (other.renorm is None)
            and all(np.array_equal(v, other.renorm[k]) for k, v in (self.renorm or {}).items())
        )

    __hash__ = None


class PopulationStats(collections.abc.Mapping):
    """Population statistics of a model: a mapping from layer path to `LayerStats`.

    It comes from `tfbn.collect`, is never changed, and knows nothing of the model it was
    collected from but the paths of its batch norm layers and a fingerprint of its
    weights.

    Statistics of a part of the data, from `tfbn.collect_level`, are of this kind too. They
    keep the moments of every single call of a layer, as a layer may be called at several
    levels, and hold only the layers that have been reached. `complete` tells.

    Attributes:
        method: `"pooled"`, `"algorithm2"`, `"exact"`, or `"assigned"` for statistics that
            were read from a model and not swept.
        samples: Number of samples (entries of the batch axis of the model's inputs).
        batches: Number of batches they came in.
        batch_size: Size of the largest of these batches, in samples.
        fingerprint: SHA-256 of the weights during the sweep, see `assign`.
        previous: What the model held when it was swept, a `PopulationStats`, or `None`.
        level: The last level of batch norm layers that has been swept, from 1.
        levels: How many there are; 1 for methods that take one pass.
        calls: For a part of a sweep the `Moments` behind it, by level and site: layer path
            and number of the call. `None` for a sweep that is done.
    """

    def __init__(
        self,
        layers=None,
        *,
        method,
        samples=0,
        batches=0,
        batch_size=0,
        fingerprint="",
        previous=None,
        level=1,
        levels=1,
        calls=None,
    ):
        if layers is not None:
            self._layers = dict(layers)
        self.method = method
        self.samples = int(samples)
        self.batches = int(batches)
        self.batch_size = int(batch_size)
        self.fingerprint = fingerprint
        self.previous = previous
        self.level = int(level)
        self.levels = int(levels)
        self.calls = calls

    @functools.cached_property
    def _layers(self):
        """What `calls` come to: the statistics of a layer are those of all its calls together."""
        found = {}
        for site, (_, ours) in latest(self.calls).items():
            if site.path in found:
                ours = moments.merge(found[site.path], ours, method=self.method)
            found[site.path] = ours
        return {path: _layer_stats(ours) for path, ours in found.items()}

    def replace(self, **changes):
        """These statistics with some attributes, or `layers`, changed."""
        names = (*_ATTRIBUTES, "previous", "calls")
        layers = self if self.calls is None else None
        held = {name: getattr(self, name) for name in names}
        return PopulationStats(**{"layers": layers, **held, **changes})

    @property
    def complete(self):
        """Whether all levels of the network have been swept."""
        return self.level == self.levels

    def __getitem__(self, path):
        return self._layers[path]

    def __iter__(self):
        return iter(self._layers)

    def __len__(self):
        return len(self._layers)

    def __repr__(self):
        return (
            f"<PopulationStats method={self.method!r} layers={len(self)} "
            f"samples={self.samples} batches={self.batches}"
            + (">" if self.complete else f" level={self.level} of {self.levels}>")
        )

    @classmethod
    def read(cls, model, include_frozen=True):
        """The statistics that a model's batch norm layers hold now, in full precision.

        `method` is `"assigned"` and every count 0: nothing in a model tells what its
        moving averages were taken from.
        """
        layers = {}
        for path, layer in keras_models.batch_norm_layers(model).items():
            if not (include_frozen or layer.trainable):
                continue
            held = {name: _read(v) for name, v in keras_models.statistics(layer).items()}
            mean, variance = held.pop("moving_mean"), held.pop("moving_variance")
            layers[path] = LayerStats(0, mean, variance, held or None)
        return cls(layers, method="assigned", fingerprint=keras_models.fingerprint(model))

    def assign(self, model):
        """Set the inference statistics of a model's batch norm layers to these.

        `moving_mean` becomes the mean and `moving_variance` the variance. With
        `renorm=True`, `renorm_mean` becomes the mean too, and `moving_stddev` and
        `renorm_stddev` become sqrt(variance + epsilon), as Keras defines them. All layers
        are checked before the first is written, and if writing is interrupted what was
        there is put back.

        Args:
            model: The model that was swept, or one of the same architecture. Every layer
                in these statistics must be in it; layers of the model that are not in
                the statistics (frozen ones, say) are left alone.

        Returns:
            A `PopulationStats` with what the layers held before:
            `previous.assign(model)` undoes the assignment to the bit.

        Raises:
            ValueError: If a layer is missing or a shape differs (the first difference is
                named), if a value is not finite in the dtype of the variable, or if not all
                levels, or layers, have been swept. The model is then unchanged.
        """
        if not self.complete:
            raise ValueError(
                f"Expected statistics of all {self.levels} levels of batch norm layers. Received: "
                f"those up to level {self.level}. Go on with tfbn.collect_level."
            )
        if self.calls is not None:
            self.require_all(model)
        layers = keras_models.batch_norm_layers(model)
        missing = [path for path in self if path not in layers]
        if missing:
            raise ValueError(
                f"Expected a model with the batch norm layers of these statistics. "
                f"Received: model {model.name!r}, which has no batch norm layer "
                f"{missing[0]!r}; it has {list(layers)}. Assign statistics only to the model "
                "they were collected from, or to one of the same architecture."
            )
        writes = []
        for path, stats in self.items():
            layer = layers[path]
            if not layer.built:
                raise ValueError(
                    f"Expected a built model. Received: model {model.name!r}, whose layer "
                    f"{path!r} has no weights yet. Call the model on a batch first."
                )
            for name, value in _values(stats, layer).items():
                variable = getattr(layer, name)
                if tuple(variable.shape) != value.shape:
                    raise ValueError(
                        f"Expected statistics of shape {tuple(variable.shape)} for layer "
                        f"{path!r}. Received: shape {value.shape}. These statistics belong to "
                        "another model."
                    )
                with np.errstate(over="ignore"):
                    cast = value.astype(keras.backend.standardize_dtype(variable.dtype))
                if not np.all(np.isfinite(cast.astype(np.float64))):
                    raise ValueError(
                        f"Expected finite statistics for layer {path!r}. Received: {name} with "
                        f"{_first_non_finite(value, cast)} as {variable.dtype}. Look for NaN, "
                        "Inf or very large values in the data of the sweep."
                    )
                writes.append((variable, cast))
        previous = PopulationStats.read(model)
        previous = PopulationStats(
            {path: previous[path] for path in self},
            method="assigned",
            fingerprint=previous.fingerprint,
        )
        undo = [(variable, _read(variable, exact=True)) for variable, _ in writes]
        assigned = _assigned.pop(model, None)
        try:
            for variable, value in writes:
                variable.assign(value)
        except BaseException:  # Ctrl-C too: all layers or none.
            for variable, value in undo:
                variable.assign(value)
            if assigned is not None:
                _assigned[model] = assigned
            raise
        if self.method != "assigned":
            _assigned[model] = self
        return previous

    def require_all(self, model):
        """Raise `ValueError` unless there were values for every layer that was to be swept."""
        for path in self.previous or ():
            if path not in self:
                raise ValueError(
                    f"Expected {model.name!r} to call its batch norm layer {path!r}. "
                    "Received: a model that does not call it for inference, or whose subclass of "
                    "BatchNormalization does not call super().call(). Remove the layer, or set "
                    "its trainable=False to leave it out."
                )
            if not np.any(self[path].count):
                raise ValueError(
                    f"Expected values for layer {path!r}. Received: none, or only masked ones. "
                    "Look at the data and its masks."
                )

    def mismatch(self, model):
        """Why these are not the population statistics of a model as it is now, in words.

        Returns:
            `None` if the model's weights are those of the sweep and its layers hold the
            statistics that the sweep found; else a phrase that says what differs.
        """
        if self.fingerprint != keras_models.fingerprint(model):
            return "the weights have changed since the sweep"
        layers = keras_models.batch_norm_layers(model)
        for path, stats in self.items():
            if path not in layers:
                return f"the model has no batch norm layer {path!r}"
            for name, value in _values(stats, layers[path]).items():
                variable = getattr(layers[path], name)
                dtype = keras.backend.standardize_dtype(variable.dtype)
                if not np.array_equal(_read(variable, exact=True), value.astype(dtype)):
                    return f"{name} of layer {path!r} has changed since the sweep"
        return None

    def merge(self, other):
        """The statistics of two sweeps over different data, as of one sweep over both.

        Counts add up, means are weighted by count, and variances follow the method:
        pooled ones by the law of total variance, those of Algorithm 2 by their average
        (see `tfbn.moments.merge`). Associative and commutative up to rounding.

        Raises:
            ValueError: If method, layers, shapes or the swept weights differ. Also for
                `"exact"`, unless both are of one level and from `tfbn.collect_level`:
                exact statistics of parts do not determine those of the whole, because
                deeper layers were normalised with the part's own statistics.
        """
        if not isinstance(other, PopulationStats):
            raise ValueError(f"Expected PopulationStats to merge. Received: {type(other)}.")
        parts = self.calls is not None and other.calls is not None
        if self.method != other.method or not (parts or self.method in ("pooled", "algorithm2")):
            raise ValueError(
                "Expected two sweeps with method='pooled' or two with 'algorithm2'. Received: "
                f"{self.method!r} and {other.method!r}. Statistics of other kinds cannot be "
                "merged: sweep the whole data at once, or for 'exact' level by level with "
                "tfbn.collect_level."
            )
        if not parts:
            _same_layers(self, other)
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                "Expected two sweeps of the same weights. Received: fingerprints "
                f"{self.fingerprint[:12]} and {other.fingerprint[:12]}. Collect both with the "
                "same weights."
            )
        both = {
            "samples": self.samples + other.samples,
            "batches": self.batches + other.batches,
            "batch_size": max(self.batch_size, other.batch_size),
            "levels": max(self.levels, other.levels),
        }
        if parts:
            return self.replace(calls=_merged_calls(self, other), **both)
        merged = {}
        for path, ours in self.items():
            found = moments.merge(_moments(ours), _moments(other[path]), method=self.method)
            merged[path] = _layer_stats(found)
        return self.replace(layers=merged, **both)

    def compare(self, other):
        """How far `other` is from these statistics, layer by layer, worst first.

        Returns:
            A dict from layer path to a dict of floats. With delta the difference of the
            means in units of this standard deviation, sqrt(variance + tiny):
            `mean_shift` is the root mean square of delta over channels and
            `mean_shift_max` its largest absolute value; with r = other variance / this
            variance, `std_ratio` is the geometric mean over channels of sqrt(r), and
            `std_ratio_max` the largest factor max(sqrt(r), 1 / sqrt(r)).

        Raises:
            ValueError: If the layers or their shapes differ.
        """
        _same_layers(self, other)
        report = {path: _drift(ours, other[path]) for path, ours in self.items()}
        return dict(sorted(report.items(), key=lambda item: -_severity(item[1])))

    def to_dict(self):
        """Everything, as plain numbers, lists and strings that `json.dumps` takes."""
        return {
            **self._header(),
            "layers": {
                path: {
                    "count": np.asarray(stats.count).tolist(),
                    "mean": stats.mean.tolist(),
                    "variance": stats.variance.tolist(),
                }
                for path, stats in self.items()
            },
        }

    def summary(self, print_fn=None):
        """Print a table of the layers, those whose moving averages were furthest off first.

        Columns: values per channel; how far the statistics that the model held before
        were off, as the RMS over channels of the difference of means in standard
        deviations, and as the old standard deviation over the new (geometric mean over
        channels); and an upper bound on the standard error of the mean, in standard
        deviations, 1 / sqrt(samples): positions of one sample are not counted as
        independent.

        Args:
            print_fn: Called with each line instead of `print`.
        """
        print_fn = print_fn or print
        print_fn(
            f"Population statistics: method={self.method!r}, {self.samples} samples "
            f"in {self.batches} batches of at most {self.batch_size}"
            + ("" if self.complete else f", level {self.level} of {self.levels}")
        )
        drift = dict.fromkeys(self)
        if self.previous is not None and self.complete:
            drift = self.compare(self.previous)
        width = max([len("layer"), *(len(path) for path in self)])
        print_fn(
            f"{'layer':{width}}  {'values/channel':>14}  {'mean off by':>11}  "
            f"{'std ratio':>9}  {'std error':>9}"
        )
        for path, off in drift.items():
            shift = f"{off['mean_shift']:.3f} std" if off else "-"
            ratio = f"{off['std_ratio']:.3f}" if off else "-"
            error = f"{self.samples**-0.5:.4f}" if self.samples else "-"
            print_fn(f"{path:{width}}  {self[path].count:>14}  {shift:>11}  {ratio:>9}  {error:>9}")

    def save(self, path):
        """Write one file (a NumPy `.npz` archive), whole or not at all.

        The file is written beside its final name, flushed to disk and renamed over it, so
        that a crash or a full disk leaves either the old file or the new one.

        Args:
            path: File name. It is used as it is; `.npz` is customary.
        """
        write_whole(pathlib.Path(path), self.to_bytes())

    @classmethod
    def load(cls, path):
        """Read a file written by `save`.

        Raises:
            ValueError: If the file is damaged or is not such a file. Nothing in it is
                ever executed.
        """
        content = pathlib.Path(path).read_bytes()
        try:
            return cls.from_bytes(content)
        except ValueError as error:
            raise ValueError(
                "Expected a file written by PopulationStats.save. "
                f"Received: {str(path)!r}, which is damaged or another kind of file ({error}). "
                "Collect the statistics again."
            ) from error

    def to_bytes(self):
        """What `save` writes, for those who send it elsewhere."""
        arrays = {}
        layers = self if self.calls is None else {}
        for i, stats in enumerate(layers.values()):
            arrays[f"count_{i}"] = np.asarray(stats.count)
            arrays[f"mean_{i}"] = stats.mean
            arrays[f"variance_{i}"] = stats.variance
            for name, value in (stats.renorm or {}).items():
                arrays[f"{name}_{i}"] = value
        if self.previous is not None:
            for i, path in enumerate(self.previous):
                arrays[f"previous_mean_{i}"] = self.previous[path].mean
                arrays[f"previous_variance_{i}"] = self.previous[path].variance
        for i, found in enumerate((self.calls or {}).values()):
            arrays[f"call_{i}"] = np.stack(found)
        header = {
            **self._header(),
            "layers": list(layers),
            "previous": None if self.previous is None else list(self.previous),
            "calls": None if self.calls is None else [[n, *site] for n, site in self.calls],
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content):
        """Read what `to_bytes` gave.

        Raises:
            ValueError: If it is damaged or something else. Nothing in it is ever executed.
        """
        try:
            # Reading a member of the archive checks its CRC-32.
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop("header").tobytes())
            if header.pop("format") != _FORMAT:
                raise ValueError("another format")
            layers = {}
            for i, path in enumerate(header["layers"]):
                renorm = {
                    name: arrays[f"{name}_{i}"]
                    for name in ("moving_stddev", "renorm_mean", "renorm_stddev")
                    if f"{name}_{i}" in arrays
                }
                count = arrays[f"count_{i}"]
                layers[path] = LayerStats(
                    count if count.ndim else int(count),
                    arrays[f"mean_{i}"],
                    arrays[f"variance_{i}"],
                    renorm or None,
                )
            previous = calls = None
            if header["previous"] is not None:
                before = {
                    path: LayerStats(
                        0, arrays[f"previous_mean_{i}"], arrays[f"previous_variance_{i}"]
                    )
                    for i, path in enumerate(header["previous"])
                }
                previous = cls(before, method="assigned")
            if header["calls"] is not None:
                calls = {
                    (level, Site(path, call)): moments.Moments(*arrays[f"call_{i}"])
                    for i, (level, path, call) in enumerate(header["calls"])
                }
            return cls(
                layers if calls is None else None,
                previous=previous,
                calls=calls,
                **{name: header[name] for name in _ATTRIBUTES},
            )
        except Exception as error:  # What a damaged archive raises is not documented.
            raise ValueError(
                f"Expected what PopulationStats.to_bytes gave. Received: {len(content)} bytes that "
                f"are not ({type(error).__name__}: {error})."
            ) from error

    def _header(self):
        return {
            "format": _FORMAT,
            "tfbn": __version__,
            "keras": keras.__version__,
            **{name: getattr(self, name) for name in _ATTRIBUTES},
        }


def assigned(model):
    """The `PopulationStats` last assigned to a model in this process, or `None`.

    Training may have changed the model since: `PopulationStats.mismatch` tells.
    """
    return _assigned.get(model)


def _values(stats, layer):
    """What the statistics variables of a layer should hold, float64, by attribute name."""
    values = {"moving_mean": stats.mean, "moving_variance": stats.variance}
    if getattr(layer, "renorm", False):
        stddev = np.sqrt(stats.variance + layer.epsilon)
        values |= stats.renorm or {
            "moving_stddev": stddev,
            "renorm_mean": stats.mean,
            "renorm_stddev": stddev,
        }
    return values


def _read(variable, exact=False):
    value = tf.convert_to_tensor(variable).numpy()
    return value.copy() if exact else value.astype(np.float64)


def _first_non_finite(value, cast):
    channel = int(np.argmin(np.isfinite(cast.astype(np.float64))))
    return f"{value[channel]} in channel {channel}"


def latest(calls):
    """By site the highest level at which it was swept, and its moments there."""
    return {site: (level, found) for (level, site), found in sorted(calls.items(), key=_level)}


def _level(item):
    return item[0][0]


def _merged_calls(a, b):
    if a.level != b.level:
        raise ValueError(
            f"Expected parts of one level. Received: level {a.level} and level {b.level}. Merge "
            "the parts of one level before the next."
        )
    merged = dict(a.calls)
    for key, theirs in b.calls.items():
        ours = merged.setdefault(key, theirs)
        if ours is theirs:
            continue
        if ours.mean.shape != theirs.mean.shape:
            raise ValueError(
                f"Expected statistics of the same shapes. Received: {ours.mean.shape} and "
                f"{theirs.mean.shape} for layer {key[1].path!r}. They belong to different models."
            )
        if key[0] == a.level:
            merged[key] = moments.merge(ours, theirs, method=a.method)
        elif not all(map(np.array_equal, ours, theirs)):
            raise ValueError(
                f"Expected parts that were collected above the same levels. Received: parts of "
                f"level {a.level} that differ in layer {key[1].path!r} at level {key[0]}. Give "
                "every shard the same merged statistics."
            )
    return merged


def _layer_stats(found):
    counts = found.count
    # Only a mask that tells channels apart makes their counts differ.
    count = int(counts[0]) if (counts == counts[0]).all() else counts.astype(int)
    return LayerStats(count, found.mean, moments.variance(found))


def _moments(stats):
    count = np.broadcast_to(np.asarray(stats.count, np.float64), stats.mean.shape)
    return moments.Moments(count, stats.mean, stats.variance * count)


def _same_layers(a, b):
    for ours, theirs in zip(a, b, strict=False):
        if ours != theirs:
            raise ValueError(
                f"Expected statistics of the same layers. Received: layer {ours!r} in one and "
                f"{theirs!r} in the other in the same place. They belong to different models."
            )
    if len(a) != len(b):
        raise ValueError(
            f"Expected statistics of the same layers. Received: {len(a)} layers in one and "
            f"{len(b)} in the other. They belong to different models."
        )
    for path in a:
        if a[path].mean.shape != b[path].mean.shape:
            raise ValueError(
                f"Expected statistics of the same shapes. Received: {a[path].mean.shape} and "
                f"{b[path].mean.shape} for layer {path!r}. They belong to different models."
            )


def _drift(ours, theirs):
    # A channel that never varies has variance 0: the smallest normal float32 keeps the
    # ratios finite without being seen anywhere else.
    tiny = float(np.finfo(np.float32).tiny)
    std = np.sqrt(np.maximum(ours.variance, tiny))
    other_std = np.sqrt(np.maximum(theirs.variance, tiny))
    shift = (theirs.mean - ours.mean) / std
    log_ratio = np.log(other_std / std)
    return {
        "mean_shift": float(np.sqrt(np.mean(shift**2))),
        "mean_shift_max": float(np.max(np.abs(shift))),
        "std_ratio": float(np.exp(np.mean(log_ratio))),
        "std_ratio_max": float(np.exp(np.max(np.abs(log_ratio)))),
    }


def _severity(drift):
    return drift["mean_shift"] + abs(np.log(drift["std_ratio"]))


def write_whole(path, content):
    """Write a file so that under its name there is ever the old content or all of the new."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise
