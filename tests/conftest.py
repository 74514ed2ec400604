"""Two devices on any machine, for the tests of distribution strategies."""

import pytest
import tensorflow as tf

[_cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def two_devices():
    """The strategy that mirrors on both. Two of them would mix up their collective operations."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
