"""No request kills the server: what a client may send, through the C API."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.core.protobuf import saved_model_pb2

import tfbn

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:The batch norm statistics"),
]

OK, INVALID_ARGUMENT = 0, 3


def ask(directory, requests, onednn=None):
    """The answers of a server of a SavedModel to some requests: a list of dicts.

    Also the process's exit status: negative, the number of a signal, if a request killed it.
    TensorFlow uses oneDNN's kernels where the processor suits them, unless `onednn` tells.
    """
    content = (pathlib.Path(directory) / "saved_model.pb").read_bytes()
    graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]
    signature = graph.signature_def["serving_default"]
    asked = {
        "inputs": {name: info.name for name, info in signature.inputs.items()},
        "outputs": {name: info.name for name, info in signature.outputs.items()},
        "requests": [
            {
                name: {"dtype": x.dtype.name, "shape": x.shape, "values": x.ravel().tolist()}
                for name, x in request.items()
            }
            for request in requests
        ],
    }
    client = pathlib.Path(__file__).with_name("c_api.py")
    done = subprocess.run(
        [sys.executable, client, directory],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ if onednn is None else {**os.environ, "TF_ENABLE_ONEDNN_OPTS": str(onednn)},
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done


def network(rank, *, size=8, batch_norm=tfbn.BatchNormalization):
    """Convolutions over `rank` spatial dimensions, and a Dense layer."""
    conv, pool, average = {
        1: (layers.Conv1D, layers.MaxPooling1D, layers.GlobalAveragePooling1D),
        2: (layers.Conv2D, layers.MaxPooling2D, layers.GlobalAveragePooling2D),
        3: (layers.Conv3D, layers.MaxPooling3D, layers.GlobalAveragePooling3D),
    }[rank]
    x = inputs = keras.Input((size,) * rank + (3,), name="x")
    x = pool()(layers.ReLU()(batch_norm()(conv(8, 3)(x))))
    if rank < 3:
        separable = layers.SeparableConv1D if rank == 1 else layers.SeparableConv2D
        x = batch_norm()(separable(4, 2)(x))
    return keras.Model(inputs, layers.Dense(2)(average()(x)))


def dense(batch_norm=tfbn.BatchNormalization):
    x = inputs = keras.Input((5,), name="x")
    x = layers.ReLU()(batch_norm()(layers.Dense(4)(x)))
    return keras.Model(inputs, layers.Dense(2)(x))


def two_inputs():
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = keras.Input((6, 3), name="x")
    y = layers.Concatenate()([layers.Embedding(10, 3)(ids), x])
    y = layers.GRU(4)(tfbn.BatchNormalization()(layers.Conv1D(4, 2)(y)))
    return keras.Model({"ids": ids, "x": x}, {"y": layers.Dense(2)(y), "z": y})


def assert_right(answer, model, request):
    """An answer that is what Keras computes, in a graph that knows no more sizes than it."""
    assert answer["code"] == OK, answer["message"]
    specs = {
        x.name: tf.TensorSpec((None, *x.shape[1:]), x.dtype, name=x.name) for x in model.inputs
    }
    given = {name: tf.constant(x) for name, x in request.items()}
    if len(request) == 1:
        [given], [specs] = given.values(), specs.values()
    want = tf.function(model, input_signature=[specs])(given)
    want = want if isinstance(want, dict) else {"output_0": want}
    for name, y in want.items():
        got = answer["outputs"][name]
        got = np.array(got["values"]).reshape(got["shape"])
        np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


def shapes_near(shape):
    """Shapes of every rank up to one more, and with one size changed, removed or doubled."""
    near = [shape[:n] for n in range(len(shape))] + [(1, *shape), (*shape, 1)]
    for axis in range(1, len(shape)):
        for size in (0, 1, shape[axis] + 1, 5 * shape[axis]):
            near.append((*shape[:axis], size, *shape[axis + 1 :]))
    return [s for s in near if s != shape]


MODELS = {
    "dense": dense,
    "conv1d": lambda: network(1),
    "conv2d": lambda: network(2),
    "conv3d": lambda: network(3),
    "conv2d, Keras's batch norm": lambda: network(2, batch_norm=layers.BatchNormalization),
}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_requests_of_wrong_shapes_and_dtypes_are_answered_with_an_error(tmp_path, name, fold):
    model = MODELS[name]()
    path = tfbn.export(model, tmp_path, fold=fold).path
    rng = np.random.default_rng(0)
    right = rng.random((2, *model.inputs[0].shape[1:])).astype("float32")
    wrong = [np.zeros(shape, "float32") for shape in shapes_near(right.shape)]
    wrong += [right.astype(dtype) for dtype in ("float64", "int32", "uint8", "bool")]
    requests = [{"x": x} for x in (right, *wrong, right[:0], right[:1])]
    answers, done = ask(path, requests)
    assert done.returncode == 0, done.stderr
    assert len(answers) == len(requests)
    assert_right(answers[0], model, requests[0])
    for request, answer in zip(requests[1:-2], answers[1:-2], strict=True):
        assert answer["code"] == INVALID_ARGUMENT, (request["x"].shape, answer)
    assert answers[-2]["code"] == INVALID_ARGUMENT
    assert "Expected at least one sample" in answers[-2]["message"]
    assert_right(answers[-1], model, requests[-1])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_sizes_that_are_left_open_kill_nothing_either(tmp_path, rank, fold):
    model = network(rank, size=None)
    path = tfbn.export(model, tmp_path, fold=fold).path
    rng = np.random.default_rng(1)
    sizes = [*range(10), 33]
    shapes = [(batch, *[size] * rank, 3) for size in sizes for batch in (1, 0, 2)]
    shapes += [(1, 9, *[0] * (rank - 1), 3), (2, 6, *[70] * (rank - 1), 3)]
    requests = [{"x": rng.random(shape).astype("float32")} for shape in shapes]
    answers, done = ask(path, requests)
    assert done.returncode == 0, done.stderr
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        # Of images so small that nothing is left after a convolution, oneDNN's kernels of
        # TensorFlow 2.21 may answer with whatever was in memory, in Keras too.
        if request["x"].size and min(request["x"].shape[1:-1]) >= 6:
            assert_right(answer, model, request)


def test_each_of_several_inputs_is_checked(tmp_path):
    model = two_inputs()
    path = tfbn.export(model, tmp_path).path
    rng = np.random.default_rng(2)
    right = {"ids": rng.integers(0, 10, (2, 6), "int32"), "x": rng.random((2, 6, 3), "float32")}
    requests = [right]
    for name, x in right.items():
        requests += [{**right, name: np.zeros(s, x.dtype)} for s in shapes_near(x.shape)]
        requests += [{**right, name: x.astype(d)} for d in ("int64", "float64")]
    requests += [{**right, "ids": right["ids"][:1]}, {**right, "ids": right["ids"] + 100}, right]
    answers, done = ask(path, requests)
    assert done.returncode == 0, done.stderr
    assert len(answers) == len(requests)
    assert_right(answers[0], model, right)
    for answer in answers[1:-1]:
        assert answer["code"] == INVALID_ARGUMENT, answer
    assert_right(answers[-1], model, right)


@pytest.mark.parametrize("onednn", [0, 1])
@pytest.mark.parametrize("name", ["conv2d", "conv2d, Keras's batch norm"])
def test_an_empty_batch_gets_one_error_from_every_kernel(tmp_path, name, onednn):
    model = MODELS[name]()
    empty = {"x": np.zeros((0, 8, 8, 3), "float32")}
    model.export(tmp_path / "keras", verbose=False)
    path = tfbn.export(model, tmp_path / "ours").path
    [answer], _ = ask(path, [empty], onednn)
    assert answer["code"] == INVALID_ARGUMENT
    assert "Expected at least one sample. Received: an empty batch" in answer["message"]
    # Evidence for the check: without it the answer depends on the kernels.
    [answer], _ = ask(tmp_path / "keras", [empty], onednn)
    if answer["code"] != OK:
        assert "empty batch" not in answer["message"]


def test_nan_may_get_a_finite_answer(tmp_path):
    """Evidence for the sentence in `export`'s docstring, with TensorFlow 2.21 on a CPU.

    When this fails, oneDNN's fused convolution and ReLU has learnt to pass NaN on.
    """
    x = inputs = keras.Input((32, 32, 3), name="x")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu")(x))
    path = tfbn.export(keras.Model(inputs, layers.Dense(2)(x)), tmp_path).path
    images = np.random.default_rng(0).random((8, 32, 32, 3), "float32")
    images[0] = np.nan
    answers = [ask(path, [{"x": images}], onednn)[0][0] for onednn in (0, 1)]
    plain, fused = (np.reshape(a["outputs"]["output_0"]["values"], (8, 2)) for a in answers)
    assert np.isnan(plain[0]).all()
    assert np.isfinite(fused[0]).all()
    np.testing.assert_allclose(fused[1:], plain[1:], rtol=1e-4, atol=1e-5)


def test_without_the_check_a_wrong_rank_kills_the_process(tmp_path):
    """Evidence, not a feature: what `model.export` writes, with TensorFlow 2.21 on a CPU.

    When this fails, the kernels have learnt to refuse such a request themselves.
    """
    model = network(2)
    model.export(tmp_path, verbose=False)
    right = np.random.default_rng(0).random((2, 8, 8, 3), "float32")
    answers, done = ask(tmp_path, [{"x": right}, {"x": right[0]}, {"x": right}])
    assert_right(answers[0], model, {"x": right})
    if done.returncode == 0:
        pytest.skip("this TensorFlow on this processor survives it")
    assert done.returncode == -signal.SIGABRT
    assert len(answers) == 1
