"""Tests of the process: its imports, exit codes and stderr."""

import io
import logging
import os
import pathlib
import subprocess
import sys
import warnings

import keras
import pytest

import tfbn
from tfbn.cli import main, process


@pytest.mark.parametrize("arguments", [["--help"], ["recalibrate", "--help"], ["--version"]])
def test_help_imports_nothing_but_the_parser(arguments):
    code = f"""
import runpy, sys
sys.argv = ["tfbn", *{arguments}]
try:
    runpy.run_module("tfbn", run_name="__main__", alter_sys=True)
except SystemExit as exited:
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    heavy = loaded & {{"tensorflow", "keras", "numpy", "h5py", "absl"}}
    sys.exit(f"imported {{heavy}}" if heavy else exited.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: tfbn" in done.stdout or done.stdout == f"tfbn {tfbn.__version__}\n"


@pytest.mark.slow
def test_stderr_has_nothing_but_our_lines(tmp_path):
    """TensorFlow and Keras write notes to stderr, in C++ and in Python."""
    model = network()
    model.compile("sgd", "mse")  # Keras says of each such HDF5 file that it compiled the model.
    model.save(tmp_path / "model.h5")
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "tfbn", "export", tmp_path / "model.h5", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tfbn: warning: The batch norm statistics")
    assert done.stdout.startswith("Wrote ")


@pytest.mark.slow
def test_a_closed_stderr(tmp_path):
    """Errors do not go to stdout instead, and notes do not go into the next file opened."""
    network().save(tmp_path / "model.keras")

    def run(*words):
        line = f'exec "{sys.executable}" -m tfbn "$@" 2>&-'
        done = subprocess.run(["sh", "-c", line, "sh", *map(str, words)], stdout=subprocess.PIPE)
        return done.returncode, done.stdout.decode()

    assert run("inspect", tmp_path / "missing.keras") == (2, "")
    code, out = run("export", tmp_path / "model.keras", tmp_path / "out")
    assert code == 0 and out.startswith("Wrote ") and len(out.splitlines()) == 1


@pytest.fixture
def before_tensorflow(monkeypatch):
    """Remove TensorFlow from the modules, and return a function that restores it."""
    loaded = sys.modules["tensorflow"]
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    return lambda: monkeypatch.setitem(sys.modules, "tensorflow", loaded)


def test_notes_of_the_import_are_dropped(capfd, before_tensorflow):
    with process._startup_notes_dropped():
        os.write(2, b"a note\n")
        before_tensorflow()
    os.write(2, b"behind it\n")
    assert capfd.readouterr().err == "behind it\n"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"


def test_notes_of_an_import_that_fails_are_shown(capfd, before_tensorflow):
    with pytest.raises(ImportError, match="no such library"), process._startup_notes_dropped():
        os.write(2, b"why it failed\n")
        raise ImportError("no such library")
    before_tensorflow()
    os.write(2, b"behind it\n")
    assert capfd.readouterr().err == "why it failed\nbehind it\n"


def test_ctrl_c_during_the_import(capfd, before_tensorflow):
    with pytest.raises(KeyboardInterrupt), process._startup_notes_dropped():
        os.write(2, b"a note\n")
        raise KeyboardInterrupt
    before_tensorflow()
    os.write(2, b"behind it\n")
    assert capfd.readouterr().err == "behind it\n"


def test_a_log_level_of_the_user_stands(capfd, before_tensorflow, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with process._startup_notes_dropped():
        os.write(2, b"a note\n")
    before_tensorflow()
    assert capfd.readouterr().err == "a note\n"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


def test_settings_of_the_process_are_as_before(capsys):
    levels = [logging.getLogger(name).level for name in ("absl", "tensorflow")]
    show = warnings.showwarning
    assert main(["inspect", "missing.keras"]) == 2
    assert [logging.getLogger(name).level for name in ("absl", "tensorflow")] == levels
    assert warnings.showwarning is show


def test_a_reader_that_has_seen_enough_is_no_error(capfd, monkeypatch, tmp_path):
    network().save(tmp_path / "model.keras")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(tmp_path / "model.keras")]) == 2
        print("flushed at the end of the process")
    assert capfd.readouterr().err == ""


def test_names_that_a_terminal_cannot_show(monkeypatch, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"m\xff\xc3\xa4.keras")
    network().save(tmp_path / "model.keras")
    os.replace(tmp_path / "model.keras", path)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    assert main(["inspect", os.fsdecode(path)]) == 0
    assert rb"m\udcff\xe4.keras" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31mb.keras", r"a\x1b[31mb.keras"),
        ("a\nb.keras", r"a\nb.keras"),
        ("\r", r"\r"),
        ("a  b.keras", "a  b.keras"),
        ("\u202eb.keras", r"\u202eb.keras"),
        ("ä\N{SNOWMAN}.keras", "ä\N{SNOWMAN}.keras"),
    ],
)
def test_names_that_a_terminal_would_act_on(capsys, monkeypatch, tmp_path, name, shown):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", name]) == 2
    assert f"Received: {shown}, no such file." in capsys.readouterr().err
    pathlib.Path(name).write_bytes(b"no model")
    assert main(["inspect", name]) == 2
    [line] = capsys.readouterr().err.split("\n")[:-1]
    assert shown in line
    network().save("model.keras")
    os.replace("model.keras", f"{name}.keras")
    assert main(["inspect", f"{name}.keras"]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}.keras: model 'sequential")


def network():
    """Save a model with batch norm."""
    return keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
