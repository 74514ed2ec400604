"""Warm-up requests, as a server reads them."""

import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import ONES, STRUCTURES, dense_model, everything_under, serve
from keras import layers

from tfbn.serving import export


def requests_in(path):
    logs = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2", reason="needs the extra `serving`"
    )
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    records = tf.data.TFRecordDataset(os.fspath(file)).as_numpy_iterator()
    return [logs.PredictionLog.FromString(r).predict_log.request for r in records]


@pytest.mark.parametrize("structure", ["one", "dicts", "nested", "subclassed with dicts"])
@pytest.mark.filterwarnings("ignore")
def test_warmup_requests_are_what_a_client_would_send(tmp_path, structure):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    model = STRUCTURES[structure]()
    sizes = [4, 4] if structure == "subclassed with dicts" else [4, 3]
    rng = np.random.default_rng(7)
    x = [rng.normal(size=(2, n)) for n in sizes]  # float64, as NumPy has it.
    if structure == "one":
        given = x
    else:
        names = "pq" if structure == "subclassed with dicts" else "ab"
        given = dict(zip(names, x, strict=True))
        if structure == "nested":
            given["a"] = [given["a"]]
    exported = export(model, tmp_path / "name", warmup=given)
    [request] = requests_in(exported.path)
    assert request.model_spec.name == "name"
    assert request.model_spec.signature_name == "serving_default"
    sent = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
    as_model = keras.tree.map_structure(lambda v: tf.constant(v, tf.float32), given)
    want = keras.tree.flatten(model(as_model, training=False))
    got = serve(exported.path)(**sent)
    for key, y in zip(sorted(got), want, strict=True):
        np.testing.assert_allclose(got[key], y, rtol=1e-5, atol=1e-5)


def test_warmup_takes_batches_of_a_dataset_up_to_the_limit_of_the_server(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    x = np.random.default_rng(8).normal(size=(6, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros(6))).batch(4)
    requests = requests_in(export(dense_model(), tmp_path, warmup=data).path)
    sent = [tf.make_ndarray(value) for r in requests for value in r.inputs.values()]
    np.testing.assert_array_equal(np.concatenate(sent), x)
    assert [len(s) for s in sent] == [4, 2]
    assert len(requests_in(export(dense_model(), tmp_path, warmup=data.repeat()).path)) == 1000


def test_warmup_is_checked(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    empty = tf.data.Dataset.from_tensor_slices(ONES).batch(2).take(0)
    for wrong in (np.ones((2, 5)), np.ones(4), [ONES, ONES], np.array([["a"] * 4]), empty):
        with pytest.raises(ValueError, match="Expected batches"):
            export(dense_model(), tmp_path / "m", warmup=wrong)
    later = tf.data.Dataset.from_generator(
        lambda: iter([np.ones((1, 4)), np.ones((1, 3))]),
        output_signature=tf.TensorSpec((None, None), tf.float64),
    )
    with pytest.raises(ValueError, match="Expected batches"):
        export(dense_model(), tmp_path / "m", warmup=later)
    assert everything_under(tmp_path) == []


def test_warmup_without_the_extra_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"tfbn\[serving\]"):
        export(dense_model(), tmp_path / "m", warmup=ONES)
    assert everything_under(tmp_path) == []


def test_warmup_verifies_models_that_are_picky(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")

    class Picky(layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_greater(x, -1.0)]):
                return tf.ensure_shape(x, (None, 5))

    model = keras.Sequential([keras.Input((None,)), Picky()])
    with pytest.raises(ValueError, match="as warmup"):
        export(model, tmp_path)
    export(model, tmp_path, warmup=np.ones((2, 5)))
