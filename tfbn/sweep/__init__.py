"""The sweep: population statistics of a frozen network, from its data."""

from tfbn.sweep.run import collect, collect_level, update_population_stats

__all__ = ["collect", "collect_level", "update_population_stats"]
