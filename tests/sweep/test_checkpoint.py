"""Tests of sweeps that are interrupted and resumed from a checkpoint."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys

import damage
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.files import sealed
from tfbn.sweep import checkpoint as module
from tfbn.sweep import run, state_bytes
from tfbn.sweep.cut_passes import CutPasses
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.replica import Replica
from tfbn.sweep.uncut_passes import UncutPasses

HERE = pathlib.Path(__file__).parents[1]
BATCHES = 6


class Data(keras.utils.PyDataset):
    """Batches of a network's data. One read may fail; reads are counted."""

    def __init__(self, x, fails_at=None, error=RuntimeError):
        super().__init__()
        self.x, self.fails_at, self.error = x, fails_at, error
        self.read = 0

    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        # The first batch is read two more times at the start, to detect shuffled data.
        if self.read - 2 == self.fails_at:
            raise self.error("stop")
        self.read += 1
        return self.x[7 * i : 7 * i + 7], None


@pytest.fixture(autouse=True)
def save_at_every_batch(monkeypatch):
    monkeypatch.setattr(module.Checkpoint, "share", float("inf"))


@pytest.fixture
def runs(monkeypatch):
    """Record every batch that the network runs."""
    counted = []
    for passes in (CutPasses, UncutPasses):

        def run(self, *args, original=passes.run):
            counted.append(self)
            return original(self, *args)

        monkeypatch.setattr(passes, "run", run)
    return counted


def same_to_the_bit(a, b):
    assert a == b
    for name in ("method", "samples", "batches", "batch_size", "fingerprint"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("method", "error"),
    [("pooled", RuntimeError), ("algorithm2", RuntimeError), ("exact", KeyboardInterrupt)],
)
def test_an_interrupted_sweep_goes_on_to_the_same_result(tmp_path, method, error, runs):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES - 2)
    options = {"method": method, "verbose": 0, "memory_limit": 0}
    whole = tfbn.collect(model, Data(x), **options)
    [expected] = networks.in_training(networks.plain, model, x, [slice(None)])
    path = tmp_path / "sweep"
    passes = 3 if method == "exact" else 1
    for fails_at in range(passes * BATCHES):
        runs.clear()
        with pytest.raises(error, match="stop"):
            tfbn.collect(model, Data(x, fails_at, error), checkpoint=path, **options)
        # A failure at the first batch leaves nothing to resume.
        assert path.exists() == (fails_at > 0)
        stats = tfbn.collect(model, Data(x), checkpoint=path, **options)
        same_to_the_bit(stats, whole)
        assert len(runs) == passes * BATCHES  # No batch was run twice.
        assert os.listdir(tmp_path) == []
    if method == "exact":
        networks.assert_statistics(whole, expected)


def test_again_and_again(tmp_path, runs):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    options = {"method": "exact", "verbose": 0}
    whole = tfbn.collect(model, Data(x), **options)
    runs.clear()
    for _ in range(3 * BATCHES):
        # Three more batches each time, after the stored batches of this level.
        done = (len(runs) - 1) % BATCHES + 1 if runs else 0
        try:
            stats = tfbn.collect(model, Data(x, done + 3), checkpoint=tmp_path / "c", **options)
        except RuntimeError:
            continue
        break
    assert len(runs) == 3 * BATCHES
    same_to_the_bit(stats, whole)


