"""Tests of the alarm: noise is at least the sweep's standard errors."""

import functools

import numpy as np
import pytest

from tfbn.serving.monitor import alarm
from tfbn.serving.monitor.answers import Samples
from tfbn.stats import layer_stats, moments


def samples(x):
    return Samples(np.ones_like(x), x, np.zeros_like(x))


def swept(x):
    """Return the statistics of a sweep in batches of 32."""
    batches = [samples(batch).merged() for batch in np.split(x, range(32, len(x), 32))]
    merge = functools.partial(moments.merge, method="pooled")
    return layer_stats.of_calls([functools.reduce(merge, batches)], "pooled")


def p_values(population, x):
    """Return the p-value after every sample from the 16th on."""
    blocks, actual = alarm.Blocks(), []
    for number, sample in enumerate(samples(x).each(), 1):
        blocks.add(sample)
        if number >= 16:
            actual.append(
                alarm.network_distance([alarm.layer_distance(blocks, population, 1e-3)]).p_value
            )
    return actual


RARE = {
    "five normals and five flags of 0.3 %": lambda rng, n: np.concatenate(
        [rng.normal(size=(n, 5)), rng.random((n, 5)) < 0.003], 1
    ),
    "lognormal": lambda rng, n: rng.lognormal(3, 2, (n, 2)),
}


@pytest.mark.parametrize("kind", RARE)
def test_rare_values_are_no_alarm_while_none_has_come(kind):
    """12 runs; for 200 runs of ten populations see `benchmarks/monitor.py noise`."""
    unknown = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        population = swept(RARE[kind](rng, 2000))
        x = RARE[kind](rng, 60)
        assert min(p_values(population, x)) > 0.001
        nothing = np.full_like(population.mean, np.nan)
        unknown.append(min(p_values(population.with_errors(nothing, nothing), x[:40])) < 0.001)
    assert sum(unknown) > 3  # This requires the sweep's standard errors.


@pytest.mark.parametrize("seed", range(3))
def test_moved_data_is_seen_with_the_errors_of_the_sweep(seed):
    rng = np.random.default_rng(seed)
    population = swept(rng.normal(size=(2000, 6)))
    assert min(p_values(population, 1 + rng.normal(size=(40, 6)))) < 1e-6
    assert min(p_values(population, 0.3 * rng.normal(size=(40, 6)))) < 1e-4
    assert min(p_values(population, rng.normal(size=(40, 6)))) > 0.001


def test_the_noise_is_what_repeated_samples_show():
    """D^2 of new samples of the population has the expected size for every part."""
    rng = np.random.default_rng(0)
    actual = []
    for _ in range(60):
        x = RARE["five normals and five flags of 0.3 %"](rng, 2000)
        blocks = alarm.Blocks()
        for sample in samples(RARE["five normals and five flags of 0.3 %"](rng, 64)).each():
            blocks.add(sample)
        moved = alarm.layer_distance(blocks, swept(x), 1e-3)
        actual.append((moved.squared, moved.expected))
    squared, expected = np.mean(actual, 0)
    assert 0.8 * squared < expected < 3 * squared
