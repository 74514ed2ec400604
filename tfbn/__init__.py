"""Batch normalization for TensorFlow and Keras done right, from training to serving."""

from tfbn._requirements import check as _check

_check()

from tfbn._version import __version__  # noqa: E402
from tfbn.callback import PopulationStatsCallback  # noqa: E402
from tfbn.convert import convert  # noqa: E402
from tfbn.export import describe, export  # noqa: E402
from tfbn.fold import fold  # noqa: E402
from tfbn.layer import BatchNormalization  # noqa: E402
from tfbn.stats import LayerStats, PopulationStats  # noqa: E402
from tfbn.sweep import collect, update_population_stats  # noqa: E402

__all__ = [
    "BatchNormalization",
    "LayerStats",
    "PopulationStats",
    "PopulationStatsCallback",
    "__version__",
    "collect",
    "convert",
    "describe",
    "export",
    "fold",
    "update_population_stats",
]
