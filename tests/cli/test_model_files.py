"""Tests of model files: loading, errors, and atomic saves."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import tfbn
from tfbn.cli import checks, model_files, process
from tfbn.cli.errors import FileError
from tfbn.files import atomic


def network():
    """Build two layers, one of them batch norm."""
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), tfbn.BatchNormalization()])


def statistics(model):
    """Return statistics as if from a sweep."""
    read = tfbn.PopulationStats.read(model)
    layers = {
        path: tfbn.LayerStats(10, held.mean + 1.0, held.variance) for path, held in read.items()
    }
    return tfbn.PopulationStats(
        layers,
        method="exact",
        samples=10,
        batches=1,
        batch_size=10,
        fingerprint=read.fingerprint,
        previous=read,
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Create an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved():
    """Save a model with its statistics in out.keras."""
    model = network()
    stats = statistics(model)
    stats.assign(model)
    model_files.save(model, stats, "out.keras")
    return model, stats


@pytest.mark.quick(2)
@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
def test_models_load_with_their_optimizer(home, suffix):
    model = network()
    model.compile("adam", keras.losses.MeanSquaredError())
    model.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0)
    model.save(f"model{suffix}")
    loaded = model_files.load(f"model{suffix}", compiled=True)
    assert loaded.optimizer.iterations == 1
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert model_files.recorded_sweep(f"model{suffix}") is None


def test_a_loss_that_keras_cannot_read_again_is_left_out_and_told(home):
    model = network()
    model.compile("adam", "mse")
    model.save("model.h5")
    with pytest.raises((ValueError, TypeError), match="mse"):  # Keras 3.15; 3.10
        keras.models.load_model("model.h5")
    with pytest.warns(UserWarning, match=r"optimizer in model\.h5 cannot be read"):
        loaded = model_files.load("model.h5", compiled=True)
    assert not loaded.compiled
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])


class Custom(keras.layers.Layer):
    """A layer that only this process defines."""


def refused(path):
    """Return the text of the error for a file."""
    with pytest.raises(FileError) as error:
        model_files.load(path)
    text = str(error.value)
    assert text.startswith("Expected ") and "Received: " in text and path in text
    assert not {"safe_mode", "custom_object"} & {*text.replace("`", " ").split()}
    return text


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_and_unknown_classes_are_refused(home, suffix):
    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x)]).save(f"l{suffix}")
    assert "--unsafe" in refused(f"l{suffix}")
    assert (
        model_files.load(f"l{suffix}", unsafe=True).predict(np.ones((1, 3)), verbose=0)[0, 0] == 2
    )
    keras.Sequential([keras.Input((3,)), Custom()]).save(f"c{suffix}")
    text = refused(f"c{suffix}")
    assert "'Custom'" in text and len(text) < 300


def test_code_in_hdf5_is_refused_by_us_and_not_by_keras_alone(home, monkeypatch):
    """Keras before 3.11.3 runs the code."""
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x)])
    keras.Sequential([keras.Input((3,)), inner]).save("nested.h5")
    monkeypatch.setattr(keras.models, "load_model", lambda *args, **options: pytest.fail("loaded"))
    assert "--unsafe" in refused("nested.h5")


def test_other_things_are_refused_with_a_way_out(home):
    assert "no such file" in refused("missing.keras")
    network().export("saved_model/1", verbose=False)
    for directory in ("saved_model", "saved_model/1"):
        assert "Give the model file that it was exported from" in refused(directory)
    pathlib.Path("folder.keras").mkdir()
    assert "a directory" in refused("folder.keras")
    network().save_weights("model.weights.h5")
    assert "weights alone" in refused("model.weights.h5")
    os.mkfifo("pipe.keras")  # Reading it would block forever.
    assert "another kind of file" in refused("pipe.keras")
    pathlib.Path("model.txt").write_text("text")
    assert "another kind of file" in refused("model.txt")


def test_weights_that_are_damaged_are_noticed(home):
    """Keras validates their checksum only for some ways of reading."""
    saved()
    content = bytearray(pathlib.Path("out.keras").read_bytes())
    mean = np.float32(1.0).tobytes() * 2  # The moving mean of both channels.
    place = content.find(mean)
    assert place > 0
    content[place] ^= 1
    pathlib.Path("out.keras").write_bytes(content)
    assert "checksum of model.weights.h5" in refused("out.keras")


def test_the_sweep_is_written_with_the_model_and_read_again(home):
    _, stats = saved()
    loaded = model_files.load("out.keras")
    recorded = model_files.recorded_sweep("out.keras")
    assert dict(recorded) == dict(stats) and recorded.samples == 10
    assert recorded.mismatch(loaded) is None
    assert os.listdir() == ["out.keras"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat("out.keras").st_mode & 0o777 == 0o666 & ~umask


def test_a_damaged_record_names_the_file(home):
    network().save("new.keras")
    with zipfile.ZipFile("new.keras", "a") as archive:
        archive.writestr(model_files.RECORD, b"nothing")
    with pytest.raises(FileError, match=r"new\.keras, whose statistics are damaged"):
        model_files.recorded_sweep("new.keras")


@pytest.mark.parametrize(
    "path, says",
    [
        ("model.h5", "ends in .keras"),
        ("missing/model.keras", "missing does not exist"),
        ("taken.keras", "exists"),
        ("link.keras", "exists"),
        ("file/model.keras", "file does not exist"),
    ],
)
def test_names_that_cannot_be_written_are_refused(home, path, says):
    pathlib.Path("taken.keras").touch()
    pathlib.Path("file").touch()
    pathlib.Path("link.keras").symlink_to("nowhere")
    with pytest.raises(FileError, match=says) as error:
        checks.require_free(path)
    assert path in str(error.value)
    checks.require_free("free.keras")


def test_a_folder_that_is_read_only_is_refused(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # Root may write anywhere.
    with pytest.raises(FileError, match="is read-only"):
        checks.require_free("model.keras")


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_while_the_model_is_written_is_left_alone(home, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    flush = os.fsync

    def another_writes(descriptor):
        flush(descriptor)
        pathlib.Path("out.keras").write_text("theirs")

    monkeypatch.setattr(os, "fsync", another_writes)
    with pytest.raises(FileError, match=r"out\.keras, which exists"):
        saved()
    assert pathlib.Path("out.keras").read_text() == "theirs"
    assert os.listdir() == ["out.keras"]


def no_links(source, target):
    """Raise the error of a file system without hard links."""
    raise PermissionError(1, "Operation not permitted", source)


def test_a_file_system_without_links(home, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    _, stats = saved()
    assert dict(model_files.recorded_sweep("out.keras")) == dict(stats)
    assert os.listdir() == ["out.keras"]


@pytest.mark.parametrize("step", ["save", "fsync", "link"])
def test_a_full_disk_leaves_nothing_and_names_the_file(home, monkeypatch, step):
    def full(*args, **options):
        raise OSError(28, "No space left on device", "/hidden/.tfbn/model.keras")

    monkeypatch.setattr(keras.Model if step == "save" else os, step, full)
    if step == "link":
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError, match=r"Cannot .* out\.keras \(No space left on device\)\.$"):
        saved()
    assert os.listdir() == []


KILLED = """
import os, sys, signal
import keras, numpy as np, tfbn
from tfbn.cli import checks, model_files
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[1], die)
model = keras.Sequential([keras.Input((3,)), tfbn.BatchNormalization()])
model_files.save(model, tfbn.PopulationStats.read(model), "killed.keras")
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_file_under_the_name_and_the_next_one_clears_up(home):
    process = subprocess.run([sys.executable, "-c", KILLED, "link"], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    [left] = os.listdir()
    assert left.startswith(".tfbn-model-")
    saved()
    assert os.listdir() == ["out.keras"]


def test_the_hidden_folder_of_a_process_at_work_is_left_alone(home):
    with atomic.temporary_directory(".", "model") as folder:
        saved()
        assert os.path.isdir(folder)
    assert os.listdir() == ["out.keras"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_files_of_keras_2_name_it_and_a_way_that_works(home, suffix, capsys):
    keras_2 = pytest.importorskip("tf_keras")
    make = keras_2.layers
    model = keras_2.Sequential(
        [make.Input((5, 5, 2)), make.DepthwiseConv2D(3), make.BatchNormalization()]
    )
    model.save(f"old model{suffix}")
    with pytest.raises(FileError, match=r"which Keras 2\.\S+ wrote") as error:
        model_files.load(f"old model{suffix}")
    python, command = re.findall("`([^`]*)`", str(error.value))
    eval(python, {"tf_keras": keras_2})
    np.save("x.npy", np.random.default_rng(0).random((40, 5, 5, 2), "float32"))
    arguments = shlex.split(command.replace("DATA", "x.npy"))[1:]
    assert process.main(arguments) == 0
    assert sorted(os.listdir("old model")) == ["1", "2"]
