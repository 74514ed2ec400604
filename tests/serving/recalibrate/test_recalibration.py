"""Tests of `tfbn.recalibrate`: the next version of a served model, from its SavedModel alone.

The oracle is the model itself, which `recalibrate` never sees: swept over the same data, it must
have the same statistics and predict what the next version answers.
"""

import itertools
import os
import pathlib

import exported_models
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from exported_models import MODELS, field, made, residual
from keras import layers

import tfbn
from tfbn.files import atomic
from tfbn.models.keras_models import batch_norm_layers
from tfbn.serving import provenance, versions
from tfbn.serving.export import batch_norms
from tfbn.serving.recalibrate import recalibration, weights


def contents(directory):
    """Return path -> bytes of all files."""
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def answers(version, x):
    """Return the outputs that a client receives."""
    signature = tf.saved_model.load(os.fspath(version)).signatures["serving_default"]
    [name, *others] = signature.structured_input_signature[1]
    inputs = x if others else {name: x}
    return {name: np.asarray(y) for name, y in signature(**inputs).items()}


def assert_close(outputs, expected, tolerance=1e-5):
    """Compare outputs, by name or a single one, up to float32's rounding."""
    if not isinstance(expected, dict):
        [outputs] = outputs.values()
        outputs, expected = {"": outputs}, {"": expected}
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        # In float64, because NumPy 1 does not support bfloat16.
        answer, value = np.asarray(outputs[name], "float64"), np.asarray(value, "float64")
        scale = np.abs(value).max()
        np.testing.assert_allclose(answer, value, rtol=tolerance, atol=tolerance * scale)


EVERY_DAY = {
    ("siblings", "exact"),
    ("masked", "pooled"),
    ("several", "exact"),
    ("of a kind", "exact"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if (name, method) in EVERY_DAY else pytest.mark.slow)
        for name in MODELS
        for method in (("exact", "pooled") if name == "masked" else ("exact",))
    ],
)
@pytest.mark.filterwarnings("ignore:Layer 'shared' is called", "ignore:A one-pass sweep")
def test_the_next_version_is_the_model_swept_over_the_data(tmp_path, name, method):
    model, x = made(name)
    tfbn.export(model, tmp_path / "m")
    before = contents(tmp_path / "m" / "1")
    recalibrated = tfbn.recalibrate(tmp_path / "m", x, method=method, batch_size=8, verbose=0)
    assert (recalibrated.path, recalibrated.version) == (tmp_path / "m" / "2", 2)
    own = tfbn.update_population_stats(model, x, method=method, batch_size=8, verbose=0)
    assert list(recalibrated.stats) == list(own)
    for path, stats in own.items():
        np.testing.assert_array_equal(recalibrated.stats[path].counts, stats.counts)
        networks.assert_layer(recalibrated.stats[path], stats.mean, stats.variance)
    assert recalibrated.stats.fingerprint == own.fingerprint
    assert_close(answers(recalibrated.path, x), model.predict(x, verbose=0))
    recalibrated.stats.assign(model)
    assert recalibrated.stats.mismatch(model) is None
    # Only the variables have changed, and the version before has not.
    assert contents(tmp_path / "m" / "1") == before
    changed = {str(p) for p, b in contents(recalibrated.path).items() if before.get(p) != b}
    assert changed == {
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        "fingerprint.pb",
        provenance.FILE,
    }
    assert set(os.listdir(tmp_path / "m")) == {"1", "2"}


def test_the_statistics_by_numpy(tmp_path):
    """Compute the statistics of the only layer's input in float64."""
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    kernel, bias = (np.float64(w) for w in model.layers[0].get_weights())
    entered = x @ kernel + bias
    bn = model.layers[1]
    bn.moving_mean.assign(entered.mean(0))
    bn.moving_variance.assign(entered.var(0))
    assert_close(answers(tmp_path / "m" / "2", x), exported_models.by_numpy(model, x), 1e-4)


