"""Two devices on any machine, the same random cases in every run, and which cases are quick."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings

# A failure is then one of the change. `--hypothesis-profile=others` draws other cases.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("others", deadline=None)
settings.load_profile("same")

[_cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def two_devices():
    """The strategy that mirrors on both. Two of them would mix up their collective operations."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `quick(n)` n cases are quick, spread over all of them; the rest is slow."""
    for _, cases in itertools.groupby(items, lambda item: item.nodeid.split("[")[0]):
        cases = list(cases)
        if mark := cases[0].get_closest_marker("quick"):
            quick = np.linspace(0, len(cases) - 1, *mark.args).round()
            for number in set(range(len(cases))).difference(quick):
                cases[number].add_marker(pytest.mark.slow)
