"""The sweep: population statistics of a frozen network, from its data.

One sweep, from top to bottom:

    run.collect -> driver.run_levels -> engine.run_level -> replica.run_level -> passes.run
                   state.advance        data, cache         model, devices       one batch

The terms, each used in this sense only:

- Sweep: all passes over the data that one set of statistics takes. `run.py` starts one from the
  arguments of `collect`, `options.py` has these and the methods, `driver.py` the loops.
- Engine: runs the levels over all data: in this process (`local_engine.py`), with other workers of
  a `tf.distribute` strategy (`workers.py`), or as a map of tasks (`shards.py`, with one replica a
  process: `processes.py`). `tfbn.beam` unrolls the levels into stages.
- Replica: a model in one process, with a network and the placed populations on each device.
- Batch: inputs of the model with digests of their samples (`batches.py`), from one of the kinds of
  data that `fit` takes (`adapters.py`, `data.py`).
- Call, site: a model calls a layer once or several times; a site is a layer's path and the number
  of the call. `observation.py` observes calls, `inference.py` keeps the model unchanged meanwhile.
- Moments: count, mean and M2 of values that enter a layer, see `tfbn.stats.moments`.
- Population: the mean and variance of a layer over the whole data. A layer whose population is
  known is settled.
- Trace: the graph of the network for batches of one signature (`trace.py`), one for all sweeps of
  a model (`network.py`).
- Level: one more than the highest level among the layers that a layer depends on. A segment is the
  part of the graph between two levels, a frontier the tensors of one batch that later levels need.
  `tfbn.graphs.levels` cuts a graph, `frontiers.py` caches frontiers.
- Pass: one run over the batches. `cut_passes.py` computes the next level of each; `uncut_passes.py`
  runs the whole network, for one-pass methods and for networks that cannot be cut, whose passes
  go on to a fixed point (`fixed_point.py`).
- State: the progress of a sweep, `state.py`: it takes batches, merges with other shards, advances
  to the next level. `results.py` makes it a `tfbn.PopulationStats`. A checkpoint is a state in a
  file.
"""

from tfbn.sweep.run import collect, update_population_stats
from tfbn.sweep.shards import collect_shards

__all__ = ["collect", "collect_shards", "update_population_stats"]
