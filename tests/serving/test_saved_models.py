"""Tests of loading SavedModels."""

import numpy as np
import pytest
import tensorflow as tf
from exported_models import Fused, field
from tensorflow.core.protobuf import saved_model_pb2

import tfbn
from tfbn.serving import saved_models


def test_of_two_meta_graphs_the_one_for_serving(tmp_path):
    made = Fused()
    tf.saved_model.save(made, tmp_path / "1", signatures=made.infer)
    file = tmp_path / "1" / "saved_model.pb"
    content = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    other = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs[0]
    del other.meta_info_def.tags[:]
    other.meta_info_def.tags.append("train")
    content.meta_graphs.insert(0, other)
    file.write_bytes(content.SerializeToString())
    x = field(5, 5, 3)
    actual = tfbn.recalibrate(tmp_path, x, verbose=0)
    np.testing.assert_allclose(actual.stats["bn"].mean, np.float64(x).mean((0, 1, 2)), rtol=1e-5)


class Scaled(tf.Module):
    """Two variables in a tree, and two signatures."""

    def __init__(self):
        super().__init__()
        self.inner = tf.Module()
        self.inner.scale, self.offset = tf.Variable([2.0]), tf.Variable([1.0])

    @tf.function(input_signature=[tf.TensorSpec((None, 1), name="x")])
    def infer(self, x):
        return {"y": (x + self.offset) * self.inner.scale}

    @tf.function(input_signature=[tf.TensorSpec((None, 1), name="x")])
    def shift(self, x):
        """One variable."""
        return {"y": x + self.offset}


def test_variables_of_a_signature_have_places(tmp_path):
    made = Scaled()
    signatures = {"serving_default": made.infer, "shift": made.shift}
    tf.saved_model.save(made, tmp_path, signatures=signatures)
    loaded, graph = saved_models.load(tmp_path)
    np.testing.assert_array_equal(loaded.infer(tf.ones((2, 1)))["y"], [[4.0], [4.0]])
    objects = graph.object_graph_def
    node_paths = saved_models.node_paths(objects)
    for name, function in signatures.items():
        read = {id(v) for v in function.get_concrete_function().variables}
        paths = {id(made.inner.scale): "inner/scale", id(made.offset): "offset"}
        actual = [node_paths[node] for node in saved_models.bound_inputs(objects, name)]
        assert sorted(actual) == sorted(paths[one] for one in read)
    assert saved_models.bound_inputs(objects, "none") is None


def test_what_no_server_loads_is_an_error(tmp_path):
    made = Scaled()
    tf.saved_model.save(made, tmp_path, signatures=made.infer)
    file = tmp_path / "saved_model.pb"
    content = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    content.meta_graphs.append(content.meta_graphs[0])
    for number, graph in enumerate(content.meta_graphs):
        graph.meta_info_def.tags[:] = [f"train{number}"]
    file.write_bytes(content.SerializeToString())
    with pytest.raises(ValueError, match=r"tagged 'serve'.*\[\['train0'\], \['train1'\]\]"):
        saved_models.meta_graph(tmp_path)
    del content.meta_graphs[1:]
    file.write_bytes(content.SerializeToString())
    assert list(saved_models.meta_graph(tmp_path).meta_info_def.tags) == ["train0"]
    file.write_bytes(b"no message")
    with pytest.raises(ValueError, match=r"an intact file.*saved_model\.pb"):
        saved_models.load(tmp_path)
