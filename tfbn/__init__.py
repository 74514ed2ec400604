"""Batch normalization for TensorFlow and Keras done right, from training to serving.

Batch norm trains with the mean and variance of a mini-batch and should infer with those of the
population (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2). Keras infers
with moving averages, which lag. With tfbn a model gets its population statistics:

- at the end of training: `model.fit(..., callbacks=[tfbn.PopulationStatsCallback(x_train)])`;
- when it is trained already: `tfbn.update_population_stats(model, x_train)`, or, without
  touching it, `stats = tfbn.collect(model, x_train)` and later `stats.assign(model)`.

Both work for Keras's own layer and for `tfbn.BatchNormalization`, a faster drop-in for it.
`tfbn.convert(model)` exchanges the one for the other. `tfbn.export(model, path)` writes a verified
SavedModel for TensorFlow Serving, `tfbn.describe(path)` says where its statistics came from, and
`tfbn.fold(model)` is the same network without batch norm layers. `tfbn.StatsTracker` logs
validation metrics with moving-average, population and mini-batch statistics side by side;
`tfbn.plot_drift` and `tfbn.plot_history` draw what was found. `python -m tfbn` does the same for
models in files.

A sweep uses all devices and workers of the strategy that a model was built for. Data that lies
in several places is swept in parts: `tfbn.PopulationStats.merge` joins them, `tfbn.collect_level`
is one level of an exact sweep, and `tfbn.beam.Collect` (to be imported by itself) an Apache Beam
transform.

Every function says what it computes, in which shapes and units, what it raises, and where the
method comes from: `help(tfbn.collect)` is the place to begin.
"""

from tfbn._requirements import check as _check

_check()

from tfbn._version import __version__  # noqa: E402
from tfbn.callback import PopulationStatsCallback  # noqa: E402
from tfbn.conversion import convert  # noqa: E402
from tfbn.layer import BatchNormalization  # noqa: E402
from tfbn.plots import plot_drift, plot_history  # noqa: E402
from tfbn.population import LayerStats, PopulationStats  # noqa: E402
from tfbn.serving.exporting import export  # noqa: E402
from tfbn.serving.folding import fold  # noqa: E402
from tfbn.serving.provenance import describe  # noqa: E402
from tfbn.sweep import collect, collect_shards, update_population_stats  # noqa: E402
from tfbn.tracker import StatsTracker  # noqa: E402

__all__ = [
    "BatchNormalization",
    "LayerStats",
    "PopulationStats",
    "PopulationStatsCallback",
    "StatsTracker",
    "__version__",
    "collect",
    "collect_shards",
    "convert",
    "describe",
    "export",
    "fold",
    "plot_drift",
    "plot_history",
    "update_population_stats",
]
