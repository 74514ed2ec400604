"""Tests of the served graph: requests that raise errors, and their messages."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import conv_model, functional, serve
from keras import layers

from tfbn import export


def test_an_empty_batch_is_answered_with_one_clear_error(tmp_path):
    model = conv_model()
    call = serve(export(model, tmp_path).path)
    [name] = [tensor.name for tensor in model.inputs]
    with pytest.raises(tf.errors.InvalidArgumentError, match="Received: an empty batch"):
        call(**{name: np.zeros((0, 8, 8, 3), "float32")})
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(call(**{name: x})["output_0"], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_a_batch_is_empty_when_all_inputs_are(tmp_path):
    nodes, edges = keras.Input((4,), name="nodes"), keras.Input((2,), name="edges")
    outputs = [layers.Dense(2)(x) for x in (nodes, edges)]
    model = keras.Model([nodes, edges], outputs)
    call = serve(export(model, tmp_path).path)
    x, none = np.ones((3, 4), "float32"), np.zeros((0, 2), "float32")
    answer = call(nodes=x, edges=none)
    assert (answer["output_0"].shape, answer["output_1"].shape) == ((3, 2), (0, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="empty batch"):
        call(nodes=x[:0], edges=none)


@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_a_batch_of_a_fixed_size_has_no_check(tmp_path):
    model = functional(lambda a, b: [a, b], lambda u, v: u + v)
    specs = [[tf.TensorSpec((2, n), tf.float32, name) for n, name in ((4, "a"), (3, "b"))]]
    export(model, tmp_path, input_signature=specs)
    graph = tf.saved_model.load(str(tmp_path / "1")).serve.concrete_functions[0].graph
    assert "Assert" not in {op.type for op in graph.get_operations()}
