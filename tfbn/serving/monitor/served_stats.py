"""Accumulate answers of the signature `monitor`, and compute their drift."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tfbn.population import PopulationStats
from tfbn.serving import provenance, versions
from tfbn.serving.monitor import alarm, answers, monitor
from tfbn.stats import drift, layer_stats
from tfbn.stats.layer_stats import LayerStats

# The largest p-value of an alarm. It may be checked after every sample: tests/benchmarks/monitor.py
# counts the false alarms of runs over unchanged data with these checks.
_ALARM = 0.001


@dataclasses.dataclass(frozen=True, repr=False)
class ServedDrift:
    """The distance of the data that a model was served from its population.

    Attributes:
        p_value: The number for an alarm: the probability that samples from a population within 0.05
            standard deviations of the model's are this far from it. NaN for fewer than 16 samples.
        samples: The number of samples.
        distance: The distance of the network: the root mean square of the layers' `distance`,
            weighted by their noise.
        layers: Path of a layer -> name -> value, in units of sqrt(variance + epsilon) of the
            population. `mean_shift`, `mean_shift_max`, `std_ratio` and `std_ratio_max` are defined
            as in `PopulationStats.compare`. `mean_shift_error` is the `mean_shift` expected from
            noise alone, `std_ratio_error` the standard error of `std_ratio`. `distance` is the root
            mean square over channels of the shift and of half the relative change of the mean
            square, corrected for noise. `p_value` is not corrected for the number of layers: use it
            to locate a drift, not as an alarm; NaN for fewer than 16 samples. Errors are computed
            from the spread between samples; for one sample they and the distance are NaN.
        channels: Path of a layer -> the shift of every channel's mean and the ratio of its standard
            deviations, in the same units, each of shape `(channels,)`.
        noise_known: Whether every layer has the standard errors of a sweep. Without them, the
            spread of the samples counts as all of the noise, and values that are rare in the
            population may raise a false alarm.
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
        """Whether `p_value` is below 0.001, the limit of an alarm."""
        return self.p_value < _ALARM

    def _verdict(self) -> str:
        if self.samples < alarm.FEWEST_SAMPLES:
            return f"{self.samples} of {alarm.FEWEST_SAMPLES} samples: too few to tell"
        verdict = "have moved from" if self.drifted else "cannot be told from"
        return (
            f"{self.samples} samples {verdict} the population: {self.distance:.3f} std away, "
            f"p {_shown(self.p_value)}"
        )

    def summary(self, print_fn: Callable[[str], Any] | None = None) -> None:
        """Print a table of the layers, in descending order of their distance.

        Args:
            print_fn: Called with each line instead of `print`.
        """
        print_fn = print_fn or print
        print_fn(self._verdict())
        if not self.noise_known:
            print_fn("The population has no standard errors: rare values may raise a false alarm.")
        head = ["layer", "distance", "mean off by", "noise", "std ratio", "std error", "p"]
        ordered = sorted(self.layers.items(), key=lambda item: -item[1]["distance"])
        rows = [[path, *_cells(layer)] for path, layer in ordered]
        for line in drift.table(head, rows):
            print_fn(line)


def _shown(p_value: float) -> str:
    """Return `= 0.02`, or `< 1e-300` for a value that is too small for a float."""
    return f"= {p_value:.2g}" if p_value > 1e-300 else "< 1e-300"


def _cells(layer: dict[str, float]) -> list[str]:
    return [
        f"{layer['distance']:.3f} std",
        f"{layer['mean_shift']:.3f} std",
        f"{layer['mean_shift_error']:.3f}",
        f"{layer['std_ratio']:.3f}",
        f"{layer['std_ratio_error']:.3f}",
        f"{layer['p_value']:.2g}",
    ]


