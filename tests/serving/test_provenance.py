"""Where a version came from: fresh or stale, written, read and printed."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import dense_model, everything_under
from keras import layers

import tfbn
from tfbn.serving import describe, export


def test_never_swept_is_a_warning_or_an_error(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="never swept"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="never swept") as caught:
        export(model, tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("what", ["kernel", "moving_mean"])
def test_changed_since_the_sweep_is_a_warning_or_an_error(tmp_path, what):
    model = dense_model()
    layer = model.layers[0] if what == "kernel" else model.get_layer("bn")
    variable = getattr(layer, what)
    variable.assign(variable + 1e-3)
    with pytest.raises(ValueError, match="changed since the sweep"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="changed since the sweep"):
        export(model, tmp_path)
    assert "changed since the sweep" in describe(tmp_path)["stale"]


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.filterwarnings("error:The batch norm statistics")
def test_a_fresh_sweep_and_no_batch_norm_are_silent(tmp_path):
    model = dense_model()
    model.trainable = False  # As Algorithm 2 leaves it.
    export(model, tmp_path, require_population=True)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    export(plain, tmp_path, require_population=True)


def test_provenance_travels_with_the_model(tmp_path, capsys):
    model = dense_model()
    exported = export(model, tmp_path)
    model.get_layer("bn").gamma.assign([1.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match="changed"):
        export(model, tmp_path)
    written = json.loads((exported.path / "assets.extra" / "tfbn.json").read_text())
    capsys.readouterr()
    assert describe(exported.path) == written
    printed = capsys.readouterr().out
    assert "method='pooled' over 20 samples in 2 batches of at most 10" in printed
    assert "bn: 3 channels, 320 values each" in printed
    assert "changed" not in printed
    assert describe(str(tmp_path))["stale"] is not None  # The latest.
    assert written["stale"] is None
    assert written["statistics"]["fingerprint"] == written["fingerprint"]
    assert written["fingerprint"] != describe(tmp_path)["fingerprint"]
    assert (written["tfbn"], written["keras"]) == (tfbn.__version__, keras.__version__)
    assert written["tensorflow"] == tf.__version__
    # The moving averages before the sweep were 0 and 1.
    bn = model.get_layer("bn")
    shift = bn.moving_mean.numpy() / np.sqrt(bn.moving_variance.numpy())
    layer = written["statistics"]["layers"]["bn"]
    np.testing.assert_allclose(layer["mean_shift"], np.sqrt(np.mean(shift**2)), rtol=1e-5)
    assert (layer["channels"], layer["count"]) == (3, 320)


def test_describe_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"tfbn\.export wrote"):
        describe(tmp_path / "nothing")
    dense_model().export(tmp_path / "1", verbose=False)
    with pytest.raises(ValueError, match=r"1/assets\.extra"):
        describe(tmp_path)
