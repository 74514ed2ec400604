"""Ask TensorFlow Serving over gRPC: needs grpcio and tensorflow-serving-api.

python grpc_client.py images.npy [host:8500] [model]
"""

import sys

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

file, host, model = [*sys.argv[1:], "localhost:8500", "digits"][:3]
request = predict_pb2.PredictRequest()
request.model_spec.name = model
request.inputs["image"].CopyFrom(tf.make_tensor_proto(np.load(file)))
with grpc.insecure_channel(host) as channel:
    service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    answer = service.Predict(request, timeout=10)
print(tf.make_ndarray(answer.outputs["output_0"]).argmax(-1))
