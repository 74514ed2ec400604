"""Tests of the signature `monitor`: its moments, and that it does not change `serve`."""

import json
import os
from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import BATCH_NORMS, conv_model, dense_model, everything_under, serve, sweep
from keras import layers

import tfbn
from tfbn import describe, export
from tfbn.serving import sweeps
from tfbn.serving.monitor import monitor


def monitored(path):
    """Call the signature `monitor` with tensors by name, like a server."""
    loaded = tf.saved_model.load(os.fspath(path))
    signature = loaded.signatures["monitor"]

    def call(**inputs):
        call.keep = loaded
        outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
        return {name: y.numpy() for name, y in outputs.items()}

    return call


def assert_moments(answer, path, values, rtol=1e-5):
    """Compare an answer with float64 moments of values of shape (samples, values, channels)."""
    values = np.float64(values)
    np.testing.assert_array_equal(answer[f"{path}/count"], [values.shape[1]] * len(values))
    std = values.std(1)
    np.testing.assert_allclose(answer[f"{path}/mean"], values.mean(1), atol=rtol * std.max())
    np.testing.assert_allclose(answer[f"{path}/variance"], values.var(1), rtol=3 * rtol)


def network(batch_norm=layers.BatchNormalization):
    """Build convolutions, a layer that is called twice, and two siblings with the same name."""
    shared = batch_norm(name="shared")
    x = inputs = keras.Input((6, 6, 3), name="image")
    x = layers.ReLU()(shared(layers.Conv2D(4, 3, name="first")(x)))
    x = shared(layers.Conv2D(4, 1, name="second")(x))
    x = keras.Sequential([layers.Conv2D(2, 1), batch_norm(name="inner")], name="block")(x)
    return sweep(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))


def images(count, seed=0):
    return np.random.default_rng(seed).normal(0.5, 2.0, (count, 6, 6, 3)).astype("float32")


@pytest.mark.quick(1)
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_the_answer_has_outputs_and_the_moments_of_what_entered(tmp_path, batch_norm):
    model = network(batch_norm)
    exported = export(model, tmp_path, monitor=True)
    x = images(5)
    answer = monitored(exported.path)(image=x)
    first = np.asarray(model.get_layer("first")(x))
    shared = model.get_layer("shared")
    second = np.asarray(model.get_layer("second")(tf.nn.relu(shared(first, training=False))))
    entered = np.concatenate([v.reshape(5, -1, 4) for v in (first, second)], 1)
    assert_moments(answer, "shared", entered)
    inner = np.asarray(model.get_layer("block").layers[0](shared(second, training=False)))
    assert_moments(answer, "block/inner", inner.reshape(5, -1, 2))
    np.testing.assert_allclose(answer["output_0"], model(x), rtol=1e-5, atol=1e-5)
    names = {
        f"{path}/{what}" for path in ("shared", "block/inner") for what in monitor.Moments._fields
    }
    assert set(answer) == {"output_0", "monitor/population", *names}
    assert answer["shared/count"].dtype == np.int64 and answer["shared/count"].shape == (5,)
    assert answer["shared/mean"].dtype == np.float32


def test_inputs_of_rank_2_are_their_own_mean(tmp_path):
    model = dense_model()
    [name] = [tensor.name for tensor in model.inputs]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    answer = monitored(export(model, tmp_path, monitor=True).path)(**{name: x})
    np.testing.assert_allclose(answer["bn/mean"], np.asarray(model.layers[0](x)), rtol=1e-5)
    np.testing.assert_array_equal(answer["bn/variance"], np.zeros((3, 3)))
    np.testing.assert_array_equal(answer["bn/count"], np.ones(3))


def test_a_server_that_merges_requests_gives_each_client_its_own_answer(tmp_path):
    """Send one image from each of eight clients to TensorFlow's batch scheduler."""
    loaded = tf.saved_model.load(os.fspath(export(network(), tmp_path, monitor=True).path))
    signature = loaded.signatures["monitor"]
    names = sorted(signature.structured_outputs)
    merged = []

    @tf.nondifferentiable_batch_function(1, 8, 60_000_000, allowed_batch_sizes=[8])
    def batched(image):
        outputs = [signature(image=image)[name] for name in names]
        noted = tf.numpy_function(lambda *v: merged.append(v), [image, *outputs], [], stateful=True)
        with tf.control_dependencies([noted]):
            return [tf.identity(output) for output in outputs]

    ask = tf.function(batched, input_signature=[tf.TensorSpec((None, 6, 6, 3))])
    ask = ask.get_concrete_function()  # One scheduler, because each trace creates another.
    x = images(8)
    with futures.ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda image: ask(tf.constant(image[None])), x))
    [(sent, *whole)] = merged
    served = tfbn.ServedStats(tmp_path)
    for image, answer in zip(x, answers, strict=True):
        [row] = np.flatnonzero((sent == image).all((1, 2, 3)))
        for alone, among in zip(answer, whole, strict=True):
            np.testing.assert_array_equal(alone, among[row : row + 1])
        served.add(dict(zip(names, answer, strict=True)))
    assert served.samples == 8


