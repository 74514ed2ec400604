"""Compute the population statistics of a frozen network.

`README.md` in this folder shows one sweep from top to bottom, defines the terms, and lists where
new code belongs.
"""

from tfbn.sweep.run import collect, update_population_stats
from tfbn.sweep.shards import collect_shards

__all__ = ["collect", "collect_shards", "update_population_stats"]
