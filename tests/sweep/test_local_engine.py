"""Tests of the engine of one process."""

import collections
import threading

import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.sweep import cut_passes, frontiers, memory, trace


# 8 samples take 4608 bytes at the first frontier and 3072 at the second.
@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("memory_limit", "reads", "starts"),
    [
        (5 * 4608, 1, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]),
        (4 * 4608, 2, [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]),
        (2 * 4608, 3, [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0]),
        (3072, 3, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]),
        (0, 3, [0] * 15),
    ],
)
def test_what_fits_in_memory_is_not_computed_again(memory_limit, reads, starts, monkeypatch):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 40)
    read, started = [], []
    original = cut_passes.CutPasses.run

    def run(self, batch, start, *args):
        started.append(start.level if start else 0)
        return original(self, batch, start, *args)

    monkeypatch.setattr(cut_passes.CutPasses, "run", run)

    class Read:
        def __iter__(self):
            for i in range(0, 40, 8):
                if i == 32:
                    read.append(i)
                yield x[i : i + 8]

    stats = tfbn.collect(model, Read(), method="exact", memory_limit=memory_limit, verbose=0)
    assert (len(read), started) == (reads, starts)
    [expected] = networks.in_training(networks.plain, model, x, [slice(None)])
    networks.assert_statistics(stats, expected, model=model)


def replicas(strategy):
    with strategy.scope():
        model = networks.residual(tfbn.BatchNormalization)
    return model, networks.data(model, 48)


@pytest.fixture
def runs(monkeypatch):
    """Return thread -> inputs and outputs of each part of the network that ran."""
    runs = collections.defaultdict(list)
    original = trace.Part.run

    def run(part, values, populations):
        placed = [populations(site) for site in part.sites]
        observed, frontier = original(part, values, populations)
        moments = [value for _, of_call in observed for value in of_call]
        runs[threading.get_ident()].append(([*values, *placed], [*frontier, *moments]))
        return observed, frontier

    monkeypatch.setattr(trace.Part, "run", run)
    return runs


def test_nothing_crosses_devices_between_levels(two_devices, runs):
    model, x = replicas(two_devices)
    levels = tfbn.collect(model, x, batch_size=8, verbose=0).levels
    ran = [one for of_thread in runs.values() for one in of_thread]
    assert len(ran) == 6 * levels  # Each batch ran each part once.
    by_device = collections.Counter()
    for entered, left in ran:
        [device] = {value.device for value in left}
        by_device[device[-5:]] += 1
        if entered[0].shape != [8, *x.shape[1:]]:  # The inputs are on the CPU.
            assert {value.device for value in entered} == {device}
    assert by_device == {"CPU:0": 3 * levels, "CPU:1": 3 * levels}


def test_where_an_accelerator_is_full_its_batches_are_computed_again(
    two_devices, runs, monkeypatch
):
    model, x = replicas(two_devices)
    expected = tfbn.collect(model, x, batch_size=8, verbose=0)
    runs.clear()
    monkeypatch.setattr(
        memory, "accelerator_limit", lambda device: 0 if device.endswith("CPU:1") else None
    )
    monkeypatch.setattr(frontiers, "_MOVED_AND_BACK", np.inf)
    actual = tfbn.collect(model, x, batch_size=8, verbose=0)
    levels = actual.levels
    by_device = collections.Counter(
        left[0].device[-5:] for of_thread in runs.values() for _, left in of_thread
    )
    assert by_device == {"CPU:0": 3 * levels, "CPU:1": 3 * levels * (levels + 1) // 2}
    for path in expected:
        np.testing.assert_array_equal(actual[path].mean, expected[path].mean)
