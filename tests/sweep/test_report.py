"""Tests of the progress of a sweep."""

import keras
import networks
import numpy as np
from keras import layers

import tfbn


def test_progress_where_the_end_is_not_known(capsys):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    batches = (np.ones((4, 3), "float32") for _ in range(5))
    tfbn.collect(model, batches, method="pooled", verbose=1)
    assert "5/5" in capsys.readouterr().out


def test_progress(capsys):
    model = networks.plain(layers.BatchNormalization)
    x = networks.data(model, 40)
    tfbn.collect(model, x, method="exact", batch_size=8, verbose=1)
    printed = capsys.readouterr().out
    assert printed.count("Population statistics, exact") == 1
    assert "15/15" in printed and printed.count("\n") == 2
    tfbn.collect(model, x, verbose=0)
    assert capsys.readouterr().out == ""
