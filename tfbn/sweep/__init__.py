"""The sweep: population statistics of a frozen network, from its data.

`README.md` in this folder shows one sweep from top to bottom, defines the terms, and says where
what goes.
"""

from tfbn.sweep.run import collect, update_population_stats
from tfbn.sweep.shards import collect_shards

__all__ = ["collect", "collect_shards", "update_population_stats"]
