import numpy as np
import tensorflow as tf

from tfbn.graphs.flattening import bodies, flattened


class Nested(tf.Module):
    """Call functions inside functions, with a variable, a branch, and one function twice."""

    def __init__(self):
        super().__init__()
        self.scale = tf.Variable([2.0, 3.0])

    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def inner(self, x):
        """Multiply."""
        return x * self.scale

    @tf.function(
        input_signature=[tf.TensorSpec([None, 2], name="b"), tf.TensorSpec([None, 2], name="a")]
    )
    def serve(self, b, a):
        """Return two outputs; their names are not sorted."""
        twice = self.inner(self.inner(b))
        return {"z": tf.cond(tf.reduce_sum(a) > 0, lambda: twice, lambda: -twice), "y": a - b}


def load(path):
    module = Nested()
    tf.saved_model.save(module, path, signatures={"serving_default": module.serve})
    return tf.saved_model.load(path)


def test_a_flat_graph_computes_the_same_and_calls_no_function(tmp_path):
    loaded = load(str(tmp_path))
    signature = loaded.signatures["serving_default"]
    assert len(list(bodies(signature.graph))) > 2
    flat = flattened(signature)
    types = {op.type for op in flat.graph.get_operations()}
    assert not {"PartitionedCall", "StatefulPartitionedCall"} & types
    assert len(list(bodies(flat.graph))) == 1
    b = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    for a in (b + 1, b - 9):
        answer = flat(tf.constant(a), tf.constant(b))  # Arguments are sorted by name.
        scaled = b.astype("float64") * [4, 9] * np.sign(a.sum())
        np.testing.assert_allclose(answer["z"], scaled, rtol=1e-6)
        np.testing.assert_allclose(answer["y"], a - b, rtol=1e-6)


def test_variables_are_read_when_the_flat_graph_runs(tmp_path):
    loaded = load(str(tmp_path))
    flat = flattened(loaded.signatures["serving_default"])
    loaded.scale.assign([1.0, 1.0])
    one = tf.ones([1, 2])
    np.testing.assert_array_equal(flat(one, one)["z"], one)
