"""A client of TensorFlow's C API, which loads and runs a SavedModel as TensorFlow Serving does.

    python c_api.py saved_model_directory < requests.json > answers.jsonl

Neither Python's TensorFlow nor its checks of shapes are there: what is fed reaches the graph.
Standard input has `{"inputs": {name: tensor}, "outputs": {name: tensor}, "requests": [...]}`
with the names of the graph's tensors, and for each request a dict from input name to
`{"dtype", "shape", "values"}`. Each answer is one line, `{"code", "message", "outputs"}`,
written before the next request is made, so that the last line tells who killed the process.
"""

import ctypes
import importlib.util
import json
import math
import pathlib
import sys

import numpy as np

# The numbers of tensorflow/c/tf_datatype.h.
DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10}
NAMES = {number: name for name, number in DTYPES.items()}

pointer, integer = ctypes.c_void_p, ctypes.c_int


class Output(ctypes.Structure):
    """TF_Output."""

    _fields_ = (("operation", pointer), ("index", integer))


def library():
    """The C library inside the installed TensorFlow, without importing that."""
    [package] = importlib.util.find_spec("tensorflow").submodule_search_locations
    actual = ctypes.CDLL(str(pathlib.Path(package) / "libtensorflow_cc.so.2"))
    for name, result, *arguments in (
        ("TF_NewStatus", pointer),
        ("TF_GetCode", integer, pointer),
        ("TF_Message", ctypes.c_char_p, pointer),
        ("TF_NewGraph", pointer),
        ("TF_NewSessionOptions", pointer),
        ("TF_LoadSessionFromSavedModel", *[pointer] * 5, integer, *[pointer] * 3),
        ("TF_GraphOperationByName", pointer, pointer, ctypes.c_char_p),
        ("TF_AllocateTensor", pointer, integer, pointer, integer, ctypes.c_size_t),
        ("TF_DeleteTensor", None, pointer),
        ("TF_TensorData", pointer, pointer),
        ("TF_TensorType", integer, pointer),
        ("TF_NumDims", integer, pointer),
        ("TF_Dim", ctypes.c_int64, pointer, integer),
        ("TF_TensorByteSize", ctypes.c_size_t, pointer),
        (
            "TF_SessionRun",
            None,
            *[pointer] * 4,
            integer,
            *[pointer] * 2,
            integer,
            pointer,
            integer,
            *[pointer] * 2,
        ),
    ):
        function = getattr(actual, name)
        function.restype, function.argtypes = result, arguments
    return actual


class Session:
    """A loaded SavedModel."""

    def __init__(self, directory):
        self.tf = library()
        self.status = self.tf.TF_NewStatus()
        self.graph = self.tf.TF_NewGraph()
        tags = (ctypes.c_char_p * 1)(b"serve")
        self.session = self.tf.TF_LoadSessionFromSavedModel(
            self.tf.TF_NewSessionOptions(),
            None,
            str(directory).encode(),
            tags,
            1,
            self.graph,
            None,
            self.status,
        )
        code, message = self.answer()
        if code:
            raise RuntimeError(message)

    def answer(self):
        """The code (0 is fine, 3 is INVALID_ARGUMENT) and message of the last call."""
        return self.tf.TF_GetCode(self.status), self.tf.TF_Message(self.status).decode()

    def output(self, tensor):
        """A tensor of the graph, by its name."""
        name, index = tensor.split(":")
        return Output(self.tf.TF_GraphOperationByName(self.graph, name.encode()), int(index))

    def run(self, feeds, fetches):
        """Code, message and arrays. Keys of `feeds` and `fetches` are names of tensors."""
        keys = (Output * len(feeds))(*map(self.output, feeds))
        values = (pointer * len(feeds))(*map(self.to_tensor, feeds.values()))
        wanted = (Output * len(fetches))(*map(self.output, fetches))
        got = (pointer * len(fetches))()
        self.tf.TF_SessionRun(
            self.session,
            None,
            keys,
            values,
            len(keys),
            wanted,
            got,
            len(wanted),
            None,
            0,
            None,
            self.status,
        )
        for value in values:
            self.tf.TF_DeleteTensor(value)
        code, message = self.answer()
        return code, message, [] if code else [self.from_tensor(tensor) for tensor in got]

    def to_tensor(self, array):
        """A new TF_Tensor."""
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor = self.tf.TF_AllocateTensor(DTYPES[array.dtype.name], dims, array.ndim, array.nbytes)
        ctypes.memmove(self.tf.TF_TensorData(tensor), array.tobytes(), array.nbytes)
        return tensor

    def from_tensor(self, tensor):
        """Its values, after which it is gone."""
        shape = [self.tf.TF_Dim(tensor, i) for i in range(self.tf.TF_NumDims(tensor))]
        size = self.tf.TF_TensorByteSize(tensor)
        content = ctypes.string_at(self.tf.TF_TensorData(tensor), size) if math.prod(shape) else b""
        dtype = NAMES[self.tf.TF_TensorType(tensor)]
        self.tf.TF_DeleteTensor(tensor)
        return np.frombuffer(content, dtype).reshape(shape)


def main(directory):
    """Answer the requests on standard input."""
    asked = json.load(sys.stdin)
    session = Session(directory)
    for request in asked["requests"]:
        feeds = {
            asked["inputs"][name]: np.array(x["values"], x["dtype"]).reshape(x["shape"])
            for name, x in request.items()
        }
        code, message, outputs = session.run(feeds, list(asked["outputs"].values()))
        named = {
            name: {"shape": y.shape, "values": y.ravel().tolist()}
            for name, y in zip(asked["outputs"], outputs, strict=not code)
        }
        print(json.dumps({"code": code, "message": message, "outputs": named}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
