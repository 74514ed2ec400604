"""The methods of a sweep, one row of flags each."""

from typing import NamedTuple


class Method(NamedTuple):
    """Properties of a method.

    Attributes:
        by_level: Whether a layer is observed while the layers before it normalize with their
            population statistics, level by level. Otherwise they normalize with the moments of
            the batch, as in training, and one pass observes all layers.
        batches_matter: Whether the statistics depend on the split of the data into batches.
        averages_variances: Whether the variance is the average of the unbiased variances of the
            batches (Ioffe & Szegedy 2015, Algorithm 2, step 10). Otherwise it is the variance of
            all values.
    """

    by_level: bool
    batches_matter: bool
    averages_variances: bool


METHODS = {
    "exact": Method(by_level=True, batches_matter=False, averages_variances=False),
    "pooled": Method(by_level=False, batches_matter=True, averages_variances=False),
    "algorithm2": Method(by_level=False, batches_matter=True, averages_variances=True),
}
