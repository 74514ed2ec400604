"""Load a SavedModel: its meta graph, its functions, and the paths of its variables."""

import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from tfbn.serving import versions

DEFAULT = "serving_default"
_GRAPH = "saved_model.pb"


class SavedModel(NamedTuple):
    """A SavedModel in memory.

    Attributes:
        loaded: The objects, as `tf.saved_model.load` returns them.
        meta_graph: The `MetaGraphDef` that a server loads.
    """

    loaded: Any
    meta_graph: Any


def load(version: pathlib.Path) -> SavedModel:
    """Load the meta graph of a SavedModel that a server loads."""
    graphs = _meta_graphs(version)
    graph = _served(graphs, version)
    if len(graphs) == 1:
        return SavedModel(tf.saved_model.load(os.fspath(version)), graph)
    # TensorFlow loads the objects of a SavedModel only if it has a single meta graph.
    single = saved_model_pb2.SavedModel(saved_model_schema_version=1, meta_graphs=[graph])
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, _GRAPH).write_bytes(single.SerializeToString())
        for name in ("variables", "assets"):
            if (version / name).exists():
                os.symlink((version / name).resolve(), pathlib.Path(folder, name))
        return SavedModel(tf.saved_model.load(folder), graph)


def meta_graph(version: pathlib.Path) -> Any:
    """Return the `MetaGraphDef` that a server loads.

    Raises:
        ValueError: If the file is damaged, or if no meta graph has the tag `serve`.
    """
    return _served(_meta_graphs(version), version)


def _served(graphs: list[Any], version: pathlib.Path) -> Any:
    for graph in graphs:
        if "serve" in graph.meta_info_def.tags:
            return graph
    if len(graphs) == 1:
        return graphs[0]
    raise ValueError(
        f"Expected a meta graph tagged 'serve' in {str(version)!r}. Received: "
        f"{[sorted(graph.meta_info_def.tags) for graph in graphs]}. Export the model again."
    )


def _meta_graphs(version: pathlib.Path) -> list[Any]:
    try:
        content = (version / _GRAPH).read_bytes()
        return list(saved_model_pb2.SavedModel.FromString(content).meta_graphs)
    except DecodeError as error:
        raise versions.damaged(version / _GRAPH, error) from error


def node_paths(objects: Any) -> dict[int, str]:
    """Return node -> its first path, in an `object_graph_def`."""
    paths, pending = {0: ""}, [0]
    for node in pending:
        for child in objects.nodes[node].children if objects.nodes else ():
            if child.node_id not in paths:
                prefix = f"{paths[node]}/" if paths[node] else ""
                paths[child.node_id] = prefix + child.local_name
                pending.append(child.node_id)
    return paths


def bound_inputs(objects: Any, signature: str) -> list[int] | None:
    """Return the nodes that a signature captures, in order, or `None` if they are not stored."""
    node = 0
    for name in ("signatures", signature):
        children = objects.nodes[node].children if objects.nodes else ()
        nodes = [child.node_id for child in children if child.local_name == name]
        if not nodes:
            return None
        [node] = nodes
    function = objects.nodes[node].bare_concrete_function.concrete_function_name
    return list(objects.concrete_functions[function].bound_inputs)
