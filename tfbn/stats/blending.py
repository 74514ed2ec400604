"""Population statistics of few samples, blended with those of the population before.

Few samples from the field estimate its statistics with a large error; the statistics of the
source, the data that a model was trained on, have no such error but are of other data. Between
the two lies their weighted average (Schneider et al. 2020, "Improving robustness against common
corruptions by covariate shift adaptation", section 3, https://arxiv.org/abs/2006.16971).

It is insurance, and has its price. With images of digits
(`examples/served_population.py`) that had not shifted at all, one request alone cost 13 points of
accuracy, four 7, eight 3; N = 4 left about 1 of that. Where light or contrast had shifted much,
N = 1 cost up to 40 points of the gain of few requests and N = 16 up to 60, and from about n = 64 N
on it cost a point or less. With Fashion-MNIST, two trainings of one epoch on its 60,000 images,
unshifted requests alone cost 42 points for one, 10 for four and 4 for eight, and N = 4 left 1 to 3
of that; at a quarter of the contrast N = 1 still cost 5 points of 64 requests' gain and 2 of 500's.

So take 0 where a monitor says that the data has moved, or from 16 samples on, and 4 for fewer
samples of data that may not have.
"""

from typing import TYPE_CHECKING

import numpy as np

from tfbn import arguments

if TYPE_CHECKING:
    from tfbn.population import PopulationStats
    from tfbn.stats.layer_stats import LayerStats


def share(samples: int, field_samples: int) -> float:
    """The weight of the source, samples / (samples + field_samples), from 0 to 1.

    Raises:
        ValueError: If `samples` is no whole number from 0 to 2**53, or `field_samples` none from 1.
    """
    source = arguments.whole("samples", samples)
    return source / (source + arguments.whole("field_samples", field_samples, least=1))


def weighted(
    own: "LayerStats", source: "LayerStats", share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, each share of the source's plus 1 - share of its own."""
    return (
        share * source.mean + (1 - share) * own.mean,
        share * source.variance + (1 - share) * own.variance,
    )


def require_blendable(own: "PopulationStats", source: "PopulationStats") -> None:
    """Raise `ValueError` unless the statistics of a source can be blended into those of a sweep."""
    if own.method == "assigned" or own.source_weight or not own.samples:
        raise ValueError(
            "Expected statistics of a sweep over samples from the field, not blended yet. "
            f"Received: {own!r}. Blend the result of tfbn.collect."
        )
    if not hasattr(source, "fingerprint"):
        raise ValueError(
            f"Expected PopulationStats of the source. Received: {type(source)}. `stats.previous` "
            "is the model's statistics before the sweep."
        )
    for path in own:
        if path not in source:
            raise ValueError(
                f"Expected a source with the same layers. Received: one without layer {path!r}; "
                f"it has {list(source)}. These statistics belong to different models."
            )
    if own.fingerprint != source.fingerprint or not own.fingerprint:
        raise ValueError(
            "Expected a source and a sweep of the same weights. Received: fingerprints "
            f"{source.fingerprint[:12]!r} of the source and {own.fingerprint[:12]!r} of the sweep. "
            "Blend with `stats.previous`, the model's own when it was swept, or with "
            "a sweep of the same weights over the training data."
        )


def in_words(samples: int, source_weight: int) -> str:
    """The record of a blend, for people; empty without one."""
    if not source_weight:
        return ""
    return f"blended: {samples} field samples, source weight {source_weight}"
