"""The sweep: population statistics of a frozen network, from its data."""

from tfbn.sweep.run import collect, update_population_stats

__all__ = ["collect", "update_population_stats"]