class ServedStats:
    """Compare the data that a served model receives with its population.

    Accumulates answers of the signature `monitor` of a model that was exported with
    `tfbn.export(..., monitor=...)`. It sends no requests, and does not load the model.

    ```python
    served = tfbn.ServedStats("models/digits/1")
    for answer in answers:
        served.add(answer)
    served.compare().summary()
    ```

    A sample is a row of the inputs of a request. Samples should be a random part of the traffic,
    such as one in ten. Add answers in their order: correlated neighbours then count as fewer
    samples. Samples are stored in at most 31 blocks of neighbours, so memory does not grow with
    their number. To compare recent data, create a `ServedStats` every hour or every 500 samples.

    The noise is at least the standard errors that the sweep measured, so the absence of rare values
    raises no alarm. Statistics without a sweep, or from a sweep of a single batch, have no such
    errors: see `ServedDrift.noise_known`.

    Args:
        path: The directory of the version that answers, or of a model (its highest version). Only
            the folder `assets.extra` is required.

    Raises:
        ValueError: If there is no such version, or if it was exported without `monitor`.
    """

    def __init__(self, path: str | os.PathLike):
        recorded = provenance.read(path).monitor
        if recorded is None:
            raise ValueError(
                f"Expected a model exported with monitor=True. Received: {os.fspath(path)!r}."
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
        """The number of samples that were added."""
        return next(iter(self._blocks.values())).samples

    def add(self, answer: Any) -> None:
        """Add the samples of an answer.

        Args:
            answer: Names of outputs -> arrays, lists, tensors or `TensorProto`; outputs of the
                model are ignored. Also a `PredictResponse`, or the JSON dict of an answer to a REST
                request with `"inputs"` or `"instances"`.

        Raises:
            ValueError: If it is from another version, if an entry is missing or has another shape,
                or if a value is impossible (not finite, or negative). Nothing is added then.
        """
        outputs = answers.outputs_of(answer)
        identities = answers.identities(outputs)
        for identity in identities:
            if identity != self._identity:
                other = self._version_of(identity)
                received = "another model" if other is None else f"version {other}"
                raise ValueError(
                    f"Expected answers of {str(self._version)!r}. Received: one of {received}. Use "
                    "a ServedStats for each."
                )
        moments = {
            path: answers.samples_of(outputs, path, (len(identities), len(stats.mean))).each()
            for path, stats in self.population.items()
        }
        for path, samples in moments.items():
            for sample in samples:
                self._blocks[path].add(sample)

    def _version_of(self, identity: str) -> str | None:
        """Return the name of the model's version that has an identity, or `None`."""
        for version in versions.newest(self._version.parent):
            with contextlib.suppress(ValueError):
                if (provenance.read(version).monitor or {}).get("population") == identity:
                    return version.name
        return None

    def layers(self) -> dict[str, LayerStats]:
        """Return the statistics of all values that entered each layer, path -> statistics.

        Their standard errors are computed from the spread between samples or blocks. All layers
        normalized with the population, so these differ from the statistics of an `"exact"` sweep
        over the same data: do not assign them.

        Raises:
            ValueError: If no answers were added.
        """
        if not self.samples:
            raise ValueError("Expected answers of a server. Received: none so far. Call add first.")
        return {
            path: layer_stats.of_calls([blocks.total()], "pooled")
            for path, blocks in self._blocks.items()
        }

    def compare(self) -> ServedDrift:
        """Compute the distance of all samples from the population.

        Raises:
            ValueError: If no answers were added.
        """
        served = self.layers()
        distances, layers, channels = [], {}, {}
        for path, ours in self.population.items():
            blocks, theirs, epsilon = self._blocks[path], served[path], self._epsilon[path]
            distances.append(alarm.layer_distance(blocks, ours, epsilon))
            scaled = [alarm.scaled(stats.mean, stats.variance, epsilon) for stats in (ours, theirs)]
            channels[path] = drift.by_channel(*scaled)
            errors = theirs.mean_error / np.sqrt(scaled[0].variance)
            layers[path] = {
                **drift.of_layer(*scaled),
                "mean_shift_error": float(np.sqrt(np.mean(errors**2))),
                "std_ratio_error": alarm.std_ratio_error(blocks, ours.variance, epsilon),
                "distance": distances[-1].distance,
                "p_value": distances[-1].p_value,
            }
        network = alarm.network_distance(distances)
        known = not any(np.isnan(stats.mean_error).any() for stats in self.population.values())
        return ServedDrift(network.p_value, self.samples, network.distance, layers, channels, known)


def _population(path: str | os.PathLike, layers: Iterable[str]) -> PopulationStats:
    """Load the population of the monitored layers of a version."""
    file = provenance.file_of(path).with_name(os.path.basename(monitor.FILE))
    try:
        population = PopulationStats.load(file)
        if set(population) != set(layers):
            raise ValueError(f"it has layers {list(population)}, not {list(layers)}")
    except (OSError, ValueError) as error:
        raise versions.damaged(file, error) from error
    return population.replace(
        layers={path: _with_errors_of_source(population, path) for path in population}
    )


def _with_errors_of_source(population: PopulationStats, path: str) -> LayerStats:
    """Return the statistics of a layer, with standard errors for an infinite source.

    The errors of a sample of n of N have a factor sqrt(1 - n / N), which is removed. For n = N they
    are not known (NaN).
    """
    stats = population[path]
    if not population.population_size:
        return stats
    rest = 1 - population.samples / population.population_size
    factor = np.sqrt(1 / rest) if rest > 0 else np.nan
    return stats.with_errors(*(factor * error for error in stats.errors.values()))
