"""Compute how much memory a sweep may use by default."""

import os
import pathlib
from collections.abc import Iterator

import tensorflow as tf

# TensorFlow has no public way to ask how much memory of an accelerator it may use.
from tensorflow.python.client import device_lib

_SHARE = 4  # A quarter.
_UNKNOWN = 2**30


def default_limit(root: str | os.PathLike = "/") -> int:
    """Compute a quarter of the free memory of the host or container, the smaller, in bytes.

    Returns 1 GiB if neither is known.

    Args:
        root: The folder with the file systems `proc` and `sys`.
    """
    free = [*_host(pathlib.Path(root)), *_container(pathlib.Path(root))]
    return max(min(free), 0) // _SHARE if free else _UNKNOWN


def accelerator_limit(device: str) -> int | None:
    """Compute half of the free memory of an accelerator, in bytes; `None` for a CPU.

    Free memory is what TensorFlow may allocate and has not allocated; 0 if unknown. The other half
    is for the computation.

    Args:
        device: The name of the device of a tensor.
    """
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type in (None, "CPU"):
        return None
    name = f"{spec.device_type}:{spec.device_index}"
    limits = {one.name: one.memory_limit for one in device_lib.list_local_devices()}
    try:
        used = tf.config.experimental.get_memory_info(name)["current"]
    except ValueError:  # TensorFlow does not support it on every kind of device.
        return 0
    return max(limits.get(f"/device:{name}", 0) - used, 0) // 2


def _host(root: pathlib.Path) -> Iterator[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return
    for name, _, value in (line.partition(":") for line in lines):
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _container(root: pathlib.Path) -> Iterator[int]:
    """Yield the bytes left by the control groups (versions 1 and 2) of this process."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        # A container often has its group as the root; the name on the host may not exist here.
        nested = base / path.strip("/")
        for folder in {base, nested, *(p for p in nested.parents if base in p.parents)}:
            try:
                most = int((folder / limit).read_text())
                # The kernel frees inactive cached files if memory is short.
                used = int((folder / usage).read_text()) - _inactive_files(folder / "memory.stat")
            except (OSError, ValueError):  # No limit here, or the word "max".
                continue
            if most < 2**60:  # In version 1 a larger number means no limit.
                yield most - used


def _inactive_files(path: pathlib.Path) -> int:
    for line in path.read_text().splitlines():
        name, value = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
