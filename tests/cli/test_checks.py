"""Tests of the checks before the import of TensorFlow, in a process that cannot import it."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from tfbn.cli import checks, parser

SCRIPT = """
import sys
from tfbn.cli import main
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["h5py"] = None
for line in sys.stdin.read().splitlines():
    print(main(line.split()), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Create a model file, a SavedModel in a version, data, and an answer."""
    home = tmp_path_factory.mktemp("home")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(home / "m.keras")
    np.save(home / "x.npy", np.zeros((3, 2)))
    (home / "y.txt").write_text("text")
    (home / "served" / "1").mkdir(parents=True)
    (home / "served" / "1" / "saved_model.pb").touch()
    return home


LINES = {
    "inspect missing.keras": "missing.keras, no such file",
    "inspect y.txt": "y.txt, another kind of file",
    "inspect served": "served, a SavedModel",
    "recalibrate m.keras --data x.npy": "Expected --out",
    "recalibrate m.keras --data missing.npy --out o.keras": "missing.npy, no such file",
    "recalibrate m.keras --data y.txt --out o.keras": "Received: y.txt",
    "recalibrate m.keras --data x.npy --out o.h5": "ends in .keras",
    "recalibrate m.keras --data x.npy --out m.keras": "m.keras, which exists",
    "recalibrate m.keras --data x.npy --out o.keras --scale 2": "only for images",
    "recalibrate m.keras --data x.tfrecord:a.b --out o.keras": "package.module:function",
    "recalibrate m.keras --data x.npy --out o.keras --validation x.npy": "inputs and targets",
    "recalibrate served --data x.npy --validation v.npz": "without --out",
    "compare m.keras m.keras missing.npz": "missing.npz, no such file",
    "convert m.keras --out m.keras": "m.keras, which exists",
    "fold missing.keras --out o.keras": "missing.keras, no such file",
    "export m.keras served/1": "a SavedModel",
    "export m.keras new --sample y.txt": "y.txt, another kind of file",
    "export m.keras new --warmup missing.npy": "missing.npy, no such file",
    "drift served missing.json": "missing.json, no such file",
    "drift served .": "., another kind of file",
}


def test_mistakes_are_found_without_tensorflow(home):
    """Run all cases in one process, where importing TensorFlow or Keras is an error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="\n".join(LINES),
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert (done.returncode, done.stdout) == (0, "")
    printed = done.stderr.splitlines()
    assert len(printed) == 2 * len(LINES)
    for (line, says), error, code in zip(LINES.items(), printed[::2], printed[1::2], strict=True):
        assert code == "2" and error.startswith("tfbn: ") and says in error, line


def test_every_command_has_checks():
    commands = parser.build()._subparsers._group_actions[0].choices
    assert set(checks._CHECKS) == set(commands)
