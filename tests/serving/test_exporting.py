import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.keras_models import batch_norm_layers, fingerprint
from tfbn.population import LayerStats, PopulationStats
from tfbn.serving import describe, export

BATCH_NORMS = [tfbn.BatchNormalization, keras.layers.BatchNormalization]


def sweep(model):
    """Assign statistics as of a sweep, random ones, so that no test passes by mean 0, var 1."""
    rng = np.random.default_rng(1)
    found = {}
    for path, layer in batch_norm_layers(model).items():
        channels = layer.moving_mean.shape[0]
        found[path] = LayerStats(
            320, rng.normal(size=channels), rng.uniform(0.5, 2.0, size=channels)
        )
        if layer.scale:
            layer.gamma.assign(rng.uniform(0.5, 2.0, size=channels))
        if layer.center:
            layer.beta.assign(rng.normal(size=channels))
    stats = PopulationStats(
        found,
        method="pooled",
        samples=20,
        batches=2,
        batch_size=10,
        fingerprint=fingerprint(model),
        previous=PopulationStats.read(model),
    )
    stats.assign(model)
    return model


def dense_model(batch_norm=keras.layers.BatchNormalization):
    return sweep(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(3), batch_norm(name="bn"), layers.Dense(2)]
        )
    )


def conv_model():
    return sweep(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
    )


def by_numpy(model, x):
    """Dense, batch norm, Dense in float64."""
    first, bn, last = model.layers
    w = [np.float64(v.numpy()) for v in (*first.weights, *last.weights)]
    gamma, beta, mean, variance = (np.float64(v.numpy()) for v in bn.weights)
    hidden = (x @ w[0] + w[1] - mean) / np.sqrt(variance + bn.epsilon) * gamma + beta
    return hidden @ w[2] + w[3]


def serve(path):
    """What a server does: call the default signature with tensors by name."""
    loaded = tf.saved_model.load(os.fspath(path))
    signature = loaded.signatures["serving_default"]

    def call(**inputs):
        outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
        call.keep = loaded
        return {name: y.numpy() for name, y in outputs.items()}

    return call


def signature_of(path):
    signature = tf.saved_model.load(os.fspath(path)).signatures["serving_default"]
    return signature.structured_input_signature, signature.structured_outputs


def everything_under(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# Layout.


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    model = dense_model()
    assert export(model, tmp_path / "m").path == tmp_path / "m" / "1"
    assert export(model, str(tmp_path / "m")).version == 2
    assert export(model, tmp_path / "m", version=9).version == 9
    # To a server `012` is version 12, and `notes` and `-1` are none.
    for name in ("012", "notes", "-1", "1.5"):
        (tmp_path / "m" / name).mkdir()
    assert export(model, tmp_path / "m").version == 13
    before = everything_under(tmp_path)
    for taken in (9, 12):
        with pytest.raises(FileExistsError, match=f"Received: {taken}"):
            export(model, tmp_path / "m", version=taken)
    assert everything_under(tmp_path) == before


@pytest.mark.parametrize("version", [-1, 1.0, "1", True])
def test_a_version_is_a_whole_number(tmp_path, version):
    with pytest.raises(ValueError, match="whole number"):
        export(dense_model(), tmp_path / "m", version=version)
    assert everything_under(tmp_path) == []


def test_a_server_of_another_user_may_read_it(tmp_path):
    (tmp_path / "plain").mkdir()
    version = export(dense_model(), tmp_path / "m").path
    assert os.stat(version).st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_poll_never_sees_a_part(tmp_path, monkeypatch):
    seen = []
    load = tf.saved_model.load

    def polled(*args, **kwargs):
        seen.append([name for name in os.listdir(tmp_path) if name.isdigit()])
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", polled)
    export(dense_model(), tmp_path)
    assert seen == [[]]
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["saving", "saved", "verifying", "renaming"])
def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch, when, error):
    model = dense_model()
    export(model, tmp_path / "once")  # After this every module of TensorFlow is in its place.
    shutil.rmtree(tmp_path / "once")

    def fail(*args, **kwargs):
        if when == "saved":
            save(*args, **kwargs)
        raise error

    save = tf.saved_model.save
    module, name = {
        "saving": (tf.saved_model, "save"),
        "saved": (tf.saved_model, "save"),
        "verifying": (tf.saved_model, "load"),
        "renaming": (os, "rename"),
    }[when]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error), match=str(error)):
        export(model, tmp_path / "new" / "m")
    assert everything_under(tmp_path) == []
    monkeypatch.undo()
    (tmp_path / "old" / "1").mkdir(parents=True)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error)):
        export(model, tmp_path / "old")
    assert everything_under(tmp_path) == ["old", "old/1"]


