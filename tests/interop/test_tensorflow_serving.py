"""TensorFlow Serving itself: two versions, gRPC and REST, wrong requests, a hot swap."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

PROGRAM = "tensorflow_model_server"

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:The batch norm statistics"),
    pytest.mark.skipif(
        shutil.which(PROGRAM) is None,
        reason=f"{PROGRAM} is not on the PATH: it comes from Google's Debian repository or from "
        "the docker image tensorflow/serving, not from PyPI",
    ),
]


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(4, 3),
            tfbn.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Server:
    """A running server of all versions in a model's directory."""

    def __init__(self, directory, log, *flags):
        config = log.with_suffix(".config")
        config.write_text(
            f'model_config_list {{ config {{ name: "m" base_path: "{directory}" '
            'model_platform: "tensorflow" model_version_policy { all {} } } }'
        )
        self.grpc_port, self.rest_port = free_port(), free_port()
        self.log = log
        self.process = subprocess.Popen(
            [
                PROGRAM,
                f"--port={self.grpc_port}",
                f"--rest_api_port={self.rest_port}",
                f"--model_config_file={config}",
                "--file_system_poll_wait_seconds=1",
                *flags,
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def rest(self, path, content=None):
        """Status and JSON of an answer."""
        url = f"http://localhost:{self.rest_port}/v1/models/m{path}"
        content = None if content is None else json.dumps(content).encode()
        try:
            with urllib.request.urlopen(url, content, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def predict(self, x, version=None):
        which = "" if version is None else f"/versions/{version}"
        status, answer = self.rest(f"{which}:predict", {"instances": x.tolist()})
        assert status == 200, answer
        return np.array(answer["predictions"])

    def wait_for(self, version):
        """Until a version is available."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                _, answer = self.rest("")
                states = {s["version"]: s["state"] for s in answer["model_version_status"]}
                if states.get(str(version)) == "AVAILABLE":
                    return
            except (OSError, KeyError):
                pass
            time.sleep(0.1)
        pytest.fail(f"version {version} did not come up:\n{self.log.read_text()}")


@pytest.fixture
def served(tmp_path):
    """A server and the model of its version 1."""
    model = network()
    tfbn.export(model, tmp_path / "m")
    server = Server(tmp_path / "m", tmp_path / "server.log")
    try:
        server.wait_for(1)
        yield server, model, tmp_path / "m"
    finally:
        server.process.terminate()
        server.process.wait(30)


def test_rest_and_grpc_answer_as_keras_does(served):
    grpc = pytest.importorskip("grpc")
    apis = pytest.importorskip("tensorflow_serving.apis.predict_pb2")
    services = pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")
    server, model, _ = served
    x = np.random.default_rng(0).random((5, 8, 8, 3), "float32")
    want = model.predict(x, verbose=0)
    np.testing.assert_allclose(server.predict(x), want, rtol=1e-5, atol=1e-5)

    with grpc.insecure_channel(f"localhost:{server.grpc_port}") as channel:
        predict = services.PredictionServiceStub(channel).Predict

        def ask(x):
            request = apis.PredictRequest()
            request.model_spec.name = "m"
            request.inputs["image"].CopyFrom(tf.make_tensor_proto(x))
            return tf.make_ndarray(predict(request, timeout=30).outputs["output_0"])

        np.testing.assert_allclose(ask(x), want, rtol=1e-5, atol=1e-5)
        for wrong in (x[0], x[:, :4], x[..., :1], x.astype("int32"), x.reshape(5, -1)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(wrong)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        np.testing.assert_allclose(ask(x), want, rtol=1e-5, atol=1e-5)
    for wrong in (x[0], x[:, :4], x.reshape(5, -1)):
        assert server.rest(":predict", {"instances": wrong.tolist()})[0] == 400
    assert server.process.poll() is None


def test_a_new_version_takes_over_between_two_requests(served):
    server, model, directory = served
    x = np.random.default_rng(1).random((2, 8, 8, 3), "float32")
    old = model.predict(x, verbose=0)
    model.layers[-1].bias.assign([5.0, -5.0])
    new = model.predict(x, verbose=0)
    np.testing.assert_allclose(server.predict(x), old, rtol=1e-5, atol=1e-5)
    assert tfbn.export(model, directory).version == 2
    deadline = time.monotonic() + 60
    while not np.allclose(answer := server.predict(x), new, rtol=1e-5, atol=1e-5):
        np.testing.assert_allclose(answer, old, rtol=1e-5, atol=1e-5)
        assert time.monotonic() < deadline
    server.wait_for(2)
    np.testing.assert_allclose(server.predict(x, version=1), old, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(server.predict(x, version=2), new, rtol=1e-5, atol=1e-5)


def test_warmup_requests_are_taken(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    x = np.random.default_rng(2).random((2, 8, 8, 3), "float32")
    tfbn.export(network(), tmp_path / "m", warmup=x)
    server = Server(tmp_path / "m", tmp_path / "server.log")
    try:
        server.wait_for(1)
    finally:
        server.process.terminate()
        server.process.wait(30)
    assert "warmup" in server.log.read_text().lower()


def test_warmup_requests_fit_a_server_that_batches(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    x = np.random.default_rng(3).random((70, 8, 8, 3), "float32")
    tfbn.export(network(), tmp_path / "m", warmup=x)
    parameters = tmp_path / "batching.config"
    parameters.write_text("max_batch_size { value: 32 }\nbatch_timeout_micros { value: 1000 }\n")
    server = Server(
        tmp_path / "m",
        tmp_path / "server.log",
        "--enable_batching=true",
        f"--batching_parameters_file={parameters}",
    )
    try:
        server.wait_for(1)
    finally:
        server.process.terminate()
        server.process.wait(30)
