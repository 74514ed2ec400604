"""Tests of the example's client, with servers that answer like TensorFlow Serving."""

import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import sys
import threading
from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "serving" / "monitor_client.py"


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("monitor_client", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a swept model of images, and images of its population."""
    rng = np.random.default_rng(0)
    images = rng.gamma(2.0, 0.2, (300, 5, 5, 1)).astype("float32")
    x = keras.Input((5, 5, 1), name="image")
    y = layers.BatchNormalization(name="a")(layers.Conv2D(4, 3)(x))
    y = layers.BatchNormalization(name="b")(layers.Conv2D(4, 3)(layers.ReLU()(y)))
    model = keras.Model(x, layers.Flatten()(y))
    tfbn.update_population_stats(model, images, verbose=0)
    path = tmp_path_factory.mktemp("models") / "digits"
    tfbn.export(model, path, monitor=True)
    return path, rng.gamma(2.0, 0.2, (20, 5, 5, 1)).astype("float32")


@pytest.fixture
def signatures(exported):
    loaded = tf.saved_model.load(os.fspath(exported[0] / "1"))
    yield loaded.signatures
    del loaded


@contextlib.contextmanager
def rest(signatures):
    """TensorFlow Serving's REST interface for requests by rows ("instances")."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/digits:predict"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            signature = signatures[request["signature_name"]]
            outputs = signature(image=tf.constant(request["instances"], tf.float32))
            columns = {
                name: (y.numpy().astype(str) if y.dtype == tf.string else y.numpy()).tolist()
                for name, y in outputs.items()
            }
            rows = [{name: column[0] for name, column in columns.items()}]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": rows}).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def grpc(signatures):
    """TensorFlow Serving's gRPC interface."""
    grpc = pytest.importorskip("grpc", reason="needs the extra `serving`")
    apis = pytest.importorskip("tensorflow_serving.apis", reason="needs the extra `serving`")
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            signature = signatures[request.model_spec.signature_name]
            outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
            response = predict_pb2.PredictResponse()
            for name, y in outputs.items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(y.numpy()))
            return response

    assert apis
    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.slow
@pytest.mark.parametrize("interface", [grpc, rest])
def test_the_client_ends_with_1_where_the_data_has_moved(
    tmp_path, monkeypatch, capsys, client, exported, signatures, interface
):
    path, images = exported
    options = ["--rest"] if interface is rest else []
    with interface(signatures) as host:
        for shift, expected, words in (
            (1.0, 0, "20 samples cannot be told from the population"),
            (0.3, 1, "20 samples have moved from the population"),
        ):
            np.save(tmp_path / "images.npy", np.float32(shift) * images)
            arguments = [str(tmp_path / "images.npy"), str(path), "--host", host, *options]
            monkeypatch.setattr(sys, "argv", ["monitor_client.py", *arguments])
            assert client.main() == expected
            printed = capsys.readouterr().out.splitlines()
            assert printed[0].startswith(words)
            assert [line.split()[0] for line in printed[1:]] in (
                ["layer", "a", "b"],
                ["layer", "b", "a"],
            )
