"""Check by the moving averages whether a sweep had the data that `fit` trained on.

A moving average with momentum m is, after k updates from a value `start`,

    end = m^k start + (1 - m^k) u,    so    u = (end - m^k start) / (1 - m^k)

is a weighted average of the moments of the last k batches that entered the layer. In a layer
without batch norm before it, u and the swept statistics of the same data differ only by the noise
of a few batches and the last k updates of the weights.

Measured `Distance` of that layer, for an MLP and a CNN on digits (1 to 720 steps, batches of 2 to
32, Adam 0.001 to 0.1, SGD 0.1 and 0.5) and a thin ResNet-20 on Fashion-MNIST (SGD, cosine; 200
steps):

| the sweep has | after 1 or 2 steps | 10 | more |
| --- | --- | --- | --- |
| the data of `fit` | 0.01 to 1.30 | 0.02 to 0.64 | 0.00 to 0.50 |
| the same without augmentation (noise of 1 std, shifts, mixup) | | | 0.12 to 0.53 |
| another mean | | | 0.58 to 1.6 |
| -1..1 where `fit` has 0..1 | | | 1.1 to 3.1 |
| x 255 | | | over 5 |

Augmentation with noise of 3 std gives 1.1 to 1.4, like other data, and is reported.

Channels whose variance some batches do not determine are left out: rare pixels, rare categories,
heavy tails. With batch norm on the pixels of digits, they alone gave a distance of 5.
"""

import collections
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import keras
import numpy as np

from tfbn.models import assignment, keras_models
from tfbn.population import PopulationStats
from tfbn.stats.layer_stats import LayerStats
from tfbn.sweep.network import first_level

# The average is over the last 10 to 20 steps of an epoch: weights hardly change in so few.
_STEPS = 10
# Updates per step and call. A custom `train_step` or `call` may update a layer more or less often.
_UPDATE_RATES = tuple(2.0**k for k in range(-4, 5))
# Dropout of 0.5 before a Dense layer increased the std by a factor of 2.3 in training.
_NOISE = 4.0
# Largest relative standard error of the variance of a channel that is compared.
_MOST_ERROR = 0.5
# Epochs that `EarlyStopping` may restore.
_KEPT_WINDOWS = 256


class MeanVariance(NamedTuple):
    """Mean and variance per channel, float64."""

    mean: np.ndarray
    variance: np.ndarray


class Distance(NamedTuple):
    """Distance of the batches of `fit` from the swept population, at one layer.

    Attributes:
        shift: Root mean square over channels of the difference of the means, in units of the
            geometric mean of the two standard deviations.
        log_ratio: Mean over channels of log(std of the batches / std of the population).
    """

    shift: float
    log_ratio: float

    @property
    def total(self) -> float:
        """The norm of (shift, log_ratio)."""
        return float(np.hypot(self.shift, self.log_ratio))


class Window(NamedTuple):
    """The last steps of an epoch.

    Attributes:
        start: Path -> moving mean and variance before these steps.
        end: Path -> moving mean and variance after them.
        steps: Number of steps.
        trained: Number of steps of this `fit` up to the end.
    """

    start: Mapping[str, MeanVariance]
    end: Mapping[str, MeanVariance]
    steps: int
    trained: int


