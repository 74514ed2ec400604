"""Names, dtypes and shapes of an endpoint, and clients of the version before."""

import keras
import pytest
import tensorflow as tf
from exported_models import ONES, STRUCTURES, TwoInputs, dense_model, everything_under, signature_of
from keras import layers

from tfbn.serving import export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_clients_of_keras_export_need_no_change(tmp_path, structure):
    model = STRUCTURES[structure]()
    model.export(tmp_path / "keras", verbose=False)
    assert signature_of(export(model, tmp_path / "m").path) == signature_of(tmp_path / "keras")


@pytest.mark.filterwarnings("ignore")
def test_a_given_signature_is_that_of_the_endpoint(tmp_path):
    model = TwoInputs()
    model.build((None, 4))
    given = [keras.InputSpec(shape=(2, 4), dtype="float32")]
    [name] = signature_of(export(model, tmp_path, input_signature=given).path)[0][1]
    spec = signature_of(tmp_path / "1")[0][1][name]
    assert (spec.shape, spec.dtype) == ((2, 4), tf.float32)


def test_errors_of_models_and_signatures(tmp_path):
    with pytest.raises(ValueError, match="Expected a Keras model"):
        export(layers.Dense(2), tmp_path)
    with pytest.raises(ValueError, match="Expected a built model"):
        export(keras.Sequential([layers.Dense(2)]), tmp_path)
    model = dense_model()
    with pytest.raises(ValueError, match="a list"):
        export(model, tmp_path, input_signature=tf.TensorSpec((None, 4)))
    with pytest.raises(ValueError, match="known rank"):
        export(model, tmp_path, input_signature=[tf.TensorSpec(None, tf.float32)])
    with pytest.raises(ValueError, match="a dtype"):
        export(model, tmp_path, input_signature=[keras.InputSpec(shape=(None, 4))])

    class NoShapes(keras.Model):
        def call(self, x, y):
            return x + y

    model = NoShapes()
    model(ONES, ONES)
    with pytest.raises(ValueError, match="argument: 'y'"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []
