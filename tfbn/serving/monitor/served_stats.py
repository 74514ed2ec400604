"""`ServedStats`: the answers of the signature `monitor` over many samples, and their drift."""

import contextlib
import dataclasses
import os
from typing import Any

import numpy as np

from tfbn.population import PopulationStats
from tfbn.serving import provenance, versions
from tfbn.serving.monitor import alarm, answers, monitor
from tfbn.stats import drift, layer_stats
from tfbn.stats.layer_stats import LayerStats

# Of the p-value. It may be looked at after every sample: tests/benchmarks/monitor.py counts the
# runs over data that has not moved in which it is below this at any of these looks.
_ALARM = 0.001


@dataclasses.dataclass(frozen=True, repr=False)
class ServedDrift:
    """How far the data that a model was served has moved from its population.

    Attributes:
        p_value: The one number for an alarm: the probability that samples would be as far from
            the population as these are, if their own population were within 0.05 standard
            deviations of it. NaN for fewer than 16 samples.
        samples: How many samples it was taken from.
        distance: How far the network has moved, the root mean square of `distance` over layers,
            weighted by how well each is known.
        layers: By path of each layer, in units of sqrt(variance + epsilon) of its population:
            `mean_shift`, `mean_shift_max`, `std_ratio` and `std_ratio_max` as
            `PopulationStats.compare` has them; `mean_shift_error`, the `mean_shift` that noise
            alone would show, and `std_ratio_error`, the standard error of `std_ratio`;
            `distance`, the root mean square over channels of the shift and of half the relative
            change of the mean square, without the addition of noise; and the layer's own
            `p_value`, which is not corrected for the number of layers: where to look, not an
            alarm, and NaN for fewer than 16 samples too. Errors come from the spread between
            samples; of one they are NaN, and so is the distance.
        channels: By path of each layer, the shift of every channel's mean and the ratio of its
            standard deviations, in the same units, each of shape `(channels,)`.
        noise_known: Whether the sweep has measured its standard errors in every layer. Else the
            alarm assumes that the samples' own spread is all the noise there is, and values that
            are rare in the population may raise it falsely.
    """

    p_value: float
    samples: int
    distance: float
    layers: dict[str, dict[str, float]]
    channels: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(compare=False)
    noise_known: bool = True

    def __repr__(self) -> str:
        return f"<ServedDrift: {self._verdict()}>"

    @property
    def drifted(self) -> bool:
        """Whether `p_value` is below 0.001, where an alarm should sound."""
        return self.p_value < _ALARM

    def _verdict(self) -> str:
        if self.samples < alarm.FEWEST_SAMPLES:
            return f"{self.samples} of {alarm.FEWEST_SAMPLES} samples: too few to tell"
        verdict = "have moved from" if self.drifted else "cannot be told from"
        return (
            f"{self.samples} samples {verdict} the population: {self.distance:.3f} std away, "
            f"p {_shown(self.p_value)}"
        )

    def summary(self) -> None:
        """Print a table of the layers, those that have moved most first."""
        print(self._verdict())
        if not self.noise_known:
            print("The population has no standard errors: rare values may raise a false alarm.")
        head = ["layer", "distance", "mean off by", "noise", "std ratio", "std error", "p"]
        ordered = sorted(self.layers.items(), key=lambda item: -item[1]["distance"])
        rows = [[path, *_cells(found)] for path, found in ordered]
        print("\n".join(drift.table(head, rows)))


def _shown(p_value):
    """`= 0.02`, or `< 1e-300` where it is too small for a float."""
    return f"= {p_value:.2g}" if p_value > 1e-300 else "< 1e-300"


def _cells(found):
    return [
        f"{found['distance']:.3f} std",
        f"{found['mean_shift']:.3f} std",
        f"{found['mean_shift_error']:.3f}",
        f"{found['std_ratio']:.3f}",
        f"{found['std_ratio_error']:.3f}",
        f"{found['p_value']:.2g}",
    ]


