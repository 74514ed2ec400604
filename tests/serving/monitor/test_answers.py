"""Tests of answers as clients receive them."""

import json

import numpy as np
import pytest
import tensorflow as tf
from monitored_models import images, served_by

from tfbn.serving.monitor import monitor


def test_all_that_clients_receive_is_taken(exported, ask):
    predict_pb2 = pytest.importorskip(
        "tensorflow_serving.apis.predict_pb2", reason="needs the extra `serving`"
    )
    arrays = ask(images(np.random.default_rng(7), 3))
    response = predict_pb2.PredictResponse()
    for name, value in arrays.items():
        response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
    lists = {name: value.tolist() for name, value in arrays.items() if name != monitor.IDENTITY}
    lists[monitor.IDENTITY] = [text.decode() for text in arrays[monitor.IDENTITY]]
    columns = json.loads(json.dumps({"outputs": lists}))
    rows = {"predictions": [{k: v[i] for k, v in lists.items()} for i in range(3)]}
    tensors = {name: tf.constant(value) for name, value in arrays.items()}
    given = [arrays, tensors, lists, rows, columns, columns["outputs"], response, response.outputs]
    first, *rest = [served_by(exported, [answer]).layers() for answer in given]
    assert all(other == first for other in rest)


WRONG = {
    "no mapping": (lambda a: [1.0], "outputs by name"),
    "rows": (lambda a: {"predictions": [1]}, "'monitor/population' from the signature"),
    "of serve": (lambda a: {"output_0": a["output_0"]}, "from the signature 'monitor'"),
    "another version": (
        lambda a: {**a, monitor.IDENTITY: [b"17", b"17"]},
        "one of another model",
    ),
    "one sample of another version": (
        lambda a: {**a, monitor.IDENTITY: [a[monitor.IDENTITY][0], b"17"]},
        "one of another model",
    ),
    "fewer samples": (
        lambda a: {**a, monitor.IDENTITY: a[monitor.IDENTITY][:1]},
        r"shape \(1, 6\)",
    ),
    "a missing layer": (
        lambda a: {k: v for k, v in a.items() if k != "second/mean"},
        "'second/mean' from the signature",
    ),
    "text": (lambda a: {**a, "second/mean": "many"}, "numbers in 'second/mean'"),
    "ragged": (lambda a: {**a, "second/mean": [[1], [1, 2]]}, "numbers in 'second/mean'"),
    "nothing": (lambda a: {**a, "second/mean": None}, r"shape \(\d, 4\) of layer 'second'"),
    "channels": (lambda a: {**a, "second/mean": a["second/mean"][:, :3]}, r"shape \(\d, 4\)"),
    "all channels": (
        lambda a: {k: v[:, :3] if np.shape(v)[1:] == (4,) else v for k, v in a.items()},
        r"shape \(\d, 4\)",
    ),
    "NaN": (lambda a: {**a, "second/mean": a["second/mean"] * np.nan}, "mean nan in channel 0"),
    "infinity": (
        lambda a: {**a, "second/variance": [[1, 1, 1, 1], [1, np.inf, 1, 1]]},
        "variance inf in channel 1 of sample 1",
    ),
    "variance": (lambda a: {**a, "second/variance": -a["second/variance"]}, "variance -"),
    "count": (lambda a: {**a, "second/count": [-1, 4]}, "layer 'second'.*whole number"),
    "half a count": (lambda a: {**a, "second/count": [4, 1.5]}, "layer 'second'.*whole number"),
    "NaN as count": (lambda a: {**a, "second/count": [4, np.nan]}, "layer 'second'.*whole number"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_answer_that_does_not_belong_is_refused_and_nothing_added(exported, ask, kind):
    change, message = WRONG[kind]
    answer = ask(images(np.random.default_rng(8), 2))
    served = served_by(exported, [answer])
    before = served.layers()
    with pytest.raises(ValueError, match=f"(?s)^Expected.*{message}"):
        served.add(change(answer))
    assert served.samples == 2 and served.layers() == before