def test_of_two_exporters_of_a_version_one_is_told(tmp_path, monkeypatch):
    load = tf.saved_model.load

    def other_exporter(*args, **kwargs):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "saved_model.pb").write_text("the other's")
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", other_exporter)
    with pytest.raises(FileExistsError):
        export(dense_model(), tmp_path)
    assert everything_under(tmp_path) == ["1", "1/saved_model.pb"]
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "the other's"


def test_object_stores_are_refused():
    with pytest.raises(ValueError, match="local directory"):
        export(dense_model(), "gs://bucket/model")


# What is served.


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_serves_what_numpy_computes(tmp_path, batch_norm):
    model = dense_model(batch_norm)
    exported = export(model, tmp_path)
    x = np.random.default_rng(2).normal(size=(5, 4)).astype("float32")
    [name] = [tensor.name for tensor in model.inputs]
    served = serve(exported.path)(**{name: x})["output_0"]
    np.testing.assert_allclose(served, by_numpy(model, x), rtol=1e-5, atol=1e-5)
    assert exported.max_abs_difference <= 1e-6


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
    np.testing.assert_array_equal(*served)


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(self.dense(x), training=training)


class OfDict(TwoInputs):
    def call(self, x, training=None):
        return {"sum": super().call(x["p"] + x["q"], training), "p": x["p"]}


def called(model, x):
    model(x)
    return model


def functional(inputs, outputs):
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    u = layers.BatchNormalization()(layers.Dense(2, name="u")(a))
    v = layers.Dense(2, name="v")(b)
    return keras.Model(inputs(a, b), outputs(u, v))


ONES = np.ones((2, 4), "float32")
STRUCTURES = {
    "sequential": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2)]),
    "sequential without Input": lambda: called(keras.Sequential([layers.Dense(2)]), ONES),
    "one": lambda: functional(lambda a, b: [a, b], lambda u, v: u + v),
    "lists": lambda: functional(lambda a, b: [a, b], lambda u, v: [u, v]),
    "dicts": lambda: functional(lambda a, b: {"a": a, "b": b}, lambda u, v: {"u": u, "v": v}),
    "nested": lambda: functional(lambda a, b: {"a": [a], "b": b}, lambda u, v: (u, v)),
    "subclassed": lambda: called(TwoInputs(), ONES),
    "subclassed with dicts": lambda: called(OfDict(), {"p": ONES, "q": ONES}),
}


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
    # Index 0 is for what is not in the vocabulary, so "c" is 3.
    summed = table[[3, 0]] + table[[1, 4]]
    want = ((summed - mean) / np.sqrt(variance + 1e-3) * gamma + beta).max(0)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)


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


# What is refused.


class HardWired(keras.Model):
    def __init__(self, batch_norm):
        super().__init__()
        self.block = keras.Sequential([layers.Dense(3), batch_norm(name="inner")])

    def call(self, x):
        return self.block.layers[1](self.block.layers[0](x), training=True)


class InCompiledFunction(HardWired):
    @tf.function
    def call(self, x):
        return super().call(x)


