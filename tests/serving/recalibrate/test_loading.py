"""Tests of a SavedModel as a Keras model."""

import pytest
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
