"""Tests of `tfbn.recalibrate` on SavedModels that tfbn did not write."""

import os

import exported_models
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from exported_models import Fused, field
from keras import layers

import tfbn


def residual():
    """Build all forms of Keras's layer on images."""
    x = inputs = keras.Input((6, 6, 2))
    for options in ({}, {"scale": False}, {"center": False}, {"scale": False, "center": False}):
        y = layers.Conv2D(4, 3, padding="same")(x)
        y = layers.ReLU()(layers.BatchNormalization(epsilon=0.1, **options)(y))
        x = layers.Conv2D(4, 1)(x) + y
    return keras.Model(inputs, layers.BatchNormalization(axis=1)(x))


class TwoOfAName(keras.Model):
    """Build two layers whose variables have the same name in Keras."""

    def __init__(self):
        super().__init__()
        self.first = layers.BatchNormalization()
        self.second = layers.BatchNormalization()

    def call(self, x, training=None):
        x = self.first(x, training=training)
        return self.second(tf.nn.relu(x), training=training)


def shared():
    """Build a layer that is called twice."""
    layer = layers.BatchNormalization()
    return keras.Sequential([keras.Input((4,)), layer, layers.ReLU(), layer])


def own():
    """Build layers of tfbn for `model.export` of Keras."""
    stack = [tfbn.BatchNormalization(**options) for options in ({}, {"axis": 1}, {"center": False})]
    x = inputs = keras.Input((6, 6, 2))
    for layer in stack:
        x = layers.ReLU()(layer(layers.Conv2D(3, 2)(x)))
    y = tfbn.BatchNormalization(scale=False, center=False)(layers.Flatten()(x))
    y = tfbn.BatchNormalization(scale=False)(y)
    return keras.Model(inputs, tfbn.BatchNormalization()(layers.Dense(3)(y)))


MODELS = {
    "layers of tfbn": (own, lambda: field(6, 6, 2)),
    "two of a name": (
        lambda: exported_models.called(TwoOfAName(), field(4)),
        lambda: field(4),
    ),
    "shared": (shared, lambda: field(4)),
    "residual": (residual, lambda: field(6, 6, 2)),
}


def answers(version, x):
    """Return the only output that a client receives."""
    signature = tf.saved_model.load(os.fspath(version)).signatures["serving_default"]
    [name] = signature.structured_input_signature[1]
    [answer] = signature(**{name: x}).values()
    return np.asarray(answer)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Layer '.*' is called")
def test_what_keras_exports(tmp_path, name):
    build, data = MODELS[name]
    keras.utils.set_random_seed(0)
    model, x = exported_models.sweep(build()), data()
    model.export(tmp_path / "m" / "1", verbose=False)
    before = {p: p.read_bytes() for p in (tmp_path / "m" / "1").rglob("*") if p.is_file()}
    actual = tfbn.recalibrate(tmp_path / "m", x, batch_size=8, verbose=0)
    own = tfbn.update_population_stats(model, x, batch_size=8, verbose=0)
    networks.assert_statistics(actual.stats, own, 1e-5)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(answers(actual.path, x), expected, rtol=1e-4, atol=1e-4)
    assert before == {p: p.read_bytes() for p in (tmp_path / "m" / "1").rglob("*") if p.is_file()}
    # A second recalibration uses the record of the new version, with a blend.
    again = tfbn.recalibrate(tmp_path / "m", x + 1, blend_samples=46, verbose=0)
    assert (again.version, again.stats.prior_samples) == (3, 46)
    described = tfbn.describe(tmp_path / "m")
    assert [step["version"] for step in described["history"]] == [1, 2]
    out = str(described)
    assert "exported by another tool" in out and "version 1: they are those of a model that" in out


def test_a_fused_kernel_by_numpy(tmp_path):
    module = Fused()
    tf.saved_model.save(module, tmp_path / "m" / "7", signatures=module.infer)
    x = field(5, 5, 3)
    actual = tfbn.recalibrate(tmp_path / "m", x, batch_size=4, verbose=0)
    mean, variance = np.float64(x).mean((0, 1, 2)), np.float64(x).var((0, 1, 2))
    assert actual.version == 8 and list(actual.stats) == ["bn"]
    networks.assert_layer(actual.stats["bn"], mean, variance)
    right = np.maximum(1.5 * (x - mean) / np.sqrt(variance + 0.01) - 1, 0)
    np.testing.assert_allclose(answers(actual.path, x), right, rtol=1e-4, atol=1e-4)


