"""Write warm-up requests, which a server executes before it reports that it is ready."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

import keras
import tensorflow as tf

from tfbn.serving.export import signature

FILE = "assets.extra/tf_serving_warmup_requests"

# TensorFlow Serving does not load a model with more.
MAX_REQUESTS = 1000


def requests_in(batches: Iterable[list], specs: list, batch_size: int) -> Iterator[list]:
    """Return at most 1000 requests of at most `batch_size` samples.

    Args:
        batches: Inputs, see `signature.batches`.
        specs: The arguments of the endpoint. If the first axis of one of them has a fixed size, a
            batch is one request.
        batch_size: The largest number of samples of one request.
    """
    parts = (part for batch in batches for part in _split(batch, specs, batch_size))
    return itertools.islice(parts, MAX_REQUESTS)


def _split(batch: list, specs: list, batch_size: int) -> Iterator[list]:
    is_open = all(spec.shape.rank and spec.shape[0] is None for spec in keras.tree.flatten(specs))
    sizes = {x.shape[0] for x in keras.tree.flatten(batch)} if is_open else set()
    if len(sizes) != 1:  # The axes are not samples: nodes and edges of a graph, for example.
        yield batch
        return
    [size] = sizes
    for start in range(0, size, batch_size):
        yield keras.tree.map_structure(lambda x, at=start: x[at : at + batch_size], batch)


def require_serving_api() -> None:
    """Raise `ImportError` unless tensorflow-serving-api is installed."""
    try:
        from tensorflow_serving.apis import prediction_log_pb2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Warm-up needs tensorflow-serving-api: pip install 'tfbn[serving]' (tensorflow-cpu: "
            "pip install --no-deps tensorflow-serving-api in TensorFlow's version)."
        ) from error


def write_requests(
    version: pathlib.Path, model_name: str, input_names: list[str], requests: Iterable[list]
) -> None:
    """Write requests into a version, in the file that TensorFlow Serving loads.

    Args:
        version: The directory of a version that is not yet in place.
        model_name: The name of the model in requests.
        input_names: The names of the inputs, in the order of the endpoint's arguments.
        requests: The inputs, as `requests_in` returns them.
    """
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    (version / FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(os.fspath(version / FILE)) as file:
        for inputs in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature.DEFAULT
            for name, x in zip(input_names, keras.tree.flatten(inputs), strict=True):
                request.inputs[name].CopyFrom(tf.make_tensor_proto(x))
            log = prediction_log_pb2.PredictionLog(
                predict_log=prediction_log_pb2.PredictLog(request=request)
            )
            file.write(log.SerializeToString())