def test_all_methods_and_kinds_of_data(tmp_path):
    model, x = made("convolutional")
    tfbn.export(model, tmp_path / "m")
    batches = [x[i : i + 8] for i in range(0, len(x), 8)]
    own = tfbn.collect(model, x, batch_size=8, verbose=0)
    for data in (iter(batches), tf.data.Dataset.from_tensor_slices(x).batch(8)):
        recalibrated = tfbn.recalibrate(tmp_path / "m" / "1", data, verbose=0)
        assert list(recalibrated.stats.items()) == list(own.items())
    recalibrated = tfbn.recalibrate(tmp_path / "m" / "1", iter(batches), steps=2, verbose=0)
    assert recalibrated.stats.samples == 16
    recalibrated = tfbn.recalibrate(
        tmp_path / "m", x, method="algorithm2", batch_size=23, verbose=0
    )
    assert recalibrated.version == 5 and recalibrated.stats.method == "algorithm2"


@pytest.mark.slow
def test_a_network_in_16_bits(tmp_path):
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = exported_models.sweep(residual())
    finally:
        keras.config.set_dtype_policy(policy)
    tfbn.export(model, tmp_path / "m")
    x = field(6, 6, 2)
    recalibrated = tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    own = tfbn.update_population_stats(model, x, verbose=0)
    assert list(recalibrated.stats.items()) == list(own.items())
    assert_close(answers(recalibrated.path, x), model.predict(x, verbose=0), 2e-2)


def test_frozen_layers_are_swept_too(tmp_path):
    model, x = made("dense")
    model.trainable = False
    tfbn.export(model, tmp_path / "m")
    assert len(tfbn.recalibrate(tmp_path / "m", x, verbose=0).stats) == 1


def test_the_provenance_tells_the_history(tmp_path):
    model, x = made("dense")
    swept = tfbn.update_population_stats(model, x, verbose=0)
    tfbn.export(model, tmp_path / "m")
    tfbn.recalibrate(tmp_path / "m", x[:9] + 5, method="pooled", verbose=0)
    recalibrated = tfbn.recalibrate(tmp_path / "m", x[:5] - 5, blend_samples=15, verbose=0)
    described = tfbn.describe(tmp_path / "m")
    assert described["fingerprint"] == swept.fingerprint and described["stale"] is None
    statistics = described["statistics"]
    assert (statistics["samples"], statistics["prior_samples"]) == (5, 15)
    steps = [(s["version"], s["statistics"]["method"], s["statistics"]["samples"])
             for s in described["history"]]  # fmt: skip
    assert steps == [(1, "exact", 23), (2, "pooled", 9)]
    out = str(described)
    assert "blended: 5 field samples, 15 prior samples" in out
    assert "version 2: method='pooled' over 9 samples" in out
    # Blended with the statistics of version 2, not of version 1.
    [entered] = [layer(x[:9] + 5) for layer in model.layers[:1]]
    [own] = [layer(x[:5] - 5) for layer in model.layers[:1]]
    mean = (15 * np.mean(entered, 0) + 5 * np.mean(own, 0)) / 20
    np.testing.assert_allclose(recalibrated.stats["bn"].mean, mean, rtol=1e-4)


