"""Batch normalization for TensorFlow and Keras done right, from training to serving.

train
    PopulationStatsCallback   set population statistics at the end of `fit`, or after every epoch
    population_stats          context manager: population statistics for the length of a block
    StatsTracker              log validation metrics with each kind of statistics
    BatchNormalization        drop-in for Keras's layer, faster in training
    convert                   copy a model with that layer in place of Keras's
sweep
    update_population_stats   set the population statistics of a trained model
    collect                   compute them, and change nothing
    collect_shards            the same over data in many places, with any `map`
    beam.Collect              the same in Apache Beam (`import tfbn.beam`)
    PopulationStats           the result: assign, undo, compare, merge, blend, save
    LayerStats                mean, variance and standard errors of a layer in it
    plot_drift, plot_history  draw how far moving averages are off, and what that costs
serve
    export                    write a verified SavedModel for TensorFlow Serving
    describe                  where a SavedModel's statistics came from, in words and as a dict
    fold                      copy an inference network without batch norm layers
    ServedStats               compare the data that a model is served with its population
    recalibrate               write a served model's next version, with statistics of new data

`help(tfbn.collect)` has formulas, shapes, units, errors and sources, as all of these have, and
`python -m tfbn` works on files.

Batch norm trains with the mean and variance of a mini-batch and should infer with those of the
population (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2). Keras infers
with moving averages, which lag. All of the above works for Keras's own layer and for tfbn's, and
on all devices and workers of the strategy that a model was built for.
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