@pytest.mark.parametrize("cls", [HardWired, InCompiledFunction])
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_training_mode_is_refused_and_the_layer_named(tmp_path, batch_norm, cls):
    model = cls(batch_norm)
    model(ONES)
    sweep(model)
    with pytest.raises(ValueError, match=r"'sequential.*/inner'"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []
    assert "call" not in vars(model.block.layers[1])


def test_a_frozen_layer_is_in_inference_mode_whatever_it_is_told(tmp_path):
    model = HardWired(keras.layers.BatchNormalization)
    model(ONES)
    model.block.layers[1].trainable = False
    export(sweep(model), tmp_path)


def test_training_mode_in_a_functional_model_is_never_exported(tmp_path):
    x = keras.Input((4,))
    model = sweep(keras.Model(x, layers.BatchNormalization(name="hard")(x, training=True)))
    given = np.random.default_rng(9).normal(size=(5, 4)).astype("float32")
    gamma, beta, mean, variance = (np.float64(v.numpy()) for v in model.layers[1].weights)
    want = (given - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    # Which of the two `training` counts is another matter in older versions of Keras 3.
    if np.allclose(model(given, training=False), want, rtol=1e-4, atol=1e-4):
        served = serve(export(model, tmp_path).path)(**{x.name: given})["output_0"]
        np.testing.assert_allclose(served, want, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="layer 'hard'"):
            export(model, tmp_path)
        assert everything_under(tmp_path) == []


def test_a_fused_op_in_training_mode_is_refused_wherever_it_is(tmp_path):
    class Own(layers.Layer):
        def call(self, x):
            @tf.function
            def inner(x):
                return tf.raw_ops.FusedBatchNormV3(
                    x=x,
                    scale=[1.0, 1.0, 1.0],
                    offset=[0.0, 0.0, 0.0],
                    mean=[],
                    variance=[],
                    is_training=True,
                )[0]

            return inner(x)

    model = keras.Sequential([keras.Input((8, 8, 3)), Own()])
    with pytest.raises(ValueError, match=r"FusedBatchNormV3 .* is_training=True"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


def test_outputs_that_depend_on_the_batch_are_refused(tmp_path):
    class Centred(layers.Layer):
        def call(self, x):
            return x - tf.reduce_mean(x, 0)

    model = keras.Sequential([keras.Input((4,)), Centred()])
    with pytest.raises(ValueError, match="other samples"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


def test_what_cannot_be_verified_is_refused(tmp_path):
    class Noise(layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    with pytest.raises(ValueError, match="differ by"):
        export(keras.Sequential([keras.Input((4,)), Noise()]), tmp_path)

    class Picky(layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_greater(x, 1.0)]):
                return tf.identity(x)

    with pytest.raises(ValueError, match=r"random numbers in \[0, 1\)"):
        export(keras.Sequential([keras.Input((4,)), Picky()]), tmp_path)
    assert everything_under(tmp_path) == []


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


# Folding.


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_a_folded_export_serves_the_same(tmp_path, batch_norm):
    model = dense_model(batch_norm)
    exported = export(model, tmp_path, fold=True, require_population=True)
    x = np.random.default_rng(2).normal(size=(5, 4)).astype("float32")
    [name] = [tensor.name for tensor in model.inputs]
    served = serve(exported.path)(**{name: x})["output_0"]
    np.testing.assert_allclose(served, by_numpy(model, x), rtol=1e-5, atol=1e-5)
    assert signature_of(exported.path) == signature_of(export(model, tmp_path).path)
    # Kernels and biases of two layers, and nothing of batch norm.
    assert len(tf.saved_model.load(os.fspath(exported.path)).variables) == 4
    assert describe(exported.path)["folded"]
    assert not describe(tmp_path)["folded"]
    assert model.get_layer("bn") is model.layers[1]


def test_what_cannot_be_folded_is_not_exported(tmp_path):
    model = called(TwoInputs(), ONES)
    with pytest.raises(ValueError, match="Functional or Sequential"), pytest.warns(UserWarning):
        export(model, tmp_path / "new" / "m", fold=True)
    assert everything_under(tmp_path) == []


# Warm-up.


def requests_in(path):
    logs = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2", reason="needs the extra `serving`"
    )
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    records = tf.data.TFRecordDataset(os.fspath(file)).as_numpy_iterator()
    return [logs.PredictionLog.FromString(r).predict_log.request for r in records]


@pytest.mark.parametrize("structure", ["one", "dicts", "nested", "subclassed with dicts"])
@pytest.mark.filterwarnings("ignore")
def test_warmup_requests_are_what_a_client_would_send(tmp_path, structure):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    model = STRUCTURES[structure]()
    sizes = [4, 4] if structure == "subclassed with dicts" else [4, 3]
    rng = np.random.default_rng(7)
    x = [rng.normal(size=(2, n)) for n in sizes]  # float64, as NumPy has it.
    if structure == "one":
        given = x
    else:
        names = "pq" if structure == "subclassed with dicts" else "ab"
        given = dict(zip(names, x, strict=True))
        if structure == "nested":
            given["a"] = [given["a"]]
    exported = export(model, tmp_path / "name", warmup=given)
    [request] = requests_in(exported.path)
    assert request.model_spec.name == "name"
    assert request.model_spec.signature_name == "serving_default"
    sent = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
    as_model = keras.tree.map_structure(lambda v: tf.constant(v, tf.float32), given)
    want = keras.tree.flatten(model(as_model, training=False))
    got = serve(exported.path)(**sent)
    for key, y in zip(sorted(got), want, strict=True):
        np.testing.assert_allclose(got[key], y, rtol=1e-5, atol=1e-5)


def test_warmup_takes_batches_of_a_dataset_up_to_the_limit_of_the_server(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    x = np.random.default_rng(8).normal(size=(6, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros(6))).batch(4)
    requests = requests_in(export(dense_model(), tmp_path, warmup=data).path)
    sent = [tf.make_ndarray(value) for r in requests for value in r.inputs.values()]
    np.testing.assert_array_equal(np.concatenate(sent), x)
    assert [len(s) for s in sent] == [4, 2]
    assert len(requests_in(export(dense_model(), tmp_path, warmup=data.repeat()).path)) == 1000


def test_warmup_is_checked(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")
    empty = tf.data.Dataset.from_tensor_slices(ONES).batch(2).take(0)
    for wrong in (np.ones((2, 5)), np.ones(4), [ONES, ONES], np.array([["a"] * 4]), empty):
        with pytest.raises(ValueError, match="Expected batches"):
            export(dense_model(), tmp_path / "m", warmup=wrong)
    later = tf.data.Dataset.from_generator(
        lambda: iter([np.ones((1, 4)), np.ones((1, 3))]),
        output_signature=tf.TensorSpec((None, None), tf.float64),
    )
    with pytest.raises(ValueError, match="Expected batches"):
        export(dense_model(), tmp_path / "m", warmup=later)
    assert everything_under(tmp_path) == []


def test_warmup_without_the_extra_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"tfbn\[serving\]"):
        export(dense_model(), tmp_path / "m", warmup=ONES)
    assert everything_under(tmp_path) == []


def test_warmup_verifies_models_that_are_picky(tmp_path):
    pytest.importorskip("tensorflow_serving", reason="needs the extra `serving`")

    class Picky(layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_greater(x, -1.0)]):
                return tf.ensure_shape(x, (None, 5))

    model = keras.Sequential([keras.Input((None,)), Picky()])
    with pytest.raises(ValueError, match="as warmup"):
        export(model, tmp_path)
    export(model, tmp_path, warmup=np.ones((2, 5)))


# Statistics and where they came from.


def test_never_swept_is_a_warning_or_an_error(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="never swept"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="never swept") as caught:
        export(model, tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("what", ["kernel", "moving_mean"])
def test_changed_since_the_sweep_is_a_warning_or_an_error(tmp_path, what):
    model = dense_model()
    layer = model.layers[0] if what == "kernel" else model.get_layer("bn")
    variable = getattr(layer, what)
    variable.assign(variable + 1e-3)
    with pytest.raises(ValueError, match="changed since the sweep"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="changed since the sweep"):
        export(model, tmp_path)
    assert "changed since the sweep" in describe(tmp_path)["stale"]


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.filterwarnings("error:The batch norm statistics")
def test_a_fresh_sweep_and_no_batch_norm_are_silent(tmp_path):
    model = dense_model()
    model.trainable = False  # As Algorithm 2 leaves it.
    export(model, tmp_path, require_population=True)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    export(plain, tmp_path, require_population=True)


def test_provenance_travels_with_the_model(tmp_path, capsys):
    model = dense_model()
    exported = export(model, tmp_path)
    model.get_layer("bn").gamma.assign([1.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match="changed"):
        export(model, tmp_path)
    written = json.loads((exported.path / "assets.extra" / "tfbn.json").read_text())
    capsys.readouterr()
    assert describe(exported.path) == written
    printed = capsys.readouterr().out
    assert "method='pooled' over 20 samples in 2 batches of at most 10" in printed
    assert "bn: 3 channels, 320 values each" in printed
    assert "changed" not in printed
    assert describe(str(tmp_path))["stale"] is not None  # The latest.
    assert written["stale"] is None
    assert written["statistics"]["fingerprint"] == written["fingerprint"]
    assert written["fingerprint"] != describe(tmp_path)["fingerprint"]
    assert (written["tfbn"], written["keras"]) == (tfbn.__version__, keras.__version__)
    assert written["tensorflow"] == tf.__version__
    # The moving averages before the sweep were 0 and 1.
    bn = model.get_layer("bn")
    shift = bn.moving_mean.numpy() / np.sqrt(bn.moving_variance.numpy())
    layer = written["statistics"]["layers"]["bn"]
    np.testing.assert_allclose(layer["mean_shift"], np.sqrt(np.mean(shift**2)), rtol=1e-5)
    assert (layer["channels"], layer["count"]) == (3, 320)


def test_describe_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"tfbn\.export wrote"):
        describe(tmp_path / "nothing")
    dense_model().export(tmp_path / "1", verbose=False)
    with pytest.raises(ValueError, match=r"1/assets\.extra"):
        describe(tmp_path)
