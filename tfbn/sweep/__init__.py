"""The sweep: population statistics of a frozen network, from its data.

The terms, each used in this sense only:

- Sweep: all passes over the data that one set of statistics takes. `run.py` makes one from the
  arguments of `collect`, `shards.py` from data in many places.
- Shard: the data of one process, or of one task. `shard_sweep.py` sweeps it, one level at a time.
- Batch: inputs of the model with the digest of their samples. `batches.py` makes batches of
  whatever `fit` takes, `digests.py` the digests.
- Call, site: a model calls a layer once or several times; a site is a layer's path and the number
  of the call. `observation.py` observes calls, `inference.py` keeps the model unchanged meanwhile.
- Moments: count, mean and M2 of values that enter a layer, see `tfbn.stats.moments`.
- Population: the mean and variance of a layer over the whole data.
- Trace: the graph of the network for batches of one signature. `network.py` makes it once for all
  sweeps of a model.
- Settled: a layer whose population is known.
- Level: one more than the highest level among the layers that a layer depends on.
- Pass: one run over the batches. `cut_passes.py` cuts the network at its levels, and a pass
  computes the next one; `uncut_passes.py` runs all of it, for one-pass methods and for networks
  that cannot be cut. Both have `start`, `levels`, `not_nan` and `advance`.
- Segment: the piece of the graph between the frontiers of two neighbouring levels, taken out by
  `extraction.py`.
- Frontier: the tensors of one batch that live past a level. `frontiers.py` keeps those for which
  there is memory.
- State: the accumulator of a sweep, `state.py`: it takes batches, merges with the state of
  another shard, goes to the next level, and is finished into a `tfbn.PopulationStats`.
- Method: how a sweep goes, one row in `methods.py`.
- Device, worker: where a sweep runs, by the model's `tf.distribute` strategy: `devices.py` within
  a process, `workers.py` between processes.
- Checkpoint: a state in a file, `checkpoint.py`, from which an interrupted sweep goes on.

Data flows from `run.py` and `shards.py` through `shard_sweep.py` to the passes, the network and the
kernels; moments flow back into the state.
"""

from tfbn.sweep.run import collect, update_population_stats
from tfbn.sweep.shards import collect_shards

__all__ = ["collect", "collect_shards", "update_population_stats"]
