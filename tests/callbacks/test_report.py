"""What the callback prints during `fit` and at its end."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.callbacks import report

X = np.random.default_rng(0).normal(size=(48, 3)).astype("float32")
Y = np.zeros((48, 1), "float32")


def printed(capsys, verbose, norms=2, **options):
    """The lines about population statistics of a fit."""
    blocks = [
        layer for _ in range(norms) for layer in (layers.Dense(4), layers.BatchNormalization())
    ]
    model = keras.Sequential([keras.Input((3,)), *blocks, layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = tfbn.PopulationStatsCallback(X, **options)
    capsys.readouterr()
    data = {"validation_data": (X, Y), "epochs": 3, "callbacks": [callback]}
    model.fit(X, Y, verbose=verbose, **data)
    return [
        line for line in capsys.readouterr().out.splitlines() if re.search("opulation|sweep", line)
    ]


def test_a_sweep_is_one_line_with_its_time(capsys):
    """However many levels it has."""
    actual = printed(capsys, 2, norms=3)
    assert re.fullmatch(r"Population statistics, exact: 3 passes, \d+\.\d s", actual[0])
    assert actual[1].startswith(
        "Population statistics of 3 layers: the moving averages were off by"
    )
    assert len(actual) == 2
    assert printed(capsys, 0) == []


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_time_of_sweeps_in_epochs_is_told_once(capsys, verbose):
    actual = printed(capsys, verbose, every_epoch=True)
    told = [line for line in actual if "every_epoch=True" in line]
    assert len(told) == 1
    line = r".*The sweep with every_epoch=True took \d+\.\d s of the epoch\."
    assert re.fullmatch(line, told[0])


def test_one_layer_is_no_plural(capsys):
    assert "statistics of 1 layer:" in printed(capsys, 2, norms=1)[-1]
    assert [report.counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
