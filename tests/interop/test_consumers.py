"""What others make of an export: a trained network, loaded and run by each of them.

Each must be within 1e-5 of Keras (LiteRT 1e-4), which is asked once, before any export.
"""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def trained():
    """A network of all that batch norm can follow, trained on digits; images; predictions."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU()(tfbn.BatchNormalization()(layers.Conv2D(16, 3, padding="same")(x)))
    y = tfbn.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    y = layers.BatchNormalization()(layers.Conv2D(16, 1, use_bias=False)(layers.ReLU()(y)))
    x = layers.ReLU()(tfbn.BatchNormalization()(layers.Add()([x, y])))
    x = layers.ReLU()(tfbn.BatchNormalization()(layers.SeparableConv2D(32, 3, strides=2)(x)))
    x = layers.ReLU()(tfbn.BatchNormalization()(layers.Dense(32)(layers.Flatten()(x))))
    model = keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, digits.target, batch_size=32, epochs=5, verbose=0)
    tfbn.update_population_stats(model, images, batch_size=256, verbose=0)
    assert model.evaluate(images, digits.target, verbose=0)[1] > 0.97
    some = images[:50]
    return model, some, model.predict(some, verbose=0)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "folded"])
def exported(trained, request, tmp_path_factory):
    """The directory of its export, plain and folded."""
    directory = tmp_path_factory.mktemp("digits")
    return os.fspath(tfbn.export(trained[0], directory, fold=request.param).path)


def assert_close(got, trained, tolerance=1e-5):
    difference = np.max(np.abs(np.asarray(got) - trained[2]))
    print(f"largest difference from Keras: {difference:.1e}")
    assert difference <= tolerance


def run(*command, **arguments):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saved_model_cli(exported, trained, tmp_path):
    program = pathlib.Path(sys.executable).with_name("saved_model_cli")
    which = ["--dir", exported, "--tag_set", "serve", "--signature_def", "serving_default"]
    shown = run(program, "show", *which)
    assert "inputs['image'] tensor_info" in shown
    assert "shape: (-1, 8, 8, 1)" in shown
    np.save(tmp_path / "x.npy", trained[1])
    inputs = ["--inputs", f"image={tmp_path / 'x.npy'}", "--outdir", tmp_path]
    run(program, "run", *which, *inputs)
    assert_close(np.load(tmp_path / "output_0.npy"), trained)


def test_onnx_runtime(exported, trained, tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    file = os.fspath(tmp_path / "model.onnx")
    # Its own process: tf2onnx patches TensorFlow's graph optimiser.
    run(sys.executable, "-m", "tf2onnx.convert", "--saved-model", exported, "--output", file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"image": trained[1]})
    assert_close(result, trained)


def test_openvino(exported, trained):
    openvino = pytest.importorskip("openvino")
    # The default precision is that of the processor, which may be bfloat16.
    compiled = openvino.compile_model(
        openvino.convert_model(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert_close(compiled({"image": trained[1]})[0], trained)


def test_litert(exported, trained):
    interpreters = pytest.importorskip("ai_edge_litert.interpreter")
    content = tf.lite.TFLiteConverter.from_saved_model(exported).convert()
    runner = interpreters.Interpreter(model_content=content).get_signature_runner()
    assert_close(runner(image=trained[1])["output_0"], trained, tolerance=1e-4)
