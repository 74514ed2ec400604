"""Run the command line in this process, and return its output."""

import json

import keras
from keras import layers

import tfbn
from tfbn.cli import main


def network():
    """Build two convolutions with batch norm on images of 6 by 5 pixels."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 5, 1), name="image"),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(3, 3),
            tfbn.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ],
        name="small",
    )


def run(capsys, *arguments):
    """Return the exit code, stdout and stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def run_for_json(capsys, *arguments):
    """Return the output of a command that succeeds with --json."""
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def fails(capsys, *arguments):
    """Return the only line on stderr of a command that fails."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    # One sentence that starts with a capital is an error of tfbn, not of a library.
    assert err.count("\n") == 1 and err.startswith("tfbn: ") and err[6].isupper()
    return err
