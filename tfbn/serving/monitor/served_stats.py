"""`ServedStats`: the answers of the signature `monitor` over many requests, and their drift."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from tfbn.population import PopulationStats
from tfbn.serving import provenance
from tfbn.serving.monitor import alarm, monitor
from tfbn.stats import drift, layer_stats, moments
from tfbn.stats.layer_stats import LayerStats

# Of the p-value. It may be looked at after every request: tests/benchmarks/monitor.py counts the
# runs over data that has not moved in which it is below this at any of these looks.
_ALARM = 0.001


@dataclasses.dataclass(frozen=True)
class ServedDrift:
    """How far the data that a model was served has moved from its population.

    Attributes:
        p_value: The one number for an alarm: the probability that requests would be as far from
            the population as these are, if their own population were within 0.05 standard
            deviations of it. 1.0 for fewer than 16 requests.
        requests: How many requests it was taken from.
        distance: How far the network has moved, the root mean square of `distance` over layers,
            weighted by how well each is known.
        layers: By path of each layer, in units of sqrt(variance + epsilon) of its population:
            `mean_shift`, `mean_shift_max`, `std_ratio` and `std_ratio_max` as
            `PopulationStats.compare` has them; `mean_shift_error`, the `mean_shift` that noise
            alone would show, and `std_ratio_error`, the standard error of `std_ratio`;
            `distance`, the root mean square over channels of the shift and of half the relative
            change of the mean square, without the addition of noise; and the layer's own
            `p_value`, which is not corrected for the number of layers: where to look, not an
            alarm. Errors come from the spread between requests; of one they are NaN, and so is
            the distance.
    """

    p_value: float
    requests: int
    distance: float
    layers: dict[str, dict[str, float]]

    @property
    def drifted(self) -> bool:
        """Whether `p_value` is below 0.001, where an alarm should sound."""
        return self.p_value < _ALARM

    def summary(self) -> None:
        """Print a table of the layers, those that have moved most first."""
        verdict = "have moved from" if self.drifted else "cannot be told from"
        print(
            f"{self.requests} requests {verdict} the population: {self.distance:.3f} std away, "
            f"p = {self.p_value:.2g}"
        )
        head = ["layer", "distance", "mean off by", "noise", "std ratio", "std error", "p"]
        ordered = sorted(self.layers.items(), key=lambda item: -item[1]["distance"])
        rows = [[path, *_cells(found)] for path, found in ordered]
        print("\n".join(drift.table(head, rows)))


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

    Requests should be a random sample of the traffic, such as one in ten. Add answers in their
    order: requests that are alike because they came together are then taken for fewer than they
    are. They are kept as at most 31 blocks of neighbours, so memory does not grow with their
    number; to see the newest, begin another `ServedStats`, every hour or every 500 requests.

    Args:
        path: The directory of the version that answers, or that of a model, whose highest version
            is taken. Only its folder `assets.extra` is read.

    Raises:
        ValueError: If there is no such version, or if it was exported without `monitor`.
    """

    def __init__(self, path: str | os.PathLike):
        recorded = provenance.read(path).get("monitor")
        if recorded is None:
            raise ValueError(
                "Expected a model that was exported with monitor. Received: "
                f"{os.fspath(path)!r}, which was not. Export it again with monitor=True."
            )
        self._identity = recorded["population"]
        self._epsilon = recorded["epsilon"]
        self.population = _population(path, self._epsilon)
        self._blocks = {path: alarm.Blocks() for path in self.population}

    @property
    def requests(self) -> int:
        """How many answers were added."""
        return next(iter(self._blocks.values())).requests

    def add(self, answer: Any) -> None:
        """Add the answer of a server to one request, of one sample or of many.

        Args:
            answer: A mapping from the names of outputs to arrays, lists, tensors or
                `TensorProto`; the outputs of the model may be among them. The answer itself will
                do too: a `PredictResponse`, or the dict that the JSON of a REST request with
                `"inputs"` has.

        Raises:
            ValueError: If it is not of this version, if an entry is missing or has another
                shape, or if a value is NaN, infinite, or one that no data has. Nothing is added
                then.
        """
        outputs = _outputs(answer)
        identity = _text(_entry(outputs, monitor.IDENTITY))
        if identity != self._identity:
            raise ValueError(
                f"Expected answers of the version whose population is {self._identity}. Received: "
                f"an answer of {identity}, another model or another version. Compare each version "
                "with its own population."
            )
        found = {path: self._layer(outputs, path) for path in self._blocks}
        for path, layer in found.items():
            self._blocks[path].add(layer)

    def _layer(self, outputs, path):
        """The moments of one layer in an answer."""
        values = {
            name: _numbers(outputs, f"{path}/{name}") for name in ("count", "mean", "variance")
        }
        expected = self.population[path].mean.shape
        try:
            stats = LayerStats(**values)
            if stats.mean.shape != expected:
                raise ValueError(f"a mean of shape {stats.mean.shape}")
            why = stats.impossible(where_counted=True)
            if why is not None:
                raise ValueError(why)
        except ValueError as error:
            raise ValueError(
                f"Expected count, mean and variance of {expected[0]} channels that data can have. "
                f"Received: an answer for layer {path!r} with something else ({error}). Leave it "
                "out, and look for NaN in the request."
            ) from error
        return moments.of_batch(stats.counts, stats.mean, stats.variance, method="pooled")

    def layers(self) -> dict[str, LayerStats]:
        """The statistics of all values that entered each layer so far, by path.

        Their standard errors are from the spread between requests, or between blocks of them. The
        layers below normalise with the population, so that these are not the statistics of
        an `"exact"` sweep over the same data, and are of no use to `assign`.
        """
        self._require_answers()
        found = {}
        for path, blocks in self._blocks.items():
            found[path] = layer_stats.of_calls([blocks.total()], "pooled")
        return found

    def compare(self) -> ServedDrift:
        """How far the data of all requests so far is from the population.

        Raises:
            ValueError: If no answers were added.
        """
        served = self.layers()
        moved, found = [], {}
        for path, ours in self.population.items():
            blocks, theirs, epsilon = self._blocks[path], served[path], self._epsilon[path]
            moved.append(alarm.movement(blocks, ours.mean, ours.variance, ours.counts, epsilon))
            scaled = [alarm.scaled(stats.mean, stats.variance, epsilon) for stats in (ours, theirs)]
            errors = theirs.mean_error / np.sqrt(scaled[0].variance)
            found[path] = {
                **drift.of_layer(*scaled),
                "mean_shift_error": float(np.sqrt(np.mean(errors**2))),
                "std_ratio_error": alarm.std_ratio_error(blocks, ours.variance, epsilon),
                "distance": moved[-1].distance,
                "p_value": moved[-1].p_value,
            }
        network = alarm.together(moved)
        return ServedDrift(network.p_value, self.requests, network.distance, found)

    def _require_answers(self):
        if not self.requests:
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
    return population


def _outputs(answer):
    """The mapping from names to values in an answer."""
    outputs = getattr(answer, "outputs", answer)
    if isinstance(outputs, Mapping) and set(outputs) == {"outputs"}:
        outputs = outputs["outputs"]
    if not isinstance(outputs, Mapping):
        raise ValueError(
            "Expected an answer with outputs by name. Received: "
            f"{str(answer)[:200]!r} of type {type(answer).__name__}. Ask the signature 'monitor'; "
            'over REST give the request as "inputs", not as "instances".'
        )
    return outputs


def _entry(outputs, name):
    if name not in outputs:
        raise ValueError(
            f"Expected an answer of the signature 'monitor' with {name!r}. Received: one with "
            f"{sorted(outputs)[:10]}. Ask for the signature 'monitor' of this version."
        )
    value = outputs[name]
    return tf.make_ndarray(value) if isinstance(value, tensor_pb2.TensorProto) else value


def _numbers(outputs, name):
    value = _entry(outputs, name)
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected numbers in {name!r}. Received: {str(value)[:100]!r}."
        ) from error


def _text(value):
    value = np.asarray(value).reshape(-1).tolist()
    return "".join(v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in value)
