"""Blend population statistics of few samples with the statistics of the training data.

Few samples from the field estimate its statistics with a large error. The statistics of the
source, the data that a model was trained on, have a small error, but describe other data. Blending
takes their weighted average (Schneider et al. 2020, "Improving robustness against common
corruptions by covariate shift adaptation", section 3, https://arxiv.org/abs/2006.16971).

This is insurance, and it has a price. With images of digits (`examples/served_population.py`) that
had not shifted, statistics of one request cost 13 points of accuracy, of four 7, of eight 3; N = 4
reduced that to about 1. Where light or contrast had shifted much, N = 1 cost up to 40 points of the
gain from few requests and N = 16 up to 60; from about n = 64 N on, a point or less. With
Fashion-MNIST (two trainings of one epoch on its 60,000 images), statistics of one unshifted request
cost 42 points, of four 10 and of eight 4, and N = 4 reduced that to 1 to 3; at a quarter of the
contrast N = 1 still cost 5 points of the gain from 64 requests and 2 from 500.

Recommendation: N = 0 if a monitor shows that the data has moved, or from 16 samples on; N = 4 for
fewer samples of data that may not have moved.
"""

from typing import TYPE_CHECKING

import numpy as np

from tfbn import arguments

if TYPE_CHECKING:
    from tfbn.population import PopulationStats
    from tfbn.stats.layer_stats import LayerStats


def share(samples: int, field_samples: int) -> float:
    """Return the weight of the source, samples / (samples + field_samples), from 0 to 1.

    Raises:
        ValueError: If `samples` is not an integer from 0, or `field_samples` not one from 1, to
            2**53.
    """
    source = arguments.integer("samples", samples)
    return source / (source + arguments.integer("field_samples", field_samples, least=1))


def weighted(
    field: "LayerStats", source: "LayerStats", share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance, each share * source + (1 - share) * field."""
    return (
        share * source.mean + (1 - share) * field.mean,
        share * source.variance + (1 - share) * field.variance,
    )


def require_blendable(field: "PopulationStats", source: "PopulationStats") -> None:
    """Raise `ValueError` unless `source` can be blended into the swept statistics `field`."""
    if field.method == "assigned" or field.prior_samples or not field.samples:
        raise ValueError(
            f"Expected unblended statistics of a sweep. Received: {field!r}. Use tfbn.collect."
        )
    if not hasattr(source, "fingerprint"):
        raise ValueError(
            f"Expected PopulationStats, like stats.previous. Received: {type(source)}."
        )
    for path in field:
        if path not in source:
            raise ValueError(
                f"Expected layer {path!r} in source. Received: {list(source)}. Use stats.previous."
            )
    if field.fingerprint != source.fingerprint or not field.fingerprint:
        raise ValueError(
            "Expected a source with the same weights, like stats.previous. Received: fingerprint "
            f"{source.fingerprint[:12]!r}, not {field.fingerprint[:12]!r}."
        )


def in_words(samples: int, prior_samples: int) -> str:
    """Return one line about a blend, or an empty string without one."""
    if not prior_samples:
        return ""
    return f"blended: {samples} field samples, {prior_samples} prior samples"