def test_frames_of_a_sample_are_its_own(tmp_path):
    """Call a layer with several rows for each sample, and one that mixes samples."""

    class Frames(keras.Model):
        def __init__(self, mixed):
            super().__init__()
            self.bn, self.mixed = layers.BatchNormalization(name="bn"), mixed

        def call(self, x):
            x = tf.transpose(x, [1, 0, 2]) if self.mixed else x
            y = tf.reshape(self.bn(tf.reshape(x, [-1, 3])), tf.shape(x))
            return tf.transpose(y, [1, 0, 2]) if self.mixed else y

    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
    models = [Frames(False), Frames(True)]
    for model in models:
        model(x)
        sweep(model)
    answer = monitored(export(models[0], tmp_path / "a", sample=x, monitor=True).path)
    assert_moments(answer(args_0=x), "bn", x)
    with pytest.raises(ValueError, match="moments of independent samples"):
        export(models[1], tmp_path / "b", sample=x, monitor=True)
    assert everything_under(tmp_path / "b") == []


def test_rows_that_are_not_of_samples_are_refused(tmp_path):
    class Rows(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = layers.BatchNormalization(name="bn")

        def call(self, x):
            return x + 0 * tf.reduce_mean(self.bn(tf.concat([x, x[:1]], 0)))

    x = np.ones((4, 3), "float32")
    model = Rows()
    model(x)
    with pytest.raises(ValueError, match="a row for each sample"):
        export(sweep(model), tmp_path, sample=x, monitor=True)


@pytest.mark.quick(1)
@pytest.mark.parametrize("chosen", [["block/inner"], "layer"])
def test_only_the_layers_that_were_asked_for(tmp_path, chosen):
    model = network()
    given = [model.get_layer("block").layers[1]] if chosen == "layer" else chosen
    exported = export(model, tmp_path, monitor=given)
    answer = monitored(exported.path)(image=images(2))
    assert {name.rpartition("/")[0] for name in answer} == {"", "monitor", "block/inner"}
    described = describe(tmp_path)
    assert list(described["monitor"]["epsilon"]) == ["block/inner"]
    assert "monitored batch norm layers: 1, block/inner" in str(described)
    assert list(tfbn.PopulationStats.load(exported.path / monitor.FILE)) == ["block/inner"]


def test_serve_is_what_it_is_without(tmp_path):
    model = network()
    plain, beside = export(model, tmp_path / "a"), export(model, tmp_path / "b", monitor=True)
    x = images(3)
    outputs = (serve(exported.path)(image=x)["output_0"] for exported in (plain, beside))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
    operations = []
    for exported in (plain, beside):
        loaded = tf.saved_model.load(os.fspath(exported.path))
        graph = loaded.serve.concrete_functions[0].graph
        operations.append([(op.name, op.type) for op in graph.get_operations()])
    assert operations[0] == operations[1]
    assert "monitor" not in tf.saved_model.load(os.fspath(plain.path)).signatures
    assert not (plain.path / monitor.FILE).exists()


def test_a_monitor_with_other_outputs_is_not_put_in_place(tmp_path, monkeypatch):
    run = monitor.run

    def off(*args):
        measured = run(*args)
        return measured._replace(outputs=measured.outputs + 0.1)

    monkeypatch.setattr(monitor, "run", off)
    with pytest.raises(ValueError, match="monitor to predict as serve does"):
        export(conv_model(), tmp_path, monitor=True)
    assert everything_under(tmp_path) == []


@pytest.mark.parametrize("axis", [-1, 1])
def test_masked_positions_do_not_count(axis):
    layer = layers.BatchNormalization(axis=axis, name="bn")
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    mask = np.arange(5) < np.array([[5], [2], [3]])

    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = layer

        def call(self, x):
            return self.bn(x, mask=tf.constant(mask))

    model = Masked()
    model(x)
    measured = tf.function(lambda x: monitor.run(model, [x]), autograph=False)(x)
    count, mean, variance = (v.numpy() for v in measured.moments["bn"])
    for i in range(3):
        if axis == -1:
            values = list(np.float64(x[i][mask[i]]).T)
        else:
            values = [np.float64(x[i, c]) if mask[i, c] else np.zeros(0) for c in range(5)]
        np.testing.assert_array_equal(count[i], list(map(len, values)))
        np.testing.assert_allclose(mean[i], [v.mean() if v.size else 0 for v in values])
        np.testing.assert_allclose(variance[i], [v.var() if v.size else 0 for v in values])


# Layers that cannot be monitored.


class Within(keras.Model):
    """Call a layer in the body of a loop, or not at all."""

    def __init__(self, loop):
        super().__init__(name="within")
        self.bn = layers.BatchNormalization(name="bn")
        self.loop = loop

    def call(self, x):
        return self.loop(lambda row: self.bn(row[None])[0], x)


REFUSED = {
    "map": (tf.map_fn, "'bn', which is called in a loop or branch"),
    "vectorized": (tf.vectorized_map, "called in a tf.vectorized_map"),
    "branch": (
        lambda f, x: tf.cond(tf.reduce_sum(x) > 0, lambda: f(x[0])[None], lambda: x),
        "'bn', which is called in a loop or branch",
    ),
    "never": (lambda f, x: x, "'bn', which is not called"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:The batch norm statistics")
def test_layers_in_loops_and_branches_are_refused(tmp_path, kind):
    loop, message = REFUSED[kind]
    model = Within(loop)
    model.bn.build((None, 4))
    model(np.ones((2, 4), "float32"))
    with pytest.raises(ValueError, match=f"(?s)^Cannot monitor .*{message}"):
        export(model, tmp_path, monitor=True)
    assert everything_under(tmp_path) == []
    assert export(model, tmp_path).version == 1
    # An error in the body of tf.map_fn would change global state of TensorFlow.
    scope = tf.compat.v1.get_variable_scope()
    assert scope.caching_device is None


def test_a_folded_network_has_nothing_to_monitor(tmp_path):
    with pytest.raises(ValueError, match="fold removes all batch norm layers"):
        export(conv_model(), tmp_path, fold=True, monitor=True)
    assert everything_under(tmp_path) == []


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["nowhere"], "of \\['bn'\\]. Received: 'nowhere'"),
        ([layers.BatchNormalization()], "Received: <BatchNormalization"),
        ([3], "Received: 3"),
        ("bn", "Put it in a list"),
        (3, "Put it in a list"),
        ([], "none. Leave it out"),
    ],
)
def test_what_monitor_takes_is_checked(tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        export(dense_model(), tmp_path, monitor=chosen)
    assert everything_under(tmp_path) == []


def test_without_batch_norm_there_is_nothing_to_monitor(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="has no batch norm layers"):
        export(plain, tmp_path, monitor=True)


def test_an_output_with_a_name_of_the_monitors_is_refused(tmp_path):
    x = keras.Input((4,))
    y = layers.BatchNormalization(name="bn")(x)
    model = sweep(keras.Model(x, {"bn/mean": y}))
    with pytest.raises(ValueError, match="Output 'bn/mean'"):
        export(model, tmp_path, monitor=True)
    assert everything_under(tmp_path) == []


# Files of a version.


def test_the_population_of_the_sweep_is_written(tmp_path):
    model = network()
    swept = sweeps.sweep_of(model).stats
    path = export(model, tmp_path, monitor=True).path
    held = tfbn.PopulationStats.load(path / monitor.FILE)
    assert (held.method, held.samples) == ("pooled", 20)
    for name, stats in held.items():
        assert stats == swept[name]


def test_statistics_that_are_not_of_a_sweep_are_written_as_they_are(tmp_path):
    model = network()
    model.get_layer("shared").moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    with pytest.warns(UserWarning, match="changed since the sweep"):
        path = export(model, tmp_path, monitor=True).path
    held = tfbn.PopulationStats.load(path / monitor.FILE)
    assert (held.method, held["shared"].count) == ("assigned", 0)
    np.testing.assert_array_equal(held["shared"].mean, [1.0, 2.0, 3.0, 4.0])


def test_the_identity_is_that_of_the_statistics(tmp_path):
    model = network()
    path = export(model, tmp_path, monitor=True).path
    written = json.loads((path / "assets.extra" / "tfbn.json").read_text())
    answer = monitored(path)(image=images(1))
    assert answer["monitor/population"][0].decode() == written["monitor"]["population"]
    before = monitor.identity(model)
    layer = model.get_layer("shared")
    layer.moving_variance.assign(np.nextafter(layer.moving_variance.numpy(), np.float32(9)))
    assert monitor.identity(model) != before


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_integers_are_measured_as_the_layer_takes_them(tmp_path, batch_norm):
    bn = batch_norm(name="bn", dtype="mixed_float16")
    model = sweep(keras.Sequential([keras.Input((3,), dtype="int32"), bn]))
    x = np.arange(2049, 2061, dtype="int32").reshape(4, 3)
    [name] = [tensor.name for tensor in model.inputs]
    path = export(model, tmp_path / "m", sample=x, monitor=True).path
    entering = x.astype("float16").astype("float64")
    assert (entering != x).any()
    assert_moments(monitored(path)(**{name: x}), "bn", entering[:, None])