def test_on_two_devices(tmp_path, two_devices):
    with two_devices.scope():
        model = networks.plain(tfbn.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    options = {"method": "exact", "verbose": 0, "memory_limit": 0}
    whole = tfbn.collect(model, Data(x), **options)
    for fails_at in (3, 8, 16):
        with pytest.raises(RuntimeError, match="stop"):
            tfbn.collect(model, Data(x, fails_at), checkpoint=tmp_path / "c", **options)
        stats = tfbn.collect(model, Data(x), checkpoint=tmp_path / "c", **options)
        same_to_the_bit(stats, whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import keras, networks, numpy as np, tfbn
from keras import layers
from tfbn.sweep import checkpoint
checkpoint.Checkpoint.share = float("inf")
model = keras.models.load_model(sys.argv[2])
x = networks.data(model, 200)
read = 0
def batch(i):
    global read
    read += 1
    if read == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return x[i : i + 10]
class Data(keras.utils.PyDataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        return batch(10 * i), None
stats = tfbn.collect(
    model, Data(), method="exact", checkpoint=sys.argv[3], verbose=0, memory_limit=0
)
stats.save(sys.argv[3] + ".npz")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another(tmp_path):
    model = networks.plain(layers.BatchNormalization)
    model.save(tmp_path / "model.keras")

    def run(at):
        names = [str(HERE), str(tmp_path / "model.keras"), str(tmp_path / "c"), str(at)]
        return subprocess.run([sys.executable, "-c", KILLED, *names], timeout=120).returncode

    assert run(35) == -signal.SIGKILL
    assert (tmp_path / "c").exists() and not (tmp_path / "c.npz").exists()
    assert run(-1) == 0
    assert not (tmp_path / "c").exists()
    x = networks.data(model, 200)
    whole = tfbn.collect(model, x, method="exact", batch_size=10, verbose=0, memory_limit=0)
    same_to_the_bit(tfbn.PopulationStats.load(tmp_path / "c.npz"), whole)


def interrupted(tmp_path, model, x, method="pooled", **options):
    """Return the checkpoint of a sweep that was interrupted after four batches."""
    with pytest.raises(RuntimeError, match="stop"):
        tfbn.collect(
            model, Data(x, 4), method=method, checkpoint=tmp_path / "c", verbose=0, **options
        )
    return tmp_path / "c"


def test_what_cannot_be_resumed_is_refused(tmp_path):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(100).batch(7)
    for data, words in [((b for b in [x, x]), "read only once"), (dataset, "another every time")]:
        with pytest.raises(ValueError, match=f"(?s)same order every time.*{words}"):
            tfbn.collect(model, data, checkpoint=tmp_path / "c", verbose=0)
    assert os.listdir(tmp_path) == []
    unshuffled = tf.data.Dataset.from_tensor_slices(x).batch(7)
    for data in (x, unshuffled):  # The advice.
        stats = tfbn.collect(model, data, checkpoint=tmp_path / "c", verbose=0)
        networks.assert_exact(stats, networks.plain, model, x)

    path = interrupted(tmp_path, model, x)
    held = path.read_bytes()
    swapped = x[np.r_[0:7, 14:21, 7:14, 21 : len(x)]]
    shorter = x[:21]
    other = x.copy()
    other[10] += 1
    for data in (swapped, shorter, other):
        with pytest.raises(ValueError, match=r"is of other data.*after 4 batches.*Delete it"):
            tfbn.collect(model, data, method="pooled", checkpoint=path, verbose=0, batch_size=7)
    with pytest.raises(ValueError, match="has method 'pooled' and not 'exact'"):
        tfbn.collect(model, Data(x), method="exact", checkpoint=path, verbose=0)
    model.layers[1].trainable = False
    with pytest.raises(ValueError, match="has paths"):
        tfbn.collect(model, Data(x), method="pooled", checkpoint=path, verbose=0)
    model.layers[1].trainable = True
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    with pytest.raises(ValueError, match="has fingerprint"):
        tfbn.collect(model, Data(x), method="pooled", checkpoint=path, verbose=0)
    assert path.read_bytes() == held
    path.unlink()  # The advice.
    stats = tfbn.collect(model, Data(x), method="exact", checkpoint=path, verbose=0)
    networks.assert_exact(stats, networks.plain, model, x)


def test_a_full_disk_is_an_error_and_leaves_what_was_saved(tmp_path, monkeypatch):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    path = interrupted(tmp_path, model, x)
    held = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            tfbn.collect(model, Data(x), method="pooled", checkpoint=path, verbose=0)
    assert os.listdir(tmp_path) == ["c"] and path.read_bytes() == held
    stats = tfbn.collect(model, Data(x), method="pooled", checkpoint=path, verbose=0)
    same_to_the_bit(stats, tfbn.collect(model, Data(x), method="pooled", verbose=0))


def test_a_folder_that_is_not_there_is_an_error_at_the_start(tmp_path):
    model = networks.plain(layers.BatchNormalization)
    x, path = networks.data(model, 20), tmp_path / "no" / "c"
    with pytest.raises(ValueError, match=r"folder that exists.*Create the folder"):
        tfbn.collect(model, x, checkpoint=path)
    path.parent.mkdir()
    stats = tfbn.collect(model, x, checkpoint=path, verbose=0)
    networks.assert_exact(stats, networks.plain, model, x)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    model = networks.plain(layers.BatchNormalization)
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or another kind of file.*Delete it"):
        tfbn.collect(model, networks.data(model, 20), checkpoint=tmp_path / "c", verbose=0)
    assert (tmp_path / "c").read_bytes() == content


@pytest.mark.parametrize(("share", "expected"), [(1e-9, [1, 4]), (float("inf"), [1, 2, 3, 4, 4])])
def test_saving_takes_its_share_of_the_time(tmp_path, monkeypatch, share, expected):
    monkeypatch.setattr(module.Checkpoint, "share", share)
    saved, original = [], module.Checkpoint.save

    def save(self, state, digest):
        saved.append(state.batches)
        original(self, state, digest)

    monkeypatch.setattr(module.Checkpoint, "save", save)
    model = networks.plain(layers.BatchNormalization)
    # Saved at the first batch, at batches that are due, and at the end.
    interrupted(tmp_path, model, networks.data(model, 7 * BATCHES))
    assert saved == expected


def test_a_relative_name_is_meant_from_the_folder_of_the_start(tmp_path, monkeypatch):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    (tmp_path / "start").mkdir()
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path / "start")

    class Moving(Data):
        def __getitem__(self, i):
            os.chdir(tmp_path / "later")
            return super().__getitem__(i)

    with pytest.raises(RuntimeError, match="stop"):
        tfbn.collect(model, Moving(x, 4), checkpoint="c", verbose=0)
    assert os.listdir(tmp_path / "start") == ["c"] and os.listdir(tmp_path / "later") == []


def crafted(content, random):
    """Return a sealed checkpoint with an impossible value or a wrong type."""
    header, arrays = sealed.unpack(content)
    inner, moments = sealed.unpack(arrays["state"].tobytes())
    state = inner["state"]
    kind = random.choice(["value", "missing", "moments", "shape", "digest", "outer"])
    name = random.choice(sorted(state))
    wrong = random.choice([-1, "x", None, 1.5, [], {"a": -1}, [[1]], float("nan")])
    if kind == "value":
        state[name] = wrong
    elif kind == "missing":
        del state[name]
    elif kind == "moments":
        key = random.choice(sorted(moments))
        moments[key] = array = moments[key].copy()
        array[random.choice([0, 2]), 0] = random.choice([-1.0, np.nan, np.inf])
    elif kind == "shape":
        key = random.choice(sorted(moments))
        moments[key] = random.choice([moments[key][:2], moments[key][0], moments[key] > 0])
    elif kind == "digest":
        header["digest"] = random.choice(["zz", 3, None])
    else:
        header.pop(random.choice(sorted(header)))
    arrays["state"] = np.frombuffer(sealed.pack(inner, moments), np.uint8)
    return sealed.pack(header, arrays)


@pytest.mark.parametrize("change", [damage.damaged, crafted])
@pytest.mark.parametrize("seeds", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_one_error_or_the_same_state(tmp_path, change, seeds):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 7 * BATCHES)
    path = interrupted(tmp_path, model, x, method="exact")
    held = path.read_bytes()
    layers_, batches = run.check(model, x, SweepOptions(batch_size=7))
    begin = Replica(model, layers_).initial_state("exact", batches.first())
    checkpoint = module.Checkpoint(path, batches)
    state, digest = checkpoint.read(begin)
    refused = 0
    for seed in range(seeds):
        path.write_bytes(change(held, random.Random(seed)))
        try:
            again, digest_again = checkpoint.read(begin)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "Delete it" in str(error) and len(str(error)) < 2000
        else:
            # A crafted file may hold any state that a sweep could have.
            assert change is crafted or (state_bytes.pack(again), digest_again) == (
                state_bytes.pack(state),
                digest,
            )
            state_bytes.pack(again)
            with contextlib.suppress(ValueError):  # The state can be resumed or raises ValueError.
                again.next_level().populations.keys()
    assert refused > seeds / 3


def test_a_checkpoint_that_cannot_be_written_is_refused_before_data_is_read(tmp_path, monkeypatch):
    class Unread(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError("read")

    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(PermissionError, match="checkpoint"):
        tfbn.collect(model, Unread(), checkpoint=tmp_path / "checkpoint", verbose=0)
    assert os.listdir(tmp_path) == []
