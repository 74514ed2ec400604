"""Tests of the record of batch norm layers in a SavedModel."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import field, made

import tfbn
from tfbn.serving.export import batch_norms


@pytest.mark.slow
def test_serve_is_what_it_was_without_the_record(tmp_path):
    """The record is a separate file and does not change the graph."""
    model, x = made("residual")
    exported = tfbn.export(model, tmp_path / "m")
    loaded = tf.saved_model.load(os.fspath(exported.path))
    assert list(loaded.signatures) == ["serve", "serving_default"]
    archive = keras.export.ExportArchive()
    archive.track(model)

    def serve(*args):
        from tfbn.serving.export import endpoint, signature

        return model(*endpoint._checked(args, signature.arguments(model)), training=False)

    archive.add_endpoint("serve", serve, input_signature=[tf.TensorSpec((None, 6, 6, 2))])
    archive.write_out(tmp_path / "plain", verbose=False)
    plain = tf.saved_model.load(tmp_path / "plain")
    operations = [
        [op.type for op in m.serve.concrete_functions[0].graph.get_operations()]
        for m in (loaded, plain)
    ]
    assert operations[0] == operations[1]
    np.testing.assert_allclose(loaded.serve(x), plain.serve(x), rtol=1e-5, atol=1e-5)


def test_a_record_with_a_call_of_no_layer_is_refused(tmp_path):
    tfbn.export(made("dense")[0], tmp_path / "m")
    file = tmp_path / "m" / "1" / batch_norms.FILE
    record = json.loads(file.read_text())
    record["calls"][0][0] = "another"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"an intact file.*a call of no layer"):
        tfbn.recalibrate(tmp_path / "m", field(4), verbose=0)
