"""Tests of the variables of a SavedModel on disk."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import field, made
from keras import layers

import tfbn
from tfbn.serving.export import batch_norms
from tfbn.serving.recalibrate import weights


def test_the_fingerprint_is_that_of_the_new_weights(tmp_path):
    """It is written by a private function of TensorFlow, which must still exist."""
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    old, new = (tf.saved_model.experimental.read_fingerprint(str(tmp_path / "m" / n)) for n in "12")
    assert new.checkpoint_hash != old.checkpoint_hash
    assert new.saved_model_checksum == old.saved_model_checksum
    again = tfbn.recalibrate(tmp_path / "m" / "1", x, verbose=0)
    third = tf.saved_model.experimental.read_fingerprint(os.fspath(again.path))
    assert third.checkpoint_hash == new.checkpoint_hash


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [("no/path", np.zeros(3), "no variable at 'no/path'"), (None, np.zeros(99), "shape")],
)
def test_values_for_other_variables_are_refused(tmp_path, path, value, says):
    tfbn.export(made("dense")[0], tmp_path / "m")
    version = tmp_path / "m" / "1"
    [layer, *_] = batch_norms.read(version).layers.values()
    path = path or layer.variables["moving_mean"]
    with pytest.raises(ValueError, match=says):
        weights.copy_with(version, tmp_path / "copy", {path: value})


def test_both_copies_that_keras_stores_are_written(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    model.export(tmp_path / "1", verbose=False)
    x = field(4)
    tfbn.recalibrate(tmp_path, x, verbose=0)
    reader = tf.train.load_checkpoint(os.fspath(tmp_path / "2" / "variables" / "variables"))
    values = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map()]
    floating = [value for value in values if getattr(value, "dtype", None) == np.float32]
    means = [value for value in floating if np.allclose(value, x.mean(0), rtol=1e-5)]
    assert len(floating) == 8 and len(means) == 2
