"""Tests of loading SavedModels."""

import numpy as np
import tensorflow as tf
from exported_models import Fused, field
from tensorflow.core.protobuf import saved_model_pb2

import tfbn


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
    found = tfbn.recalibrate(tmp_path, x, verbose=0)
    np.testing.assert_allclose(found.stats["bn"].mean, np.float64(x).mean((0, 1, 2)), rtol=1e-5)