@pytest.mark.slow
def test_a_stale_model_is_stale_no_more(tmp_path):
    model, x = made("dense")
    model.layers[1].moving_mean.assign_add([1.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match="those of its population"):
        tfbn.export(model, tmp_path / "m")
    tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    described = tfbn.describe(tmp_path / "m")
    assert described["stale"] is None and "has changed" in described["history"][0]["stale"]


def test_the_monitor_moves_with_the_population(tmp_path):
    model, x = made("convolutional")
    tfbn.export(model, tmp_path / "m", monitor=True)
    recalibrated = tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    own = tfbn.update_population_stats(model, x, verbose=0)
    old, new = (tfbn.ServedStats(tmp_path / "m" / number) for number in "12")
    assert list(new.population.items()) == list(own.items())
    monitor = tf.saved_model.load(os.fspath(recalibrated.path)).signatures["monitor"]
    [name] = monitor.structured_input_signature[1]
    for image in x:
        new.add(monitor(**{name: image[None]}))
    assert not new.compare().drifted
    with pytest.raises(ValueError, match="one of version"):
        old.add(monitor(**{name: x[:1]}))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("arrays", {"batch_size": 8}),
        ("arrays", {"batch_size": 8, "steps": 3}),
        ("generator", {}),
        ("endless generator", {"steps": 3}),
        ("dataset", {"method": "pooled"}),
    ],
)
def test_the_monitor_of_a_blend_expects_the_data_that_it_was_blended_with(tmp_path, kind, options):
    model, x = made("convolutional")
    batches = [x[:8], x[8:16], x[16:]]
    data = {
        "arrays": lambda: x,
        "generator": lambda: iter(batches),
        "endless generator": lambda: itertools.chain(batches, itertools.repeat(np.full_like(x, 9))),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices(x).batch(8),
    }
    tfbn.export(model, tmp_path / "m", monitor=True)
    recalibrated = tfbn.recalibrate(
        tmp_path / "m", data[kind](), blend_samples=23, verbose=0, **options
    )
    served = tfbn.ServedStats(tmp_path / "m")
    recalibrated.stats.assign(model)
    path_to = {id(layer): path for path, layer in batch_norm_layers(model).items()}
    tensors = {path_to[id(one)]: one.input for one in model.layers if id(one) in path_to}
    entering = keras.Model(model.inputs[0], tensors)(x, training=False)
    assert entering.keys() == served.population.keys()
    for path, values in entering.items():
        values = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        stats = served.population[path]
        assert stats.count == len(values)
        networks.assert_layer(stats, values.mean(0), values.var(0), 1e-4)
    monitor = tf.saved_model.load(os.fspath(recalibrated.path)).signatures["monitor"]
    [name] = monitor.structured_input_signature[1]
    for image in field(40, 8, 8, 3)[0]:
        served.add(monitor(**{name: image[None]}))
    assert not served.compare().drifted


def test_warm_up_requests_and_assets_go_along(tmp_path):
    pytest.importorskip("tensorflow_serving")
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m", warmup=x[:3])
    recalibrated = tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    name = pathlib.Path("assets.extra/tf_serving_warmup_requests")
    assert (recalibrated.path / name).read_bytes() == (tmp_path / "m" / "1" / name).read_bytes()


class InLoop(keras.Model):
    """Call batch norm inside a loop."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        return tf.while_loop(
            lambda i, x: i < 2, lambda i, x: (i + 1, self.bn(x, training=training)), [0, x]
        )[1]


class OfItsOwn(layers.BatchNormalization):
    """Subtract the mean only."""

    def call(self, inputs, training=None, mask=None):
        return inputs - self.moving_mean


def exported(tmp_path, model, **options):
    """Create a model's directory with one version."""
    tfbn.export(exported_models.sweep(model), tmp_path / "m", **options)
    return tmp_path / "m"


def without_record(tmp_path):
    """Remove the record."""
    directory = exported(tmp_path, exported_models.dense_model())
    (directory / "1" / batch_norms.FILE).unlink()
    return directory


def with_record_of_another(tmp_path):
    """Rename tensors in the record that the graph does not have."""
    directory = exported(tmp_path, exported_models.dense_model())
    file = directory / "1" / batch_norms.FILE
    file.write_text(file.read_text().replace("sequential", "consequential"))
    return directory


def with_damaged_record(tmp_path):
    """Truncate the record."""
    directory = exported(tmp_path, exported_models.dense_model())
    file = directory / "1" / batch_norms.FILE
    file.write_text(file.read_text()[:100])
    return directory


def sequential(*inner):
    """Build a network from layers."""
    return keras.Sequential([keras.Input((4,)), *inner])


