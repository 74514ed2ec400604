"""Batch normalization for TensorFlow and Keras done right, from training to serving.

Batch norm trains with the mean and variance of a mini-batch and should infer with those of the
population (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2). Keras infers
with moving averages, which lag. With tfbn a model gets its population statistics:

- at the end of training: `model.fit(..., callbacks=[tfbn.PopulationStatsCallback(x_train)])`;
- when it is trained already: `tfbn.update_population_stats(model, x_train)`, or, without
  touching it, `stats = tfbn.collect(model, x_train)` and later `stats.assign(model)`;
- for the length of a block: `with tfbn.population_stats(model, x_train): evaluate()`.

All work for Keras's own layer and for `tfbn.BatchNormalization`, a faster drop-in for it.
`tfbn.convert(model)` exchanges the one for the other. `tfbn.export(model, path)` writes a verified
SavedModel for TensorFlow Serving, `tfbn.describe(path)` says where its statistics came from, and
`tfbn.fold(model)` is the same network without batch norm layers. With `monitor=True` the server
measures the inputs of the batch norm layers, `tfbn.ServedStats(path)` tells whether they have left
the population, and `tfbn.recalibrate(path, x)` moves the population there, in the model's next
version. `tfbn.StatsTracker` logs validation metrics with moving-average, population and mini-batch
statistics side by side; `tfbn.plot_drift` and `tfbn.plot_history` draw the difference.
`python -m tfbn` does the same for models in files.

A sweep uses all devices and workers of the strategy that a model was built for. Data that lies
in many places is swept by `tfbn.collect_shards`, on any engine that has a map, and by
`tfbn.beam.Collect` (to be imported by itself), an Apache Beam transform.

Every function has its formula, shapes, units, errors and the source of its method in its
documentation: `help(tfbn.collect)` is the place to begin.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tfbn import _requirements
from tfbn._version import __version__

if TYPE_CHECKING:
    from tfbn.callbacks.population_stats import PopulationStatsCallback
    from tfbn.callbacks.swapping import population_stats
    from tfbn.callbacks.tracker import StatsTracker
    from tfbn.layer import BatchNormalization
    from tfbn.models.conversion import convert
    from tfbn.models.folding import fold
    from tfbn.plots import plot_drift, plot_history
    from tfbn.population import LayerStats, PopulationStats
    from tfbn.serving.export.exporting import export
    from tfbn.serving.monitor.served_stats import ServedStats
    from tfbn.serving.provenance import describe
    from tfbn.serving.recalibrate.recalibration import recalibrate
    from tfbn.sweep.run import collect, update_population_stats
    from tfbn.sweep.shards import collect_shards

__all__ = [
    "BatchNormalization",
    "LayerStats",
    "PopulationStats",
    "PopulationStatsCallback",
    "ServedStats",
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
    "population_stats",
    "recalibrate",
    "update_population_stats",
]

# The modules of the names above, which are imported when a name is first used. `TYPE_CHECKING`
# says the same to type checkers and editors.
_MODULES = {
    "BatchNormalization": "tfbn.layer",
    "LayerStats": "tfbn.population",
    "PopulationStats": "tfbn.population",
    "PopulationStatsCallback": "tfbn.callbacks.population_stats",
    "ServedStats": "tfbn.serving.monitor.served_stats",
    "StatsTracker": "tfbn.callbacks.tracker",
    "collect": "tfbn.sweep.run",
    "collect_shards": "tfbn.sweep.shards",
    "convert": "tfbn.models.conversion",
    "describe": "tfbn.serving.provenance",
    "export": "tfbn.serving.export.exporting",
    "fold": "tfbn.models.folding",
    "plot_drift": "tfbn.plots",
    "plot_history": "tfbn.plots",
    "population_stats": "tfbn.callbacks.swapping",
    "recalibrate": "tfbn.serving.recalibrate.recalibration",
    "update_population_stats": "tfbn.sweep.run",
}

_requirements.check()
_requirements.register_with_keras()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import keras  # noqa: F401 - so that Keras itself is asked for its backend

    _requirements.check()
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