def test_look_alikes_are_left_alone(tmp_path):
    made = LookAlikes()
    tf.saved_model.save(made, tmp_path / "m" / "1", signatures=made.infer)
    x = field(3)
    actual = tfbn.recalibrate(tmp_path / "m", x, verbose=0)
    assert list(actual.stats) == ["bn"]
    networks.assert_layer(actual.stats["bn"], x.mean(0), x.var(0))
    made.mean.assign(x.mean(0))
    made.variance.assign(x.var(0))
    np.testing.assert_allclose(answers(actual.path, x), made.infer(x)["y"], rtol=1e-4, atol=1e-4)


class Reader(tf.Module):
    """Read the mean in another operation too."""

    def __init__(self):
        super().__init__()
        self.mean = tf.Variable([0.3] * 3, name="bn/moving_mean")
        self.variance = tf.Variable([2.0] * 3, name="bn/moving_variance")

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def infer(self, x):
        """Batch norm and another read of its mean."""
        y = tf.nn.batch_normalization(x, self.mean, self.variance, None, None, 0.01)
        return {"y": y + self.mean}


class Frozen(tf.Module):
    """Batch norm with constant statistics, as in a frozen graph."""

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 5, 3), name="x")])
    def infer(self, x):
        ones = tf.ones(3)
        y, *_ = tf.compat.v1.nn.fused_batch_norm(x, ones, ones, ones, ones, is_training=False)
        return {"y": y}


class Hidden(tf.Module):
    """A signature with a function that the object does not have."""


class SharedMean(tf.Module):
    """Two batch norms with one mean and two variances."""

    def __init__(self):
        super().__init__()
        self.mean = tf.Variable([0.3] * 3, name="bn/moving_mean")
        names = ("bn/moving_variance", "other/moving_variance")
        self.variances = [tf.Variable([2.0] * 3, name=name) for name in names]

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def infer(self, x):
        for variance in self.variances:
            x = tf.nn.batch_normalization(x, self.mean, variance, None, None, 0.01)
        return {"y": x}


class OfAnyRank(Reader):
    """Batch norm on an input of unknown rank."""

    @tf.function(input_signature=[tf.TensorSpec(None, name="x")])
    def infer(self, x):
        y = tf.nn.batch_normalization(x, self.mean, self.variance, None, None, 0.01)
        return {"y": y}


class LookAlikes(Reader):
    """Batch norm, and other reciprocal roots."""

    def __init__(self):
        super().__init__()
        self.held = [tf.Variable([value] * 3) for value in (0.5, 1.5, 2.5)]

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def infer(self, x):
        a, b, c = (tf.convert_to_tensor(variable) for variable in self.held)
        root = tf.math.rsqrt
        y = tf.nn.batch_normalization(x, self.mean, self.variance, None, None, 0.01)
        y += root(a)  # Without epsilon.
        y += x * root(a + b)  # Without a constant epsilon.
        y += root(a + 0.01) + x  # Without a product.
        y += x * root(b + 0.01)  # Without a mean.
        inverse = root(c + 0.01)
        shift = a * inverse
        y += x * inverse + (shift - b)  # The mean is added.
        inverse = root(c + 0.02)
        y += (x * inverse) * (b - a * inverse)  # A product of both.
        inverse = root(c + 0.04)
        y += x * inverse + (a - (b + inverse))  # A single product.
        inverse = root(c + 0.03)
        shift = a * inverse
        return {"y": y + x * inverse + (b - shift) + (c - shift)}  # The mean is used twice.


def keras_model(*inner):
    """Export a network with Keras."""

    def write(path):
        exported_models.sweep(keras.Sequential(list(inner))).export(path, verbose=False)

    return write


def module(make, function=lambda made: made.infer):
    """Save a module with TensorFlow."""

    def write(path):
        made = make()
        tf.saved_model.save(made, path, signatures=function(made))

    return write


def without_signature(path):
    """Save a module without signatures."""
    tf.saved_model.save(tf.Module(), path)


def of_hidden(made):
    """Save a module with a function that is not its attribute."""
    spec = tf.TensorSpec((None, 3), name="x")
    return tf.function(lambda x: {"y": x}).get_concrete_function(spec)


