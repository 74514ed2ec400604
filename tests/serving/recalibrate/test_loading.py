"""Tests of a SavedModel as a Keras model."""

import numpy as np
import pytest
import tensorflow as tf
from exported_models import made

import tfbn
from tfbn.models.keras_models import batch_norm_layers
from tfbn.serving.recalibrate import recalibration


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["nested", "siblings"])
def test_the_paths_are_those_of_the_model(tmp_path, name):
    model, _ = made(name)
    tfbn.export(model, tmp_path / "m")
    network = recalibration.open_version(tmp_path / "m").network
    assert list(batch_norm_layers(network)) == list(batch_norm_layers(model))


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["siblings", "several", "channels first", "subclassed"])
def test_the_network_predicts_what_the_model_does(tmp_path, name):
    model, x = made(name)
    tfbn.export(model, tmp_path / "m")
    network = recalibration.open_version(tmp_path / "m").network
    actual = tf.function(network)(x)
    expected = model.predict(x, verbose=0)
    expected = expected if isinstance(expected, dict) else {next(iter(actual)): expected}
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-5)


def test_inputs_go_by_name_or_in_order_and_are_cast(tmp_path):
    model, x = made("several")
    tfbn.export(model, tmp_path / "m")
    network = recalibration.open_version(tmp_path / "m").network
    a, b = tf.constant(x["a"]), tf.constant(x["b"])
    for given in ({"b": b, "a": a}, {"a": tf.cast(a, "float64"), "b": b}):
        named = network.by_name(given)
        assert list(named) == ["a", "b"] and named["a"].dtype == tf.float32
        np.testing.assert_array_equal(named["b"], b)
    for given in (a, {"a": a}, {"a": b, "b": a}, {"a": tf.strings.as_string(a), "b": b}):
        with pytest.raises(ValueError, match=r"Expected data for the inputs .*float32\(None, 4\)"):
            network.by_name(given)