class ServedStats:
    """Statistics of the data that a served model meets, against its population.

    It takes answers of the signature `monitor` of a model that was exported with
    `tfbn.export(..., monitor=...)`, and neither asks a server nor needs the model itself.

    ```python
    served = tfbn.ServedStats("models/digits/1")
    for answer in answers:
        served.add(answer)
    served.compare().summary()
    ```

    A sample is a row of the inputs, in a request of one or of many. Samples should be a random
    part of the traffic, such as one in ten. Add answers in their order: samples that are alike
    because they came together are then taken for fewer than they are. They are kept as at most 31
    blocks of neighbours, so memory does not grow with their number; to see the newest, begin
    another `ServedStats`, every hour or every 500 samples.

    The noise is never taken as less than the standard errors that the sweep measured, so rare
    values are no alarm while none has come. Statistics that no sweep measured, or one of a single
    batch, have no such errors: see `ServedDrift.noise_known`.

    Args:
        path: The directory of the version that answers, or that of a model, whose highest version
            is taken. Only its folder `assets.extra` is read.

    Raises:
        ValueError: If there is no such version, or if it was exported without `monitor`.
    """

    def __init__(self, path: str | os.PathLike):
        recorded = provenance.read(path).monitor
        if recorded is None:
            raise ValueError(
                "Expected a model that was exported with monitor. Received: "
                f"{os.fspath(path)!r}, which was not. Export it again with monitor=True."
            )
        self._version = provenance.file_of(path).parent.parent
        self._identity = recorded["population"]
        self._epsilon = recorded["epsilon"]
        self.population = _population(path, self._epsilon)
        self._blocks = {path: alarm.Blocks() for path in self.population}

    def __repr__(self) -> str:
        return f"<ServedStats of {self._version}: {self.samples} samples>"

    @property
    def samples(self) -> int:
        """How many samples were added."""
        return next(iter(self._blocks.values())).samples

    def add(self, answer: Any) -> None:
        """Add the samples of an answer.

        Args:
            answer: A mapping from the names of outputs to arrays, lists, tensors or
                `TensorProto`; the outputs of the model may be among them. The answer itself will
                do too: a `PredictResponse`, or the dict that the JSON of a REST request with
                `"inputs"` or `"instances"` has.

        Raises:
            ValueError: If it is not of this version, if an entry is missing or has another
                shape, or if a value is NaN, infinite, or one that no data has. Nothing is added
                then.
        """
        outputs = answers.outputs_of(answer)
        identities = answers.identities(outputs)
        for identity in identities:
            if identity != self._identity:
                other = self._version_of(identity)
                received = "another model" if other is None else f"version {other}"
                raise ValueError(
                    f"Expected answers of version {self._version.name} of "
                    f"{str(self._version.parent)!r}. Received: an answer of {received}. Compare "
                    "each version with its own ServedStats."
                )
        found = {
            path: answers.samples_of(outputs, path, (len(identities), len(stats.mean))).each()
            for path, stats in self.population.items()
        }
        for path, samples in found.items():
            for sample in samples:
                self._blocks[path].add(sample)

    def _version_of(self, identity):
        """The name of the version beside this one that answers with an identity, or `None`."""
        for version in versions.newest(self._version.parent):
            with contextlib.suppress(ValueError):
                if (provenance.read(version).monitor or {}).get("population") == identity:
                    return version.name
        return None

    def layers(self) -> dict[str, LayerStats]:
        """The statistics of all values that entered each layer so far, by path.

        Their standard errors are from the spread between samples, or between blocks of them. The
        layers below normalise with the population, so that these are not the statistics of
        an `"exact"` sweep over the same data, and are of no use to `assign`.
        """
        self._require_answers()
        found = {}
        for path, blocks in self._blocks.items():
            found[path] = layer_stats.of_calls([blocks.total()], "pooled")
        return found

    def compare(self) -> ServedDrift:
        """How far the data of all samples so far is from the population.

        Raises:
            ValueError: If no answers were added.
        """
        served = self.layers()
        moved, found, channels = [], {}, {}
        for path, ours in self.population.items():
            blocks, theirs, epsilon = self._blocks[path], served[path], self._epsilon[path]
            moved.append(alarm.movement(blocks, ours, epsilon))
            scaled = [alarm.scaled(stats.mean, stats.variance, epsilon) for stats in (ours, theirs)]
            channels[path] = drift.by_channel(*scaled)
            errors = theirs.mean_error / np.sqrt(scaled[0].variance)
            found[path] = {
                **drift.of_layer(*scaled),
                "mean_shift_error": float(np.sqrt(np.mean(errors**2))),
                "std_ratio_error": alarm.std_ratio_error(blocks, ours.variance, epsilon),
                "distance": moved[-1].distance,
                "p_value": moved[-1].p_value,
            }
        network = alarm.together(moved)
        known = not any(np.isnan(stats.mean_error).any() for stats in self.population.values())
        return ServedDrift(network.p_value, self.samples, network.distance, found, channels, known)

    def _require_answers(self):
        if not self.samples:
            raise ValueError(
                "Expected answers of a server. Received: none so far. Add them with add."
            )


def _population(path, layers):
    """The population of the monitored layers of a version."""
    file = provenance.file_of(path).with_name(os.path.basename(monitor.FILE))
    try:
        population = PopulationStats.load(file)
        if set(population) != set(layers):
            raise ValueError(f"it has the layers {list(population)}, not {list(layers)}")
    except (OSError, ValueError) as error:
        raise ValueError(
            "Expected the population that tfbn.export wrote beside a model. Received: "
            f"{str(file)!r} ({error}). Copy assets.extra of the version again, or export it again."
        ) from error
    return population.replace(
        layers={path: _with_errors_of_source(population, path) for path in population}
    )


def _with_errors_of_source(population, path):
    """The statistics of a layer, with errors as if the source had endless samples.

    Those of a sample of n of N have a factor sqrt(1 - n / N); those of all N are not known.
    """
    stats = population[path]
    if not population.population_size:
        return stats
    rest = 1 - population.samples / population.population_size
    factor = np.sqrt(1 / rest) if rest > 0 else np.nan
    return stats.with_errors(*(factor * error for error in stats.errors.values()))