REFUSED = {
    "sequences": (
        keras_model(
            keras.Input((None,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.BatchNormalization(),
        ),
        "over sequences",
    ),
    "masks of rank 4": (
        keras_model(
            keras.Input((5, 4, 3)),
            layers.Masking(),
            layers.BatchNormalization(),
        ),
        "over sequences",
    ),
    "none": (keras_model(keras.Input((4,)), layers.Dense(2)), "no batch norm layer"),
    "another reader": (module(Reader), "that reads a statistic as well"),
    "constants": (module(Frozen), "whose (beta|mean) is no variable"),
    "hidden": (module(Hidden, of_hidden), "no batch norm layer that is recognized"),
    "without a signature": (without_signature, "no signature"),
    "shared mean": (module(SharedMean), "two batch norm layers that share a mean"),
    "any rank": (module(OfAnyRank), "of unknown rank"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_may_have_more_than_is_recognized_is_refused(tmp_path, name):
    write, says = REFUSED[name]
    write(tmp_path / "m" / "1")
    with pytest.raises(ValueError, match=f"^Cannot recalibrate .*: it has .*{says}"):
        tfbn.recalibrate(tmp_path / "m", field(4), verbose=0)
    assert os.listdir(tmp_path / "m") == ["1"]


def test_a_model_of_tensorflow_1_is_refused(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, (None, 3), name="x")
        tf.compat.v1.saved_model.simple_save(
            session, os.fspath(tmp_path / "m" / "1"), {"x": x}, {"y": x * 2}
        )
    with pytest.raises(
        ValueError, match=r"^Cannot recalibrate .*: it has no record of the variables"
    ):
        tfbn.recalibrate(tmp_path / "m", field(3), verbose=0)


def test_a_function_that_is_no_attribute(tmp_path):
    made = Fused()
    outer = tf.function(lambda x: made.infer(x), input_signature=[tf.TensorSpec((None, 5, 5, 3))])
    tf.saved_model.save(made, tmp_path / "1", signatures=outer)
    x = field(5, 5, 3)
    actual = tfbn.recalibrate(tmp_path, x, verbose=0)
    np.testing.assert_allclose(actual.stats["bn"].mean, np.float64(x).mean((0, 1, 2)), rtol=1e-5)


class Fixed(tf.Module):
    """Batch norm in a branch, whose tensors cannot be accessed."""

    def __init__(self):
        super().__init__()
        self.mean = tf.Variable([0.3] * 3, name="bn/ema", trainable=False)
        self.known = Fused()

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 5, 3), name="image")])
    def infer(self, x):
        inside = tf.cond(tf.reduce_mean(x) > 0, lambda: x - self.mean, lambda: x)
        return self.known.infer(inside)


def test_a_statistic_in_a_branch_is_refused_by_its_name(tmp_path):
    made = Fixed()
    tf.saved_model.save(made, tmp_path / "1", signatures=made.infer)
    with pytest.raises(ValueError, match="a variable 'bn/ema' of no batch norm"):
        tfbn.recalibrate(tmp_path, field(5, 5, 3), verbose=0)


def test_no_order_is_recorded_where_none_is_known(tmp_path):
    x, y = keras.Input((2,), name="b"), keras.Input((2,), name="a")
    model = keras.Model([x, y], layers.BatchNormalization()(x - 2 * y))
    model.export(tmp_path / "1", verbose=False)
    data = {"b": field(2), "a": field(2, seed=1)}
    tfbn.recalibrate(tmp_path, data, verbose=0)
    described = tfbn.describe(tmp_path)
    assert (described["inputs"], described["outputs"]) == (None, None)
    # Matching unnamed inputs by order would swap clients' inputs.
    p, q = keras.Input((2,)), keras.Input((2,))
    unnamed = keras.Model([p, q], layers.BatchNormalization()(p - 2 * q))
    with pytest.raises(ValueError, match="allow_new_signature"):
        tfbn.export(unnamed, tmp_path)


def test_the_next_version_of_a_link_or_of_the_working_directory(tmp_path, monkeypatch):
    module = Fused()
    version = tmp_path / "m" / "7"
    tf.saved_model.save(module, version, signatures=module.infer)
    (version.parent / "current").symlink_to("7")
    for file in version.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    version.chmod(0o555)
    monkeypatch.chdir(version)
    before = sorted(os.listdir(version))
    assert tfbn.recalibrate("../current", field(5, 5, 3), verbose=0).path == version.parent / "8"
    assert tfbn.recalibrate(".", field(5, 5, 3), verbose=0).path == version.parent / "9"
    assert sorted(os.listdir(version)) == before
    new = [version.parent / "8", *(version.parent / "8").rglob("*")]
    assert all(path.stat().st_mode & 0o200 for path in new)


def test_what_cannot_be_written_is_refused_before_data_is_read(tmp_path, monkeypatch):
    module = Fused()
    tf.saved_model.save(module, tmp_path / "m" / "7", signatures=module.infer)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)

    def data():
        raise AssertionError("read")
        yield

    with pytest.raises(PermissionError, match="No permission to write here"):
        tfbn.recalibrate(tmp_path / "m", data(), verbose=0)
    denied = "saved_model.pb"
    monkeypatch.setattr(os, "access", lambda path, mode: denied not in str(path))
    with pytest.raises(PermissionError, match="No permission to read"):
        tfbn.recalibrate(tmp_path / "m", data(), verbose=0)
