"""Tests of exported versions: their outputs, and that loading them requires no tfbn."""

import logging
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import (
    BATCH_NORMS,
    ONES,
    TwoInputs,
    by_numpy,
    called,
    conv_model,
    dense_model,
    everything_under,
    serve,
    signature_of,
    sweep,
)
from keras import layers

from tfbn import describe, export


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_serves_what_numpy_computes(tmp_path, batch_norm):
    model = dense_model(batch_norm)
    exported = export(model, tmp_path)
    x = np.random.default_rng(2).normal(size=(5, 4)).astype("float32")
    [name] = [tensor.name for tensor in model.inputs]
    served = serve(exported.path)(**{name: x})["output_0"]
    np.testing.assert_allclose(served, by_numpy(model, x), rtol=1e-5, atol=1e-5)
    assert exported.max_abs_difference <= 1e-6


def test_notes_about_the_temporary_folder_are_dropped(tmp_path):
    """TensorFlow writes `Assets written to: .../.tfbn-export-...`, also on Keras's loggers."""
    seen = logging.Handler()
    seen.records = []
    seen.emit = seen.records.append
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl", None)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.addHandler(seen)
            logger.setLevel(logging.INFO)
        tf.saved_model.save(tf.Module(), os.fspath(tmp_path / "other"))
        noted = [record.getMessage() for record in seen.records]
        assert any("Assets written to" in note for note in noted)
        seen.records.clear()
        export(dense_model(), tmp_path / "model")
        assert not [r for r in seen.records if "Assets written" in r.getMessage()]
        assert tf.get_logger().level == logging.INFO
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(seen)
            logger.setLevel(level)


def test_outputs_do_not_depend_on_the_rest_of_the_batch(tmp_path):
    model = conv_model()
    call = serve(export(model, tmp_path).path)
    [name] = [tensor.name for tensor in model.inputs]
    x = np.random.default_rng(3).normal(size=(6, 8, 8, 3)).astype("float32")
    x[1:] = x[1:] * 100 - 50
    alone = call(**{name: x[:1]})["output_0"]
    np.testing.assert_allclose(call(**{name: x})["output_0"][:1], alone, rtol=1e-5, atol=1e-5)


def test_trainable_flags_do_not_matter_and_nothing_is_changed(tmp_path):
    model = conv_model()
    x = np.random.default_rng(4).normal(size=(3, 8, 8, 3)).astype("float32")
    [name] = [tensor.name for tensor in model.inputs]
    served = []
    for trainable in (True, False):
        model.trainable = trainable
        before = [v.numpy() for v in model.variables]
        served.append(serve(export(model, tmp_path).path)(**{name: x})["output_0"])
        for old, variable in zip(before, model.variables, strict=True):
            np.testing.assert_array_equal(old, variable.numpy())
        assert all(layer.trainable == trainable for layer in model.layers)
        assert not any("call" in vars(layer) for layer in model.layers)
    np.testing.assert_allclose(*served, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_loader_needs_neither_keras_nor_tfbn(tmp_path):
    model = conv_model()
    exported = export(model, tmp_path / "m")
    [name] = [tensor.name for tensor in model.inputs]
    x = np.random.default_rng(5).normal(size=(3, 8, 8, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    script = f"""
import importlib.machinery, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("keras", "tf_keras", "tfbn"):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError("refused: " + spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refuse())
import numpy as np, tensorflow as tf

loaded = tf.saved_model.load({str(exported.path)!r})
x = np.load({str(tmp_path / "x.npy")!r})
y = loaded.signatures["serving_default"](**{{{name!r}: tf.constant(x)}})["output_0"]
np.save({str(tmp_path / "y.npy")!r}, y)
assert not any(m.split(".")[0] in ("keras", "tfbn") for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_integers_strings_and_unknown_sizes(tmp_path):
    words = layers.StringLookup(vocabulary=["a", "b", "c"])
    text, numbers = keras.Input((None,), dtype="string"), keras.Input((None,), dtype="int32")
    embed = layers.Embedding(5, 3)
    x = layers.BatchNormalization()(embed(words(text)) + embed(numbers))
    model = sweep(keras.Model([text, numbers], layers.GlobalMaxPooling1D()(x)))
    call = serve(export(model, tmp_path).path)
    strings, integers = np.array([["c", "?"]]), np.array([[1, 4]], "int32")
    got = call(**{text.name: strings, numbers.name: integers})["output_0"]
    table = np.float64(embed.embeddings.numpy())
    gamma, beta, mean, variance = (np.float64(v.numpy()) for v in model.layers[-2].weights)
    # Index 0 is for unknown tokens, so "c" is 3.
    summed = table[[3, 0]] + table[[1, 4]]
    want = ((summed - mean) / np.sqrt(variance + 1e-3) * gamma + beta).max(0)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_precisions(tmp_path, policy, batch_norm):
    keras.config.set_dtype_policy(policy)
    try:
        model = dense_model(batch_norm)
    finally:
        keras.config.set_dtype_policy("float32")
    exported = export(model, tmp_path)
    [spec] = signature_of(exported.path)[0][1].values()
    x = np.random.default_rng(6).normal(size=(5, 4)).astype(spec.dtype.as_numpy_dtype)
    [name] = [tensor.name for tensor in model.inputs]
    served = serve(exported.path)(**{name: x})["output_0"]
    tolerance = 1e-9 if policy == "float64" else 5e-2
    np.testing.assert_allclose(
        np.float64(served), by_numpy(model, np.float64(x)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_a_folded_export_serves_the_same(tmp_path, batch_norm):
    model = dense_model(batch_norm)
    exported = export(model, tmp_path, fold=True, require_population=True)
    x = np.random.default_rng(2).normal(size=(5, 4)).astype("float32")
    [name] = [tensor.name for tensor in model.inputs]
    served = serve(exported.path)(**{name: x})["output_0"]
    np.testing.assert_allclose(served, by_numpy(model, x), rtol=1e-5, atol=1e-5)
    assert signature_of(exported.path) == signature_of(export(model, tmp_path).path)
    # Kernels and biases of two layers, without batch norm.
    assert len(tf.saved_model.load(os.fspath(exported.path)).variables) == 4
    assert describe(exported.path)["folded"]
    assert not describe(tmp_path)["folded"]
    assert model.get_layer("bn") is model.layers[1]


def test_what_cannot_be_folded_is_not_exported(tmp_path):
    model = called(TwoInputs(), ONES)
    with pytest.raises(ValueError, match="Functional or Sequential"), pytest.warns(UserWarning):
        export(model, tmp_path / "new" / "m", fold=True)
    assert everything_under(tmp_path) == []
