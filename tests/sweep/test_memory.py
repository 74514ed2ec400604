"""Tests of the default memory limit of a sweep, on made-up file systems."""

from types import SimpleNamespace

import pytest
import tensorflow as tf
from tensorflow.python.client import device_lib

from tfbn.sweep.memory import accelerator_limit, default_limit

MIB = 2**20


def system(root, files):
    """Write files below a root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


def host(available):
    """Return the files in `proc` for the free memory of a host."""
    return {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available // 1024} kB\n"}


def version_2(folder, limit, used, inactive=0):
    """Return the files of a control group, version 2."""
    return {
        f"sys/fs/cgroup/{folder}memory.max": limit,
        f"sys/fs/cgroup/{folder}memory.current": used,
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def test_a_quarter_of_what_the_host_has_free(tmp_path):
    assert default_limit(system(tmp_path, host(800 * MIB))) == 200 * MIB


def test_one_gibibyte_where_nothing_is_known(tmp_path):
    assert default_limit(tmp_path) == 1024 * MIB


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "expected"),
    [
        (400 * MIB, 100 * MIB, 0, 75 * MIB),  # The container has less.
        (400 * MIB, 100 * MIB, 60 * MIB, 90 * MIB),  # Cached files can be evicted.
        (4000 * MIB, 100 * MIB, 0, 200 * MIB),  # The host has less.
        ("max", 100 * MIB, 0, 200 * MIB),
        (100 * MIB, 101 * MIB, 0, 0),  # Never negative.
    ],
)
@pytest.mark.parametrize("folder", ["", "system.slice/job/"])
def test_the_smaller_of_host_and_container(tmp_path, folder, limit, used, inactive, expected):
    files = host(800 * MIB) | version_2(folder, limit, used, inactive)
    files["proc/self/cgroup"] = f"0::/{folder.rstrip('/')}\n"
    assert default_limit(system(tmp_path, files)) == expected


def test_a_group_further_up_may_be_the_smallest(tmp_path):
    files = host(800 * MIB)
    files |= version_2("a/b/", 400 * MIB, 0) | version_2("a/", 80 * MIB, 40 * MIB)
    files |= {"proc/self/cgroup": "0::/a/b\n"}
    assert default_limit(system(tmp_path, files)) == 10 * MIB


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    files = host(800 * MIB) | version_2("", 40 * MIB, 0)
    files |= {"proc/self/cgroup": "0::/docker/0123456789abcdef\n"}
    assert default_limit(system(tmp_path, files)) == 10 * MIB


@pytest.mark.parametrize(
    ("limit", "expected"), [(40 * MIB, 10 * MIB), (9223372036854771712, 200 * MIB)]
)
def test_control_groups_of_version_1(tmp_path, limit, expected):
    base = "sys/fs/cgroup/memory/job/"
    files = host(800 * MIB) | {
        "proc/self/cgroup": "12:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n",
        base + "memory.limit_in_bytes": limit,
        base + "memory.usage_in_bytes": 10 * MIB,
        base + "memory.stat": f"cache 5\ntotal_inactive_file {10 * MIB}\n",
    }
    assert default_limit(system(tmp_path, files)) == expected


def test_no_limit_of_version_1_is_not_known(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 10 * MIB,
        "sys/fs/cgroup/memory/memory.stat": "",
    }
    assert default_limit(system(tmp_path, files)) == 1024 * MIB


def test_groups_without_limits_of_their_own_are_no_error(tmp_path):
    files = host(800 * MIB) | {"proc/self/cgroup": "0::/nowhere\n3:memory:/\n"}
    assert default_limit(system(tmp_path, files)) == 200 * MIB


def test_a_group_that_does_not_tell_its_inactive_files(tmp_path):
    group = version_2("", 900 * MIB, 100 * MIB) | {"sys/fs/cgroup/memory.stat": "anon 1\n"}
    files = host(4000 * MIB) | group | {"proc/self/cgroup": "0::/\n"}
    assert default_limit(system(tmp_path, files)) == 200 * MIB


def test_tensorflow_lists_devices_with_their_memory():
    """Private API. The limit of a CPU replaces the limit of a GPU, which may not exist."""
    limits = {one.name: one.memory_limit for one in device_lib.list_local_devices()}
    assert limits["/device:CPU:0"] > 0


@pytest.mark.parametrize("used", [0, 30, 99, 200])
def test_half_of_the_free_memory_of_an_accelerator(monkeypatch, used):
    devices = [SimpleNamespace(name=f"/device:GPU:{k}", memory_limit=100 * k) for k in range(2)]
    monkeypatch.setattr(device_lib, "list_local_devices", lambda: devices)
    info = {"GPU:1": {"current": used, "peak": 0}}
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", info.__getitem__)
    name = "/job:localhost/replica:0/task:0/device:GPU:1"
    assert accelerator_limit(name) == max(100 - used, 0) // 2


def test_a_cpu_has_main_memory_and_an_unknown_device_no_room(monkeypatch):
    with tf.device("CPU:1"):
        assert accelerator_limit(tf.zeros([]).device) is None
    devices = [SimpleNamespace(name="/device:TPU:0", memory_limit=100)]
    monkeypatch.setattr(device_lib, "list_local_devices", lambda: devices)
    for number in range(2):  # TensorFlow does not report how much of the first is in use.
        assert accelerator_limit(f"/job:localhost/replica:0/task:0/device:TPU:{number}") == 0
