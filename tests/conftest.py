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


_FOLDERS_RUN_ON_DEVICES = {"layer", "sweep", "callbacks"}


def pytest_addoption(parser):
    gpus = [f"GPU:{k}" for k in range(len(tf.config.list_physical_devices("GPU")))]
    help = "where the tests of layer, sweep and callbacks run (default: all GPUs, and the CPU)"
    parser.addoption("--devices", nargs="+", default=[*gpus, "CPU:0"], help=help)


def pytest_report_header():
    gpus = [
        tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return f"TensorFlow {tf.__version__}, Keras {tf.keras.__version__}, GPUs: {gpus or 'none'}"


def pytest_generate_tests(metafunc):
    devices = metafunc.config.getoption("devices")
    if len(devices) > 1 and metafunc.definition.path.parent.name in _FOLDERS_RUN_ON_DEVICES:
        metafunc.parametrize("device", devices, indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def device(request):
    """The device that runs the test, where there are several."""
    if hasattr(request, "param"):
        with tf.device(request.param):
            yield request.param
    else:
        yield None


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
