"""Tests of `tfbn.serving.recalibrate.patterns`, by `tfbn.recalibrate` and float64 NumPy."""

import os

import numpy as np
import pytest
import tensorflow as tf

import tfbn

EPSILON = 0.01
rng = np.random.default_rng(0)


def root(v):
    return tf.math.rsqrt(v["variance"] + EPSILON)


def scale(v):
    return root(v) * v["gamma"]


# Common formulas of batch norm.
AFFINE = {
    "of TensorFlow": lambda x, v: tf.nn.batch_normalization(
        x, v["mean"], v["variance"], v["beta"], v["gamma"], EPSILON
    ),
    "centered": lambda x, v: (x - v["mean"]) * scale(v) + v["beta"],
    "scaled at the end": lambda x, v: v["beta"] + ((x - v["mean"]) * root(v)) * v["gamma"],
    "divided": lambda x, v: (
        v["gamma"] * ((x - v["mean"]) / tf.sqrt(EPSILON + v["variance"])) + v["beta"]
    ),
    "two products": lambda x, v: x * scale(v) - v["mean"] * scale(v) + v["beta"],
}
PLAIN = {
    "of TensorFlow": lambda x, v: tf.nn.batch_normalization(
        x, v["mean"], v["variance"], None, None, EPSILON
    ),
    "divided": lambda x, v: (x - v["mean"]) / tf.sqrt(v["variance"] + EPSILON),
    "multiplied": lambda x, v: root(v) * (x - v["mean"]),
    "two products": lambda x, v: x * root(v) - v["mean"] * root(v),
}


class Written(tf.Module):
    """Batch norm by a formula, a nonlinear layer, and another batch norm.

    Args:
        formula: From the input and the variables to the output.
        shape: The shape of the statistics.
        inputs: The shape of a sample.
        trainable: Whether the statistics are marked as trainable, as by `tf.Variable(value)`.
    """

    def __init__(self, formula, shape=(3,), inputs=(3,), trainable=True):
        super().__init__()
        self.formula = formula
        start = {"mean": 0.3, "variance": 2.0, "gamma": 1.5, "beta": -0.5}
        self.sets = [
            {
                name: tf.Variable(tf.fill(shape, value), trainable, name=f"bn{number}/{name}_ema")
                for name, value in start.items()
            }
            for number in range(2)
        ]
        spec = tf.TensorSpec((None, *inputs), name="x")
        self.serve = tf.function(self.infer, input_signature=[spec])

    def infer(self, x):
        return {"y": self.formula(tf.nn.tanh(self.formula(x, self.sets[0])), self.sets[1])}


def expected(x, shape, gamma, beta):
    """Return the output with population statistics, in float64."""
    axes = (0, *(axis for axis in range(1, x.ndim) if x.shape[axis] != max(shape)))
    y = np.float64(x)
    for last in (False, True):
        mean, variance = y.mean(axes, keepdims=True), y.var(axes, keepdims=True)
        y = gamma * (y - mean) / np.sqrt(variance + EPSILON) + beta
        y = y if last else np.tanh(y)
    return y


def served(path, x):
    """Return the answer of the highest version."""
    newest = max(os.listdir(path), key=int)
    signature = tf.saved_model.load(os.fspath(path / newest)).signatures["serving_default"]
    return signature(x=tf.constant(x))["y"].numpy()


FORMS = {name: (formula, 1.5, -0.5) for name, formula in AFFINE.items()}
FORMS |= {f"plain, {name}": (formula, 1.0, 0.0) for name, formula in PLAIN.items()}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    formula, gamma, beta = FORMS[name]
    module = Written(formula, trainable=list(FORMS).index(name) % 2 == 1)
    tf.saved_model.save(module, tmp_path / "1", signatures=module.serve)
    x = (rng.normal(size=(40, 3)) * 3 + 2).astype("float32")
    actual = tfbn.recalibrate(tmp_path, x, batch_size=8, verbose=0)
    assert list(actual.stats) == ["bn0", "bn1"]
    right = expected(x, (3,), gamma, beta)
    np.testing.assert_allclose(served(tmp_path, x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((1, 3), (3,)), ((1, 1, 1, 3), (4, 4, 3)), ((1, 3, 1, 1), (3, 4, 4)), ((3, 1, 1), (3, 4, 4))],
)
def test_statistics_with_axes_for_broadcasting(tmp_path, shape, inputs):
    module = Written(AFFINE["of TensorFlow"], shape, inputs)
    tf.saved_model.save(module, tmp_path / "1", signatures=module.serve)
    x = (rng.normal(size=(40, *inputs)) * 3 + 2).astype("float32")
    tfbn.recalibrate(tmp_path, x, batch_size=8, verbose=0)
    right = expected(x, shape, 1.5, -0.5)
    np.testing.assert_allclose(served(tmp_path, x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "inputs"), [((1,), (4, 4, 1)), ((1, 1, 1), (1, 4, 4)), ((1, 1), (1,))]
)
def test_a_single_channel(tmp_path, shape, inputs):
    module = Written(AFFINE["of TensorFlow"], shape, inputs)
    tf.saved_model.save(module, tmp_path / "1", signatures=module.serve)
    x = (rng.normal(size=(40, *inputs)) * 3 + 2).astype("float32")
    tfbn.recalibrate(tmp_path, x, batch_size=8, verbose=0)
    y = np.float64(x)
    y = np.tanh(1.5 * (y - y.mean()) / np.sqrt(y.var() + EPSILON) - 0.5)
    right = 1.5 * (y - y.mean()) / np.sqrt(y.var() + EPSILON) - 0.5
    np.testing.assert_allclose(served(tmp_path, x), right, rtol=1e-4, atol=1e-5)


# Forms of batch norm without a pattern.
UNKNOWN = {
    "a power": lambda x, v: (x - v["mean"]) * (v["variance"] + EPSILON) ** -0.5,
    "no epsilon": lambda x, v: (x - v["mean"]) / tf.sqrt(v["variance"]),
    "a standard deviation": lambda x, v: (x - v["mean"]) / v["variance"],
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_forms_are_refused_by_the_name_of_a_variable(tmp_path, name, trainable):
    known, unknown = AFFINE["of TensorFlow"], UNKNOWN[name]
    module = Written(lambda x, v: (unknown if v is module.sets[0] else known)(x, v), (3,), (3,))
    if not trainable:
        module = Written(module.formula, trainable=False)
        first = module.sets[0]
        module.formula = lambda x, v: (unknown if v is first else known)(x, v)
    tf.saved_model.save(module, tmp_path / "1", signatures=module.serve)
    with pytest.raises(ValueError, match=r"a variable 'bn0/(mean|variance)_ema' of no batch norm"):
        tfbn.recalibrate(tmp_path, np.ones((8, 3), "float32"), verbose=0)
    assert os.listdir(tmp_path) == ["1"]


def test_a_value_between_that_is_read_again_is_refused(tmp_path):
    def formula(x, v):
        inverse = scale(v)
        return x * inverse + (v["beta"] - v["mean"] * inverse) + inverse

    module = Written(formula)
    tf.saved_model.save(module, tmp_path / "1", signatures=module.serve)
    with pytest.raises(ValueError, match="that reads a statistic as well"):
        tfbn.recalibrate(tmp_path, np.ones((8, 3), "float32"), verbose=0)
