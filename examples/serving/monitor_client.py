"""Is what the server meets still what the model was trained on? Ends with 1 if it is not.

python monitor_client.py images.npy models/digits [--rest] [--host localhost:8500] [--model digits]

Each image is one request for the signature `monitor`, over gRPC (needs grpcio and
tensorflow-serving-api) or over REST. The answers are compared with the population that lies
beside the model.
"""

import argparse
import json
import sys
import urllib.request

import numpy as np

import tfbn


def over_grpc(images, host, model):
    """The answers to requests of one image each."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = "monitor"
    with grpc.insecure_channel(host) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for image in images:
            request.inputs["image"].CopyFrom(tf.make_tensor_proto(image[None]))
            yield service.Predict(request, timeout=10)


def over_rest(images, host, model):
    """The answers to requests of one image each."""
    url = f"http://{host}/v1/models/{model}:predict"
    for image in images:
        request = {"signature_name": "monitor", "instances": [image.tolist()]}
        with urllib.request.urlopen(url, json.dumps(request).encode(), timeout=10) as answer:
            yield json.load(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a .npy file")
    parser.add_argument("path", help="the model's directory, or that of the version that answers")
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--host", help="localhost:8500, with --rest localhost:8501, by default")
    parser.add_argument("--model", default="digits")
    args = parser.parse_args()
    ask, port = (over_rest, 8501) if args.rest else (over_grpc, 8500)
    served = tfbn.ServedStats(args.path)
    for answer in ask(np.load(args.images), args.host or f"localhost:{port}", args.model):
        served.add(answer)
    drift = served.compare()
    drift.summary()
    return 1 if drift.drifted else 0


if __name__ == "__main__":
    sys.exit(main())