class FedData:
    """Records the moving averages of one `fit`, and compares the last sweep with them.

    Args:
        trained: The model that `fit` trains.
        network: The network inside it that is swept.
    """

    def __init__(self, trained: keras.Model, network: keras.Model):
        self._network = network
        self._size = getattr(trained, "steps_per_execution", 1)
        self._noise = _NOISE if _draws_in_training(network) else 1.0
        self._exact_rate = trained is network and _calls_once_a_step(network)
        # Path -> layer and number of its calls; empty before the first trace.
        self._layers: dict[str, tuple[keras.layers.BatchNormalization, int]] = {}
        self._recent: collections.deque[tuple[int, dict[str, MeanVariance]]] = collections.deque()
        self._trained = 0
        self._next = 0
        self._at_last_step: dict[str, MeanVariance] | None = None
        self._windows: collections.deque[Window] = collections.deque(maxlen=_KEPT_WINDOWS)

    def begin_step(self, step: int) -> None:
        """Record the moving averages before some of the steps.

        Args:
            step: The number of the step in its epoch.
        """
        # A model that the first step builds is traced before the second step.
        if not self._layers and self._trained + step <= self._size:
            self._layers = dict(_comparable_layers(self._network))
        if not self._layers:
            return
        if not self._recent or step % _STEPS < self._size or self._trained + step < 2 * _STEPS:
            self._recent.append((step, self._read()))
            while len(self._recent) > 2 * _STEPS:
                self._recent.popleft()
        self._next = step + self._size

    def end_step(self, step: int, steps: int | None) -> None:
        """Record the moving averages after the last step, before callbacks may reset them."""
        if steps is not None and step + 1 >= steps:
            self._at_last_step = self._read()

    def end_epoch(self, steps: int | None) -> None:
        """Record the moving averages after the last step of an epoch.

        Args:
            steps: The number of steps of an epoch, or `None` if it is unknown.
        """
        if not self._recent:
            return
        end = self._next if steps is None else min(self._next, steps)
        self._trained += end
        if steps is None and self._size > 1:
            self._recent.clear()
            return  # The last execution may have ended early.
        enough = min(_STEPS, -(-end // 2))
        # No window spans two epochs: in between, callbacks may change the layers.
        recent, self._recent = self._recent, collections.deque()
        starts = [(step, moving) for step, moving in recent if end - step >= enough]
        moving_now = self._read()
        at_last_step, self._at_last_step = self._at_last_step, None
        if starts and (at_last_step is None or _equal(at_last_step, moving_now)):
            step, moving = starts[-1]
            self._windows.append(Window(moving, moving_now, end - step, self._trained))

    def warn_of(self, stats: PopulationStats, batch_size: float | None) -> None:
        """Warn if a sweep had other data than `fit`.

        Args:
            stats: The statistics, with the moving averages of the same weights as `previous`.
            batch_size: The number of samples in a batch of `fit`; `None` for the sweep's.
        """
        window = self._window_of(stats)
        if window is None:
            return
        size = batch_size or stats.batch_size
        distances = self._distances(window, stats, size)
        worst = max(distances, key=lambda pair: pair[1].total, default=None)
        if worst is None:
            return
        path, distance = worst
        if distance.total > threshold(window.trained):
            warnings.warn(
                "The swept data is not what `fit` fed the network: at layer "
                f"{path!r} the mean is off by {distance.shift:.2g} std, the std by a factor of "
                f"{np.exp(abs(distance.log_ratio)):.2g}. Pass it as the layers get it in training: "
                "x=dataset.map(preprocess).",
                stacklevel=3,
            )

    def _window_of(self, stats: PopulationStats) -> Window | None:
        """Return the window that ended in the moving averages before the sweep.

        `EarlyStopping` may have restored them from an earlier epoch. Returns `None` if they were
        replaced otherwise.
        """
        previous = stats.previous
        for window in reversed(self._windows):
            paths = window.end.keys() & stats.keys()
            if (
                previous is not None
                and paths
                and all(
                    np.array_equal(window.end[path].mean, previous[path].mean)
                    and np.array_equal(window.end[path].variance, previous[path].variance)
                    for path in paths
                )
            ):
                return window
        return None

    def _distances(
        self, window: Window, stats: PopulationStats, size: float
    ) -> Iterator[tuple[str, Distance]]:
        for path, (layer, calls) in self._layers.items():
            if path not in stats or path not in window.end:
                continue
            rates = (1.0,) if self._exact_rate else _UPDATE_RATES
            between = between_batches(stats[path], stats.batches, stats.batch_size)
            fed_samples = size * effective_number(layer.momentum, window.steps * calls)
            known = known_channels(stats[path], stats.batches * stats.batch_size / fed_samples)
            distances = [
                distance_of(fed, stats[path], between, self._noise, known)
                for fed in (
                    recent_moments(
                        window.start[path],
                        window.end[path],
                        layer.momentum ** (window.steps * calls * rate),
                    )
                    for rate in rates
                )
                if fed is not None
            ]
            if len(distances) == len(rates):
                yield path, min(distances, key=lambda distance: distance.total)

    def _read(self) -> dict[str, MeanVariance]:
        return {
            path: MeanVariance(
                *(
                    assignment.value_of(variable).astype(np.float64)
                    for variable in (layer.moving_mean, layer.moving_variance)
                )
            )
            for path, (layer, _) in self._layers.items()
        }


def _equal(a: Mapping[str, MeanVariance], b: Mapping[str, MeanVariance]) -> bool:
    return all(np.array_equal(a[path], b[path]) for path in a)


def threshold(trained: int) -> float:
    """Return the distance above which data differs, after some steps of training."""
    return 0.5 + 1.5 / np.sqrt(trained)


def recent_moments(start: MeanVariance, end: MeanVariance, kept: float) -> MeanVariance | None:
    """Return the average u of the moments of the batches between two moving averages.

    Args:
        start: The moving mean and variance before.
        end: The moving mean and variance after some updates.
        kept: m^k, the weight of `start` in `end`.

    Returns:
        u, or `None` where it is not defined: without an update, for batches of one value, or where
        the rounding of float32 is as large as the standard deviation.
    """
    if kept >= 1 or all(map(np.array_equal, start, end)):
        return None
    mean, variance = ((b - kept * a) / (1 - kept) for a, b in zip(start, end, strict=True))
    rounding = np.finfo(np.float32).eps / (1 - kept)
    noise = max(
        10 * rounding * np.median(np.abs(end.variance)),
        (10 * rounding * np.median(np.abs(end.mean))) ** 2,
    )
    if np.median(np.abs(variance)) <= noise:
        return None
    return MeanVariance(mean, variance)


def between_batches(stats: LayerStats, batches: int, batch_size: int) -> np.ndarray:
    """Return the variance between the means of the swept batches beyond random batches.

    It is 0 for data in random order, and large for data ordered by class, where the last batches of
    an epoch do not represent all data. For a single batch it is unknown, and 0 is returned.
    """
    spread = np.nan_to_num(stats.mean_error) ** 2 * batches
    return np.maximum(spread - 2 * stats.variance / max(batch_size, 1), 0.0)


def effective_number(momentum: float, updates: int) -> float:
    """Return the number of equally weighted batches with the noise of u after some updates.

    The weights w_i are proportional to momentum^i, and the number is (sum w)^2 / sum w^2.
    """
    kept = momentum**updates
    return (1 + momentum) / (1 - momentum) * (1 - kept) / (1 + kept)


def known_channels(stats: LayerStats, ratio: float) -> np.ndarray:
    """Return which channels have a variance that the batches of `fit` determine.

    Args:
        stats: The population.
        ratio: The number of samples in the sweep, relative to the batches of `fit`.
    """
    error = np.nan_to_num(stats.variance_error) * np.sqrt(ratio)
    return error <= _MOST_ERROR * stats.variance


def distance_of(
    fed: MeanVariance,
    stats: LayerStats,
    between: np.ndarray | float = 0.0,
    noise: float = 1.0,
    known: np.ndarray | bool = True,
) -> Distance:
    """Return the distance of the moments of batches from a population.

    Args:
        fed: The average of the moments of batches.
        stats: The population.
        between: See `between_batches`: tolerated difference of the means, and part of the
            population's variance that may be missing within few batches.
        noise: The factor by which dropout and similar layers may increase the standard deviation.
        known: See `known_channels`.
    """
    tiny = np.finfo(np.float32).tiny
    varies = (stats.variance > 1e-6 * np.max(stats.variance, initial=tiny)) & known
    variance = np.maximum(stats.variance, tiny)
    fed_variance = np.maximum(fed.variance, 1e-12 * variance)
    difference = np.maximum(np.abs(fed.mean - stats.mean) - 2 * np.sqrt(between), 0.0)
    shift = np.square(difference) / np.sqrt(variance * fed_variance)
    nearest = np.clip(
        fed_variance, np.maximum(variance - between, 0.05 * variance), variance * noise**2
    )
    log_ratio = np.log(fed_variance / nearest) / 2
    if not varies.any():
        return Distance(0.0, 0.0)
    return Distance(float(np.sqrt(np.mean(shift[varies]))), float(np.mean(log_ratio[varies])))


def _comparable_layers(
    network: keras.Model,
) -> Iterator[tuple[str, tuple[keras.layers.BatchNormalization, int]]]:
    """Yield (path, (layer, number of calls)) for layers of level 1 with plain moving averages."""
    layers = keras_models.batch_norm_layers(network)
    for path, calls in first_level(network).items():
        layer = layers.get(path)
        if (
            layer is not None
            and type(layer).call.__module__.partition(".")[0] in ("keras", "tfbn")
            and not getattr(layer, "renorm", False)
            and keras.backend.standardize_dtype(layer.moving_mean.dtype) == "float32"
            and 0 <= layer.momentum < 1
        ):
            yield path, (layer, calls)


def _calls_once_a_step(model: keras.Model) -> bool:
    """Whether a step of `fit` certainly calls every layer as often as inference does."""
    custom = "train_step" in vars(model) or type(model).train_step is not keras.Model.train_step
    return not custom and keras_models.always_passes_training_on(model)


def _draws_in_training(model: keras.Model) -> bool:
    """Whether a model has random layers like dropout, noise or augmentation."""
    values = (
        value for layer in keras_models.layers(model).values() for value in vars(layer).values()
    )
    return any(isinstance(value, keras.random.SeedGenerator) for value in values)
