"""Tests of warm-up requests, parsed like a server does."""

import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import ONES, STRUCTURES, dense_model, everything_under, serve
from keras import layers

from tfbn import export
from tfbn.serving.export import signature
from tfbn.serving.export.warmup import requests_in as requests_in_batches


def requests_in(path):
    logs = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2", reason="needs the extra `serving`"
    )
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    records = tf.data.TFRecordDataset(os.fspath(file)).as_numpy_iterator()
    return [logs.PredictionLog.FromString(r).predict_log.request for r in records]


@pytest.mark.quick(2)
@pytest.mark.parametrize("structure", ["one", "dicts", "nested", "subclassed with dicts"])
@pytest.mark.filterwarnings("ignore")
def test_warmup_requests_are_what_a_client_would_send(tmp_path, structure):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    model = STRUCTURES[structure]()
    sizes = [4, 4] if structure == "subclassed with dicts" else [4, 3]
    rng = np.random.default_rng(7)
    x = [rng.normal(size=(2, n)) for n in sizes]  # float64, the default of NumPy.
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
        with pytest.raises(ValueError, match=r"Expected batches|No batches"):
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


@pytest.mark.parametrize(("batch_size", "want"), [(32, [32, 32, 6]), (100, [70]), (7, [7] * 10)])
def test_a_large_batch_becomes_requests_that_a_server_takes(tmp_path, batch_size, want):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    x = np.random.default_rng(0).normal(size=(70, 4)).astype("float32")
    options = {} if batch_size == 32 else {"warmup_batch_size": batch_size}  # The default.
    requests = requests_in(export(dense_model(), tmp_path, warmup=x, **options).path)
    sent = [tf.make_ndarray(value) for r in requests for value in r.inputs.values()]
    assert [len(part) for part in sent] == want
    np.testing.assert_array_equal(np.concatenate(sent), x)


def test_split_requests_are_at_most_what_a_server_takes(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    data = tf.data.Dataset.from_tensor_slices(np.ones((3000, 4), "float32")).batch(1500)
    requests = requests_in(export(dense_model(), tmp_path, warmup=data, warmup_batch_size=1).path)
    assert len(requests) == 1000


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None])
def test_a_request_has_a_sample_at_least(tmp_path, batch_size):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    with pytest.raises(ValueError, match="warmup_batch_size"):
        export(dense_model(), tmp_path / "m", warmup=ONES, warmup_batch_size=batch_size)
    assert everything_under(tmp_path) == []


def spec(*shape):
    return tf.TensorSpec(shape, tf.float32)


def test_only_an_axis_of_samples_is_split():
    def shapes(data, *specs):
        specs = [list(specs)]
        batches = signature.batches(data, specs, "warmup")
        return [
            [tuple(x.shape) for x in tf.nest.flatten(request)]
            for request in requests_in_batches(batches, specs, 2)
        ]

    three, five = np.ones((3, 4), "float32"), np.ones((5, 1), "float32")
    assert shapes([three, three], spec(None, 4), spec(None, 4)) == [[(2, 4)] * 2, [(1, 4)] * 2]
    assert shapes([three], spec(3, 4)) == [[(3, 4)]]
    assert shapes([three, five], spec(None, 4), spec(None, 1)) == [[(3, 4), (5, 1)]]
    assert shapes([three, 1.0], spec(None, 4), spec()) == [[(3, 4), ()]]
    assert shapes([three, five[:0]], spec(None, 4), spec(None, 1)) == [[(3, 4), (0, 1)]]
    with pytest.raises(ValueError, match="No batches"):
        shapes([three[:0], five[:0]], spec(None, 4), spec(None, 1))


def test_requests_name_inputs_as_the_server_does(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    a, b = keras.Input((4,), name="Left.image"), keras.Input((4,), name="right")
    model = keras.Model([a, b], layers.Subtract()([a, b]))
    version = export(model, tmp_path, warmup=[ONES, 2 * ONES]).path
    [request] = requests_in(version)
    assert sorted(request.inputs) == ["Left.image", "right"]
    assert set(signature.read(version).inputs) == {"Left.image", "right"}
    np.testing.assert_array_equal(tf.make_ndarray(request.inputs["right"]), 2 * ONES)
