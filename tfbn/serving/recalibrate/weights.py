"""Load variables of a SavedModel on disk, and copy a SavedModel with other values.

A SavedModel stores its variables in a checkpoint, separate from its graphs. Only the checkpoint is
written again, so graphs, signatures and assets are byte-identical copies.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

# Private. The fingerprint of a SavedModel includes a hash of its checkpoint, and the public API
# computes it only when it saves a complete model.
from tensorflow.python.saved_model.fingerprinting_utils import write_fingerprint

from tfbn.serving import versions

_FOLDER, _NAME = "variables", "variables"
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"


def read(version: pathlib.Path, paths: list[str]) -> list[np.ndarray]:
    """Return the values of variables.

    Args:
        version: The directory of a SavedModel.
        paths: The paths of variables in its tree of objects: `"variables/3"`.

    Raises:
        ValueError: If a variable does not exist.
    """
    reader = tf.train.load_checkpoint(_prefix(version))
    return [reader.get_tensor(key) for key in _keys(version, reader, paths)]


def copy_with(version: pathlib.Path, target: pathlib.Path, values: dict[str, np.ndarray]) -> None:
    """Write a copy of a SavedModel with other values of some variables.

    Args:
        version: The directory of a SavedModel.
        target: The directory to create.
        values: Path of a variable (see `read`) -> value, which is cast to the variable's dtype.

    Raises:
        ValueError: If a variable does not exist or has another shape.
    """
    for parent, _, files in os.walk(version, followlinks=True):
        folder = target / os.path.relpath(parent, version)
        folder.mkdir()
        for name in files:  # Without file modes: the version may be read-only.
            if not name.startswith(f"{_NAME}.data"):
                shutil.copyfile(os.path.join(parent, name), folder / name)
    reader = tf.train.load_checkpoint(_prefix(version))
    dtypes = reader.get_variable_to_dtype_map()
    names = list(dtypes)
    with tf.device("CPU"):
        restored = tf.raw_ops.RestoreV2(
            prefix=_prefix(version),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            dtypes=[dtypes[name] for name in names],
        )
        tensors = dict(zip(names, restored, strict=True))
        keys = dict(zip(_keys(version, reader, list(values)), values.values(), strict=True))
        for key, value in (keys | _copies(reader, tensors, keys)).items():
            # Variables of other tools may have axes of size 1 for broadcasting.
            if tensors[key].shape.num_elements() != value.size:
                shape = tuple(tensors[key].shape)
                raise ValueError(f"Expected shape {shape} of {key!r}. Received: {value.shape}.")
            tensors[key] = tf.cast(tf.reshape(value, tensors[key].shape), tensors[key].dtype)
        tf.raw_ops.SaveV2(
            prefix=_prefix(target),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=list(tensors.values()),
        )
    write_fingerprint(os.fspath(target))


def _copies(
    reader: Any, tensors: Mapping[str, tf.Tensor], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the values of further copies of the same variables, which no function reads.

    Keras's `export` stores each variable twice. A copy has the variable's full name and value.
    """
    nodes = _nodes(reader)
    entries = [entry for node in nodes for entry in node.attributes if entry.name == _VALUE]
    names = {entry.checkpoint_key: entry.full_name for entry in entries}
    left = [key for key in names if key not in values]
    copies = {}
    for key, value in values.items():
        for other in left:
            same = names[other] == names[key] and tensors[other].dtype == tensors[key].dtype
            if same and np.array_equal(tensors[other], tensors[key], equal_nan=True):
                copies[other] = value
                left.remove(other)
                break
    return copies


def _nodes(reader: Any) -> Any:
    content = reader.get_tensor(_OBJECTS)
    return trackable_object_graph_pb2.TrackableObjectGraph.FromString(content).nodes


def _prefix(version: pathlib.Path) -> str:
    return os.path.join(version, _FOLDER, _NAME)


def _keys(version: pathlib.Path, reader: Any, paths: Iterable[str]) -> list[str]:
    """Return the names in the checkpoint of the variables at some paths."""
    nodes = _nodes(reader)
    children = [{child.local_name: child.node_id for child in node.children} for node in nodes]
    names = []
    for path in paths:
        node: int | None = 0
        for name in path.split("/"):
            node = children[node].get(name) if node is not None else None
        keys = [] if node is None else nodes[node].attributes
        keys = [attribute.checkpoint_key for attribute in keys if attribute.name == _VALUE]
        if len(keys) != 1:
            raise versions.damaged(version, f"it has no variable at {path!r}")
        names += keys
    return names