REFUSED = {
    "folded": (lambda p: exported(p, exported_models.dense_model(), fold=True), "is folded"),
    "without batch norm": (lambda p: exported(p, sequential(layers.Dense(2))), "which has none"),
    "in a loop": (
        lambda p: exported(p, exported_models.called(InLoop(), field(4))),
        "'batch_normalization.*' of .* is in a loop",
    ),
    "of its own": (lambda p: exported(p, sequential(OfItsOwn())), "differs by"),
    "no record": (without_record, "without one. Export the model again"),
    "record of another": (with_record_of_another, "has no tensor"),
    "damaged record": (with_damaged_record, "an intact file"),
    "no versions": (lambda p: p, "none. Give the path"),
    "no directory": (lambda p: p / "nothing", "none. Give the path"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recalibrated_is_refused_in_a_sentence(tmp_path, name):
    make, says = REFUSED[name]
    directory = make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)^[A-Z].*{says}.*[.]$"):
        tfbn.recalibrate(directory, field(4), verbose=0)
    assert contents(tmp_path) == before


BAD_DATA = {
    "filtered away": (
        lambda x: tf.data.Dataset.from_tensors(x).filter(lambda x: False),
        "at least one batch",
    ),
    "NaN": (lambda x: np.where(x > 5, np.nan, x).astype("float32"), "batch 0"),
    "other shape": (lambda x: x[:, :3], r"float32\(None, 4\).*float32\(23, 3\)"),
    "text": (lambda x: np.full(x.shape, "a"), "string"),
    "nothing": (lambda x: x[:0], "at least one batch"),
    "used up": (lambda x: iter(()), "at least one batch"),
    "too short": (lambda x: iter([x]), "steps=3"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return an exported model that no test changes, and its data."""
    model, x = made("dense")
    return tfbn.export(model, tmp_path_factory.mktemp("dense") / "m").path.parent, x


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_leaves_the_versions_alone(dense, name):
    path, x = dense
    before = contents(path)
    spoil, says = BAD_DATA[name]
    steps = 3 if name == "too short" else None
    with pytest.raises(ValueError, match=f"(?s)^Expected .*{says}"):
        tfbn.recalibrate(path, spoil(x), steps=steps, verbose=0)
    assert contents(path) == before


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("copy_with", OSError("disk full")),
        ("write", KeyboardInterrupt()),
        ("put_in_place", OSError("disk full")),
    ],
)
def test_a_failure_at_any_step_leaves_nothing_behind(tmp_path, monkeypatch, place, error):
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    before = contents(tmp_path)
    module = {
        "copy_with": recalibration.weights,
        "write": recalibration.provenance,
        "put_in_place": recalibration.versions,
    }[place]
    original = getattr(module, place)

    def fails(*args, **options):
        if place != "put_in_place":
            original(*args, **options)
        raise error

    monkeypatch.setattr(module, place, fails)
    with pytest.raises(type(error)):
        tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path / "m") == ["1"]


def test_a_server_that_polls_sees_a_version_when_it_is_complete(tmp_path, monkeypatch):
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    seen = []
    flush = atomic.flush_directory

    def look(path):
        seen.append(sorted(versions.numbered(tmp_path / "m")))
        return flush(path)

    monkeypatch.setattr(atomic, "flush_directory", look)
    recalibrated = tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    assert [1] in seen and seen[-1] == [1, 2]
    # All files and directories were flushed to the disk before the rename.
    assert seen.index([1, 2]) == len(seen) - 1
    assert sorted(os.listdir(tmp_path / "m")) == ["1", "2"] and recalibrated.version == 2


def test_a_version_that_does_not_predict_as_it_should_is_not_put_in_place(tmp_path, monkeypatch):
    """A checkpoint without the variances is detected."""
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    copy_with = weights.copy_with

    def without_variance(version, target, values):
        copy_with(version, target, dict(list(values.items())[:1]))

    monkeypatch.setattr(weights, "copy_with", without_variance)
    with pytest.raises(ValueError, match=r"Output 'output_0' .* differs by"):
        tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    assert os.listdir(tmp_path / "m") == ["1"]


def test_statistics_that_make_every_output_nan_are_refused(tmp_path):
    model = exported_models.sweep(
        keras.Sequential([keras.Input((4,)), layers.BatchNormalization(epsilon=0.0)])
    )
    tfbn.export(model, tmp_path / "m")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="would not be finite"):
        tfbn.recalibrate(tmp_path / "m", np.ones((8, 4), "float32"), verbose=0)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_many_recalibrations_in_one_process_warn_of_nothing(tmp_path, caplog):
    model, x = made("dense")
    tfbn.export(model, tmp_path / "m")
    for _ in range(4):
        tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    assert [record for record in caplog.records if "retracing" in record.message] == []
