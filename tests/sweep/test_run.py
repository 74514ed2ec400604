"""Tests of `tfbn.collect` and `tfbn.update_population_stats`."""

import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import (
    NETWORKS,
    Looped,
    Subclassed,
    batch_norms,
    data,
    dtype_policy,
    in_training,
    plain,
    residual,
)

import tfbn
from tfbn.models.keras_models import batch_norm_layers
from tfbn.sweep import cut_passes

BN = [tfbn.BatchNormalization, layers.BatchNormalization]
SAMPLES = 37


def pooled(counts, batches):
    """Mean and variance of the values of all batches together, by the law of total variance."""
    weights = np.asarray(counts, np.float64) / np.sum(counts)
    means, variances = (np.stack(v) for v in zip(*batches, strict=True))
    mean = weights @ means
    return mean, weights @ (variances + (means - mean) ** 2)


def assert_stats(stats, model, expected, rtol=1e-4):
    """Compare with (mean, variance) in the order of `batch_norms`, the mean in units of std."""
    path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
    assert len(stats) == len(expected)
    for layer, (mean, variance) in zip(batch_norms(model), expected, strict=True):
        found = stats[path_of[id(layer)]]
        std = np.sqrt(variance)
        np.testing.assert_allclose(found.mean / std, mean / std, rtol=0, atol=rtol)
        np.testing.assert_allclose(found.variance, variance, rtol=rtol)


@pytest.mark.quick(2)
@pytest.mark.parametrize("build", NETWORKS)
def test_exact_is_one_batch_in_training_mode_for_any_batch_size(build):
    model = build(tfbn.BatchNormalization)
    x = data(model, SAMPLES)
    [expected] = in_training(build, model, x, [slice(None)])
    for batch_size, memory_limit in [(8, 0), (1, None), (2, 3000)]:
        stats = tfbn.collect(
            model, x, method="exact", batch_size=batch_size, memory_limit=memory_limit, verbose=0
        )
        assert_stats(stats, model, expected)
        assert stats.samples == SAMPLES


def test_exact_does_not_depend_on_the_order():
    model = residual(layers.BatchNormalization)
    x = data(model, SAMPLES)
    order = np.random.default_rng(1).permutation(SAMPLES)
    shuffled = keras.tree.map_structure(lambda a: a[order], x)
    a = tfbn.collect(model, x, method="exact", batch_size=5, verbose=0)
    b = tfbn.collect(model, shuffled, method="exact", batch_size=11, verbose=0)
    for path, drift in a.compare(b).items():
        assert drift["mean_shift_max"] < 1e-5, path
        assert drift["std_ratio_max"] < 1 + 1e-5, path


@pytest.mark.quick(2)
@pytest.mark.parametrize("build", NETWORKS)
def test_pooled_and_algorithm2_to_their_definitions(build):
    model = build(layers.BatchNormalization)
    x = data(model, SAMPLES)
    starts = range(0, SAMPLES, 16)
    batches = in_training(build, model, x, [slice(s, s + 16) for s in starts])
    sizes = [16, 16, 5]
    stats = tfbn.collect(model, x, method="pooled", batch_size=16, verbose=0)
    per_layer = list(zip(*batches, strict=True))
    assert_stats(stats, model, [pooled(sizes, layer) for layer in per_layer], rtol=1e-5)

    stats2 = tfbn.collect(model, x, method="algorithm2", batch_size=16, verbose=0)
    path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
    expected = []
    for layer, found in zip(batch_norms(model), per_layer, strict=True):
        positions = stats2[path_of[id(layer)]].count // SAMPLES
        m = np.array(sizes)[:, None] * positions
        weights = np.array(sizes) / SAMPLES
        means, variances = (np.stack(v) for v in zip(*found, strict=True))
        expected.append((weights @ means, weights @ (variances * m / (m - 1))))
    assert_stats(stats2, model, expected, rtol=1e-5)
    assert (stats.batches, stats.batch_size, stats.samples) == (3, 16, SAMPLES)


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("ratio", [0, 5, 1e2, 1e4])
def test_moments_are_right_far_from_zero(method, ratio):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 3)) + ratio).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, method=method, batch_size=100, verbose=0).values()
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.variance, exact.var(0), rtol=1e-6)


def test_a_constant_channel_has_variance_zero():
    x = np.full((50, 2), 1e4 / 3, "float32")
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, batch_size=7, verbose=0).values()
    assert np.all(stats.variance >= 0)
    np.testing.assert_allclose(stats.variance, 0, atol=1e-6)


# Any model.


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_calls_of_a_shared_layer_are_pooled(method):
    shared = layers.BatchNormalization()
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(b)]))
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 3)).astype("f"), rng.normal(2, 3, size=(20, 3)).astype("f")]
    [stats] = tfbn.collect(model, x, method=method, batch_size=8, verbose=0).values()
    both = np.concatenate(x).astype(np.float64)
    assert stats.count == 40
    np.testing.assert_allclose(stats.mean, both.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.variance, both.var(0), rtol=1e-5)


def test_exact_for_a_layer_that_is_called_on_its_own_output():
    shared = layers.BatchNormalization()
    inputs = keras.Input((3,))
    x = shared(inputs)
    model = keras.Model(inputs, shared(x * x))
    values = np.random.default_rng(0).normal(1, 2, size=(21, 3)).astype("f")
    stats = tfbn.collect(model, values, method="exact", batch_size=4, verbose=0)
    first = values.astype(np.float64)
    second = ((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-3)) ** 2
    both = np.concatenate([first, second])
    np.testing.assert_allclose(stats[shared.name].mean, both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats[shared.name].variance, both.var(0), rtol=1e-5)


@pytest.mark.parametrize("steps", [3, None])
@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_time_distributed(method, steps):
    bn = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((steps, 4)), layers.TimeDistributed(bn)])
    x = np.random.default_rng(0).normal(3, 2, size=(21, 3, 4)).astype("f")
    [stats] = tfbn.collect(model, x, method=method, batch_size=8, verbose=0).values()
    np.testing.assert_allclose(stats.mean, x.astype("d").mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats.variance, x.astype("d").var((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("method", ["pooled", "algorithm2", "exact"])
def test_masked_positions_do_not_count(method):
    x = np.random.default_rng(0).normal(2, 3, size=(13, 6, 2)).astype("f")
    lengths = np.arange(13) % 6 + 1
    kept = np.arange(6) < lengths[:, None]
    x[~kept] = 0
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, method=method, batch_size=13, verbose=0).values()
    values = x[kept].astype(np.float64)
    n = len(values)
    assert stats.count == n
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-5)
    unbiased = n / (n - 1) if method == "algorithm2" else 1
    np.testing.assert_allclose(stats.variance, values.var(0) * unbiased, rtol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
def test_exact_where_the_graph_cannot_be_cut(eager):
    model = Looped()
    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("f")
    model(x)
    model.compile(run_eagerly=eager)
    stats = tfbn.collect(model, x, method="exact", batch_size=3, verbose=0)
    first = x.astype(np.float64)
    mean, variance = first.mean((0, 1)), first.var((0, 1))
    np.testing.assert_allclose(stats[model.first.name].mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats[model.first.name].variance, variance, rtol=1e-5)
    second = (first - mean) / np.sqrt(variance + 1e-3)
    assert stats[model.bn.name].count == 60
    np.testing.assert_allclose(stats[model.bn.name].mean, second.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(stats[model.bn.name].variance, second.var((0, 1)), rtol=1e-5)


class Recurrent(keras.Model):
    """Batch norm in a while loop, whose output goes into its next input."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()

    def call(self, inputs, training=None):
        """h = bn(relu(h) + part) over three parts."""

        def body(i, h):
            return i + 1, self.bn(tf.nn.relu(h) + inputs[:, i], training=training)

        return tf.while_loop(lambda i, _: i < 3, body, [0, tf.zeros_like(inputs[:, 0])])[1]


def test_a_loop_that_feeds_a_layers_output_back_to_it_has_no_exact_statistics():
    model = Recurrent()
    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("f")
    model(x)
    with pytest.raises(ValueError, match=rf"{model.bn.name}'.*loop that feeds.*method='pooled'"):
        tfbn.collect(model, x, method="exact", verbose=0)
    h, seen = np.zeros((20, 4)), []
    for i in range(3):
        seen.append(np.maximum(h, 0) + x[:, i])
        h = (seen[-1] - seen[-1].mean(0)) / np.sqrt(seen[-1].var(0) + 1e-3)
    [stats] = tfbn.collect(model, x, method="pooled", verbose=0).values()
    np.testing.assert_allclose(stats.mean, np.mean(seen, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats.variance, np.concatenate(seen).var(0), rtol=1e-5)


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_loop_keeps_precision_far_from_zero(method, eager):
    model = Looped()
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 3, 4)) + 1e4).astype("f")
    model(x)
    model.run_eagerly = eager
    model.first.trainable = False  # Passes on what enters, less 1/2000.
    [stats] = tfbn.collect(model, x, method=method, batch_size=50, verbose=0).values()
    entered = x.astype("d") / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(stats.mean, entered.mean((0, 1)), rtol=1e-6)
    # The values themselves are float32, and 1e4 away from zero.
    np.testing.assert_allclose(stats.variance, entered.var((0, 1)), rtol=1e-3)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("eager", [False, True])
def test_time_distributed_over_other_numbers_of_steps_in_every_batch(method, eager):
    bn, last = layers.BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((None, 4)), layers.TimeDistributed(bn), last])
    model.run_eagerly = eager
    x = np.random.default_rng(0).normal(3, 2, size=(60, 5, 4)).astype("f")
    parts = [x[20 * i : 20 * i + 20, :steps] for i, steps in enumerate((3, 2, 5))]
    stats, _ = tfbn.collect(model, iter(parts), method=method, verbose=0).values()
    values = np.concatenate([part.reshape(-1, 4) for part in parts]).astype("d")
    assert stats.count == len(values)
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.variance, values.var(0), rtol=1e-5)


class Vectorized(keras.Model):
    """Batch norm in a function that is vectorized over the steps."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 4))

    def call(self, inputs, training=None):
        """bn of every step."""
        return tf.vectorized_map(lambda part: self.bn(part, training=training), inputs)


def test_a_layer_in_a_vectorized_function_is_an_error():
    model = Vectorized()
    model(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"called in tf\.vectorized_map"):
        tfbn.collect(model, np.ones((20, 3, 4), "f"), verbose=0)


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_run_eagerly_gives_the_same(method):
    model = residual(layers.BatchNormalization)
    x = data(model, SAMPLES)
    graph = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    model.compile(run_eagerly=True)
    eager = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    for drift in graph.compare(eager).values():
        assert drift["mean_shift_max"] < 1e-5
        assert drift["std_ratio_max"] < 1 + 1e-5


class Doubling(layers.BatchNormalization):
    """A subclass that adds to what `super().call` gives."""

    def call(self, inputs, training=None, mask=None):
        """Twice the batch norm."""
        return 2 * super().call(inputs, training=training, mask=mask)


def test_what_a_subclass_adds_is_kept():
    model = keras.Sequential([keras.Input((3,)), Doubling(), layers.BatchNormalization()])
    x = data(model, 40)
    _, last = tfbn.collect(model, x, method="exact", batch_size=7, verbose=0).values()
    v = x.astype(np.float64)
    np.testing.assert_allclose(last.variance, 4 * v.var(0) / (v.var(0) + 1e-3), rtol=1e-5)


class Ignoring(layers.BatchNormalization):
    """A subclass that normalises in its own way."""

    def call(self, inputs, training=None, mask=None):
        """The inputs."""
        return inputs


def test_a_layer_that_cannot_be_observed_is_an_error():
    model = keras.Sequential(
        [keras.Input((3,)), Ignoring(name="mine"), layers.BatchNormalization()]
    )
    with pytest.raises(ValueError, match=r"Ignoring.call to call super.*'mine'"):
        tfbn.collect(model, data(model, 4), verbose=0)
    with pytest.raises(RuntimeError, match=r"Ignoring.call to call super.*'mine'"):
        tfbn.collect_shards(model, [data(model, 4)], verbose=0)


def test_renorm_sets_all_statistics():
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    x = data(model, 40)
    before = model.get_weights()
    stats = tfbn.update_population_stats(model, x, verbose=0)
    v = x.astype(np.float64)
    bn = model.layers[-1]
    np.testing.assert_allclose(bn.moving_mean, v.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.moving_variance, v.var(0), rtol=1e-5)
    np.testing.assert_allclose(bn.moving_stddev, np.sqrt(v.var(0) + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(bn.renorm_mean, v.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.renorm_stddev, np.sqrt(v.var(0) + 1e-3), rtol=1e-5)
    stats.previous.assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    with dtype_policy(policy):
        model = keras.Sequential(
            [keras.Input((3,)), tfbn.BatchNormalization(), layers.BatchNormalization()]
        )
    x = np.random.default_rng(0).normal(3, 2, size=(50, 3)).astype("f")
    first, second = tfbn.collect(model, x, method="exact", batch_size=8, verbose=0).values()
    rounded = tf.cast(x, policy.removeprefix("mixed_")).numpy().astype(np.float64)
    np.testing.assert_allclose(first.mean, rounded.mean(0), rtol=1e-5)
    np.testing.assert_allclose(first.variance, rounded.var(0), rtol=1e-5)
    np.testing.assert_allclose(second.variance, rounded.var(0) / (rounded.var(0) + 1e-3), rtol=1e-2)


def test_frozen_layers_are_left_alone_unless_included():
    model = plain(layers.BatchNormalization)
    x = data(model, SAMPLES)
    frozen = batch_norms(model)[0]
    frozen.trainable = False
    frozen.moving_mean.assign([3.0, -1.0, 0.5, 7.0])
    stats = tfbn.collect(model, x, method="exact", batch_size=16, verbose=0)
    assert frozen.name not in stats
    assert len(stats) == 2
    # What comes after it sees it infer.
    inference = keras.Model(model.inputs, model.layers[4].output)(x)
    values = np.asarray(inference, np.float64)
    found = stats[batch_norms(model)[1].name]
    convolved = np.asarray(model.layers[3](model.layers[2](frozen(model.layers[0](x)))), np.float64)
    assert values.shape == convolved.shape
    np.testing.assert_allclose(found.mean, convolved.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.variance, convolved.var((0, 1, 2)), rtol=1e-4)
    both = tfbn.collect(model, x, include_frozen=True, batch_size=16, verbose=0)
    assert frozen.name in both


def test_dropout_is_inactive():
    bn = layers.BatchNormalization()
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dropout(0.9),
            layers.GaussianNoise(1.0),
            bn,
        ]
    )
    x = data(model, 40)
    [stats] = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)


def test_duplicate_names_in_nested_models_do_not_collide():
    block = [keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")], name="b")]
    block.append(
        keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")], name="b")
    )

    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = block

        def call(self, x):
            return self.blocks[0](x) + self.blocks[1](10 * x)

    model = Both()
    x = np.random.default_rng(0).normal(size=(40, 2)).astype("f")
    model(x)
    one, two = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(two.variance, 100 * one.variance, rtol=1e-5)


# Any data.


class Sequence(keras.utils.PyDataset):
    """Batches of six, with targets."""

    def __init__(self, x, endless=False):
        super().__init__()
        self.x, self.endless, self.epochs = x, endless, 0

    @property
    def num_batches(self):
        """Six a batch."""
        return None if self.endless else -(-len(self.x) // 6)

    def __getitem__(self, i):
        """Batch `i`."""
        i %= -(-len(self.x) // 6)
        return self.x[6 * i : 6 * i + 6], np.zeros(6)

    def on_epoch_end(self):
        """Count."""
        self.epochs += 1


def kinds(x):
    """The same data in batches of six, as everything that `fit` takes."""
    y, w = np.zeros(len(x)), np.ones(len(x))
    pieces = [x[i : i + 6] for i in range(0, len(x), 6)]
    dataset = tf.data.Dataset.from_tensor_slices
    return {
        "numpy": (x, {"batch_size": 6}),
        "tensor": (tf.constant(x), {"batch_size": 6}),
        "float64": (x.astype("float64"), {"batch_size": 6}),
        "dataset": (dataset(x).batch(6), {}),
        "dataset xy": (dataset((x, y)).batch(6), {}),
        "dataset xyw": (dataset((x, y, w)).batch(6), {}),
        "endless dataset": (dataset((x, y)).batch(6).repeat(), {"steps": len(pieces)}),
        "unknown length": (dataset(x).batch(6).filter(lambda _: True), {}),
        "pydataset": (Sequence(x), {}),
        "endless pydataset": (Sequence(x, endless=True), {"steps": len(pieces)}),
        "generator": ((piece for piece in pieces), {}),
        "generator xy": (((piece, np.zeros(len(piece))) for piece in pieces), {}),
        "endless generator": (itertools.cycle(pieces), {"steps": len(pieces)}),
    }


@pytest.mark.quick(2)
@pytest.mark.filterwarnings("ignore:A one-pass sweep")
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("kind", kinds(np.zeros((12, 2))))
def test_any_data_that_fit_takes(kind, method):
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), layers.ReLU(), layers.BatchNormalization()]
    )
    x = data(model, 40)  # The last of seven batches has four samples.
    source, options = kinds(x)[kind]
    stats = tfbn.collect(model, source, method=method, verbose=0, **options)
    first, _ = stats.values()
    assert (stats.samples, stats.batches, stats.batch_size) == (40, 7, 6)
    assert first.count == 40
    np.testing.assert_allclose(first.mean, x.astype("d").mean(0), rtol=1e-5)
    np.testing.assert_allclose(first.variance, x.astype("d").var(0), rtol=1e-5)


# 8 samples take 4608 bytes at the first frontier and 3072 at the second.
@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("memory_limit", "reads", "starts"),
    [
        (5 * 4608, 1, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]),
        (4 * 4608, 2, [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]),
        (2 * 4608, 3, [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0]),
        (3072, 3, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]),
        (0, 3, [0] * 15),
    ],
)
def test_what_fits_in_memory_is_not_computed_again(memory_limit, reads, starts, monkeypatch):
    model = plain(layers.BatchNormalization)
    x = data(model, 40)
    read, started = [], []
    original = cut_passes.CutPasses.run

    def run(self, batch, start, *args):
        started.append(start.level if start else 0)
        return original(self, batch, start, *args)

    monkeypatch.setattr(cut_passes.CutPasses, "run", run)

    class Read:
        def __iter__(self):
            for i in range(0, 40, 8):
                if i == 32:
                    read.append(i)
                yield x[i : i + 8]

    stats = tfbn.collect(model, Read(), method="exact", memory_limit=memory_limit, verbose=0)
    assert (len(read), started) == (reads, starts)
    [expected] = in_training(plain, model, x, [slice(None)])
    assert_stats(stats, model, expected)


def test_other_data_in_the_second_pass_is_an_error():
    model = keras.Sequential([keras.Input((3,)), BN[0](), layers.ReLU(), BN[0]()])
    x = data(model, 40)
    lengths = itertools.count(40, -1)

    class Shrinking:
        def __iter__(self):
            return iter([x[: next(lengths)]])

    with pytest.raises(ValueError, match=r"same data in every pass.*\(39 samples then, 38 now\)"):
        tfbn.collect(model, Shrinking(), method="exact", memory_limit=0, verbose=0)


def test_small_batches_are_warned_of_only_where_they_matter():
    deep = plain(layers.BatchNormalization)
    x = data(deep, 20)
    with pytest.warns(UserWarning, match="exact"):
        tfbn.collect(deep, x, method="pooled", batch_size=8, verbose=0)
    flat = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tfbn.collect(deep, x, method="pooled", batch_size=16, verbose=0)
        tfbn.collect(deep, x, method="exact", batch_size=2, verbose=0)
        tfbn.collect(flat, data(flat, 20), method="pooled", batch_size=2, verbose=0)


# Nothing else changes.


class Counter(layers.Layer):
    """Counts its calls, of whatever mode, and scales by the count."""

    def build(self, _):
        """One count."""
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        """Count, and scale."""
        self.calls.assign_add(1.0)
        return inputs * self.calls


class Compiled(layers.Layer):
    """A layer whose call is a `tf.function` with a batch norm in it."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn()

    @tf.function
    def call(self, inputs, training=None):
        """Batch norm."""
        return self.bn(inputs, training=training)


def stateful(bn):
    """A network with all kinds of state, built and compiled."""
    inputs = keras.Input((3,))
    normalization = layers.Normalization(mean=[1.0, 2, 3], variance=[1.0, 2, 3])
    x = Counter()(normalization(inputs))
    x = layers.Dropout(0.3, seed=3)(layers.Dense(4)(x))
    x = Compiled(bn)(x)
    x = layers.GaussianNoise(0.1, seed=4)(layers.Dense(4)(x))
    model = keras.Model(inputs, layers.Dense(2, "softmax")(bn()(x)))
    model.compile(
        keras.optimizers.Adam(use_ema=True), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def state(model):
    """All there is in a model and its optimizer, and the random state of everything."""
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    values = [np.array(v.numpy()) for v in variables]
    flags = [layer.trainable for layer in model._flatten_layers()]
    generator = tf.random.get_global_generator().state.numpy()
    return [*values, flags, generator, np.random.get_state()[1], random.getstate()[1]]


def assert_same(before, after):
    """To the bit."""
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", ["pooled", "algorithm2", "exact"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("bn", BN)
def test_a_sweep_changes_nothing(bn, eager, method):
    model = stateful(bn)
    x, y = data(model, 64), np.arange(64) % 2
    model.fit(x, y, epochs=1, verbose=0)
    predicted = model.predict(x, verbose=0)
    functions = model.train_function, model.test_function, model.predict_function
    model.run_eagerly = eager
    before = state(model)
    tfbn.collect(model, x, method=method, verbose=0)
    assert_same(before, state(model))
    model.run_eagerly = False
    assert functions == (model.train_function, model.test_function, model.predict_function)
    counter = next(layer for layer in model.layers if isinstance(layer, Counter))
    counter.calls.assign(before[[v.path for v in model.variables].index(counter.calls.path)] - 2)
    model.predict(x, verbose=0)  # Two batches: the counter is back where it was.
    assert predicted.shape == (64, 2)


@pytest.mark.slow
@pytest.mark.parametrize("bn", BN)
def test_training_goes_on_as_if_no_sweep_had_been(bn):
    histories = []
    for sweep in (False, True):
        keras.utils.set_random_seed(1)
        model = stateful(bn)
        x, y = data(model, 64), np.arange(64) % 2

        def collect(epoch, logs, sweep=sweep, model=model, x=x):
            if sweep:
                tfbn.collect(model, x, method="exact", batch_size=16, verbose=0)

        history = model.fit(
            x,
            y,
            epochs=3,
            validation_data=(x, y),
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=collect)],
            verbose=0,
        )
        histories.append(history.history)
    assert histories[0] == histories[1]


def test_a_layer_compiled_before_the_sweep_is_observed_and_left_as_it_was():
    model = keras.Sequential([keras.Input((3,)), Compiled(layers.BatchNormalization)])
    x = data(model, 40)
    before = model(x).numpy()
    trained = model(x, training=True).numpy()
    model.layers[0].bn.moving_mean.assign(np.zeros(3))
    model.layers[0].bn.moving_variance.assign(np.ones(3))
    [stats] = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)
    np.testing.assert_array_equal(model(x), before)
    np.testing.assert_array_equal(model(x, training=True), trained)


def test_global_seed_sequence_is_not_consumed():
    model = plain(layers.BatchNormalization)
    x = data(model, 20)
    draws = []
    for sweep in (False, True):
        tf.random.set_seed(7)
        if sweep:
            tfbn.collect(model, x, batch_size=20, verbose=0)
        draws.append(tf.random.normal([3]).numpy())
    np.testing.assert_array_equal(*draws)


# No fault spoils it.


class Fault(Exception):
    """Raised by the data."""


@pytest.mark.quick(3)
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("fails_at", range(7))
def test_an_error_at_any_batch_leaves_the_model_as_it_was(fails_at, method):
    model = stateful(tfbn.BatchNormalization)
    x = data(model, 7 * 8)

    def batches():
        for i in range(7):
            if i == fails_at:
                raise Fault("the disk is gone")
            yield x[8 * i : 8 * i + 8]

    before = state(model)
    with pytest.raises(RuntimeError, match=f"batch {fails_at} .*Fault: the disk is gone") as caught:
        tfbn.update_population_stats(model, batches(), method=method, verbose=0)
    assert isinstance(caught.value.__cause__, Fault)
    assert_same(before, state(model))


@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value, method):
    model = plain(layers.BatchNormalization)
    x = data(model, 40)
    x[27, 3, 3, 1] = value
    before = model.get_weights()
    first = batch_norms(model)[0].name
    with pytest.raises(ValueError, match=rf"layer '{first}'.*batch 3 .* NaN or Inf"):
        tfbn.update_population_stats(model, x, method=method, batch_size=8, verbose=0)
    assert_same(before, model.get_weights())


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_an_overflow_inside_the_model_is_named(method):
    model = plain(layers.BatchNormalization)
    x = data(model, 40)
    scale = model.layers[0].kernel
    scale.assign(scale * 1e36)
    with pytest.raises(ValueError, match=r"batch 0 .* overflow inside"):
        tfbn.collect(model, x * 1e6, method=method, batch_size=20, verbose=0)


def test_statistics_that_do_not_fit_the_variable():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(dtype="float32")])
    x = data(model, 40) * np.float32(1e25)  # The variance is beyond float32.
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"finite|Received"):
        tfbn.update_population_stats(model, x, verbose=0)
    assert_same(before, model.get_weights())


def test_one_value_per_channel():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    x = data(model, 9)
    with pytest.raises(ValueError, match=r"two values per channel.*'bn', in batch 2 .*batch size"):
        tfbn.collect(model, x, method="algorithm2", batch_size=4, verbose=0)
    [stats] = tfbn.collect(model, x, method="pooled", batch_size=1, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)


@pytest.fixture
def listening():
    """Ctrl-C raises, even where the tests run as a shell's background job, which ignores it.

    Python drops it where it comes while garbage is collected, of which earlier tests leave much.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_the_model_as_it_was(listening):
    model = stateful(layers.BatchNormalization)
    x = data(model, 32)

    def batches():
        yield x
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            yield x
        raise TimeoutError

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        tfbn.update_population_stats(model, batches(), verbose=0)
    assert_same(before, state(model))
    tfbn.collect(model, x, batch_size=32, verbose=0)  # And another sweep works.


class Endless:
    """It says that it repeats, as Grain does."""

    def __len__(self):
        return sys.maxsize

    def __iter__(self):
        return itertools.repeat(np.ones((4, 3), "float32"))


def test_complex_numbers_are_an_error():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(RuntimeError, match=r"Expected real numbers. Received: .* complex64"):
        tfbn.collect(model, np.ones((8, 3), "complex64"), verbose=0)


def test_endless_data_with_steps():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, Endless(), steps=5, verbose=0).values()
    assert stats.count == 20


def bad_calls():
    """Bad calls, and what the error must say."""
    x = np.ones((8, 3), "float32")
    bn = layers.BatchNormalization
    with_bn = lambda: keras.Sequential([keras.Input((3,)), bn()])  # noqa: E731

    def no_layers():
        return keras.Sequential([keras.Input((3,)), layers.Dense(2)])

    def frozen():
        model = with_bn()
        model.trainable = False
        return model

    dataset = tf.data.Dataset.from_tensor_slices(x).batch(4)
    return {
        "no layers": (no_layers, x, {}, "which has none"),
        "no model": (lambda: "model.keras", x, {}, "Expected a Keras model"),
        "unbuilt": (lambda: keras.Sequential([bn()]), x, {}, "built model.*without weights"),
        "unbuilt subclass": (lambda: Subclassed(bn), x, {}, "built model.*without weights"),
        "frozen": (frozen, x, {}, "include_frozen=True"),
        "method": (with_bn, x, {"method": "best"}, "Received: method='best'"),
        "empty array": (with_bn, x[:0], {}, "yields nothing"),
        "empty dataset": (with_bn, dataset.take(0), {}, "yields nothing"),
        "empty generator": (with_bn, iter(()), {}, "yields nothing"),
        "endless dataset": (with_bn, dataset.repeat(), {}, "endless.*steps"),
        "endless pydataset": (with_bn, Sequence(x, endless=True), {}, "endless.*steps"),
        "steps too many": (with_bn, dataset, {"steps": 3}, "steps=3.*ends after 2"),
        "steps too many, generator": (with_bn, iter([x]), {"steps": 3}, "steps=3.*ends after 1"),
        "steps": (with_bn, x, {"steps": 0}, "Received: 0"),
        "batch_size": (with_bn, dataset, {"batch_size": 4}, "batches of its own"),
        "wrong shape": (with_bn, np.ones((8, 4), "f"), {}, r"batch 0 .*\(8, 4\)"),
        "wrong rank": (with_bn, np.ones((8, 2, 3), "f"), {}, r"batch 0 .*\(8, 2, 3\)"),
        "wrong in a later batch": (with_bn, iter([x, np.ones((8, 4), "f")]), {}, r"batch 1 .*"),
        "lengths": (with_bn, {"a": x, "b": x[:4]}, {}, r"same number of samples.*\[4, 8\]"),
        "list of batches": (with_bn, [x, x], {}, "one array.*list of 2 arrays.*generator"),
        "scalar": (with_bn, np.float32(1), {}, "batch axis"),
        "no data": (with_bn, None, {}, "`model.fit` takes"),
        "endless iterable": (with_bn, Endless(), {}, "an endless Endless.*steps"),
        "empty, with a tolerance": (with_bn, iter(()), {"tolerance": 0.1}, "yields nothing"),
        "a path": (with_bn, "data.npz", {}, "`model.fit` takes"),
        "once": (with_bn, iter([x]), {"method": "exact", "memory_limit": 3}, "memory_limit=3"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_gets_one_clear_error(case):
    build, x, options, message = bad_calls()[case]
    model = build()
    before = model.get_weights() if getattr(model, "built", False) else None
    with pytest.raises(ValueError, match=f"(?s)(Expected.*)?{message}") as caught:
        tfbn.update_population_stats(model, x, verbose=0, **options)
    assert "Received" in str(caught.value)
    if before is not None:
        assert_same(before, model.get_weights())


@pytest.mark.parametrize("call", [tfbn.collect, tfbn.update_population_stats])
def test_a_sweep_in_a_graph_gets_one_clear_error(call):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    before, x = model.get_weights(), np.ones((4, 3), "float32")
    with pytest.raises(ValueError, match=r"Expected a sweep outside of .* while a graph is made"):
        tf.function(lambda: call(model, x, verbose=0), autograph=False)()
    with tf.Graph().as_default(), pytest.raises(ValueError, match="while a graph is made"):
        call(model, x, verbose=0)
    assert_same(before, model.get_weights())


def test_progress_where_the_end_is_not_known(capsys):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    batches = (np.ones((4, 3), "float32") for _ in range(5))
    tfbn.collect(model, batches, method="pooled", verbose=1)
    assert "5/5" in capsys.readouterr().out


def test_progress(capsys):
    model = plain(layers.BatchNormalization)
    x = data(model, 40)
    tfbn.collect(model, x, method="exact", batch_size=8, verbose=1)
    printed = capsys.readouterr().out
    assert printed.count("Population statistics, exact") == 1
    assert "15/15" in printed and printed.count("\n") == 2
    tfbn.collect(model, x, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_batches_of_different_shapes(method):
    model = keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.BatchNormalization(),
            layers.Conv1D(4, 2),
            layers.BatchNormalization(),
        ]
    )
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, length, 3)).astype("f") for length in (5, 9, 5, 7)]
    stats = tfbn.collect(model, iter(batches), method=method, verbose=0)
    first, second = stats.values()
    values = np.concatenate([b.reshape(-1, 3) for b in batches]).astype("d")
    assert (first.count, second.count) == (16 * 26, 16 * 22)
    np.testing.assert_allclose(first.mean, values.mean(0), atol=1e-6)
    np.testing.assert_allclose(first.variance, values.var(0), rtol=1e-5)


class Eager(keras.Model):
    """Its Python looks at the values, so that no graph can be made of it."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.first, self.second = layers.BatchNormalization(), layers.BatchNormalization()

    def call(self, x, training=None):
        """Two levels."""
        x = self.first(self.dense(x), training=training)
        return self.second(x if float(x[0, 0]) > 1e9 else tf.nn.relu(x), training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_model_that_only_runs_eagerly(method):
    model = Eager()
    model.compile(run_eagerly=True)
    x = np.random.default_rng(0).normal(2, 3, (40, 4)).astype("float32")
    model(x)
    first, second = tfbn.collect(model, x, method=method, batch_size=40, verbose=0).values()
    h = np.asarray(model.dense(x), "float64")
    np.testing.assert_allclose(first.mean, h.mean(0), atol=1e-4)
    np.testing.assert_allclose(first.variance, h.var(0), rtol=1e-4)
    h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3), 0)
    np.testing.assert_allclose(second.mean, h.mean(0), atol=1e-4)
    np.testing.assert_allclose(second.variance, h.var(0), rtol=1e-4)
    with pytest.raises(ValueError, match="in batch 1"):
        tfbn.collect(model, iter([x, np.full_like(x, np.nan)]), method=method, verbose=0)


class CalledTwice(keras.Model):
    """The first layer that is called depends on the second, by its second call."""

    def __init__(self):
        super().__init__()
        self.a = layers.BatchNormalization(name="a")
        self.b = layers.BatchNormalization(name="b")

    def call(self, x, training=None):
        """Both calls."""
        first = self.a(x, training=training)
        behind = tf.nn.relu(self.b(x, training=training))
        return first + self.a(behind, training=training)


def test_a_shared_layer_whose_second_call_is_behind_another_layer():
    model = CalledTwice()
    x = np.random.default_rng(0).normal(1, 2, (40, 3)).astype("float32")
    model(x)
    stats = tfbn.collect(model, x, batch_size=7, verbose=0)
    h = x.astype("float64")
    np.testing.assert_allclose(stats["b"].mean, h.mean(0), rtol=1e-5)
    behind = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3), 0)
    both = np.concatenate([h, behind])
    np.testing.assert_allclose(stats["a"].mean, both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["a"].variance, both.var(0), rtol=1e-4)


class Reached(keras.Model):
    """One layer is reached only where the second input is a sequence."""

    def __init__(self):
        super().__init__()
        self.first = layers.BatchNormalization(name="first")
        self.second = layers.BatchNormalization(name="second")

    def call(self, inputs, training=None):
        """One level or two."""
        x = tf.nn.relu(self.first(inputs["x"], training=training))
        return self.second(x, training=training) if len(inputs["kind"].shape) == 3 else x


def with_kind(x, sequence):
    """Inputs of `Reached`."""
    return {"x": x, "kind": np.zeros((len(x), 2, 3) if sequence else (len(x), 2), "float32")}


def reached(build=Reached):
    """The model, built."""
    model = build()
    model(with_kind(np.ones((2, 3), "float32"), True))
    return model


def test_batches_that_reach_fewer_levels():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    batches = [with_kind(x[:5], False), with_kind(x[5:15], True), with_kind(x[15:], False)]
    stats = tfbn.collect(reached(), iter(batches), verbose=0)
    every = x.astype("float64")
    np.testing.assert_allclose(stats["first"].mean, every.mean(0), atol=1e-6)
    behind = np.maximum((every[5:15] - every.mean(0)) / np.sqrt(every.var(0) + 1e-3), 0)
    assert (stats["first"].count, stats["second"].count) == (20, 10)
    np.testing.assert_allclose(stats["second"].mean, behind.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats["second"].variance, behind.var(0), rtol=1e-4)


class Deeper(Reached):
    """Two more levels behind."""

    def __init__(self):
        super().__init__()
        self.third = layers.BatchNormalization(name="third")
        self.fourth = layers.BatchNormalization(name="fourth")

    def call(self, inputs, training=None):
        """Three levels or four."""
        x = tf.nn.relu(self.third(super().call(inputs, training), training=training))
        return self.fourth(x, training=training)


class Changing:
    """Batches that are of the other kind from some pass on."""

    def __init__(self, since):
        self.since = since + 1  # It is asked once whether it can be iterated over again.

    def __iter__(self):
        self.since -= 1
        return iter([with_kind(np.arange(12, dtype="float32").reshape(4, 3), self.since < 1)])


def test_batches_that_reach_other_layers_in_a_later_pass():
    # In the second pass levels differ, and the sweep begins anew, with the data as it is then.
    [*_, last] = tfbn.collect(reached(Deeper), Changing(2), memory_limit=0, verbose=0)
    assert last == "fourth"
    with pytest.raises(ValueError, match="reaches layer 'second', which no batch of an earlier"):
        tfbn.collect(reached(Deeper), Changing(3), memory_limit=0, verbose=0)


def test_an_overflow_behind_a_frontier_that_was_kept():
    bn = layers.BatchNormalization
    model = keras.Sequential([keras.Input((3,)), bn(), layers.Dense(3), bn()])
    model.layers[1].kernel.assign(np.full((3, 3), 3e38))
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    with pytest.raises(ValueError, match=r"(?s)Received: in batch 0.*overflow inside the network"):
        tfbn.collect(model, x, verbose=0)


def padded(**options):
    """Sequences of 1 to 9 steps in shuffled batches, each padded to its longest."""

    def sequences():
        for i in range(40):
            yield np.random.default_rng(i).normal(3, 2, (1 + i % 9, 2)).astype("float32")

    spec = tf.TensorSpec((None, 2), tf.float32)
    dataset = tf.data.Dataset.from_generator(sequences, output_signature=spec)
    return dataset.shuffle(40, **options).padded_batch(8)


def test_padding_that_differs_in_every_pass_is_refused_with_advice_that_works():
    model = keras.Sequential(
        [
            keras.Input((None, 2)),
            keras.layers.Masking(),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3, activation="relu"),
            keras.layers.BatchNormalization(),
        ]
    )
    with pytest.raises(ValueError, match=r"padding to the longest.*reshuffle_each_iteration=False"):
        tfbn.collect(model, padded(), memory_limit=0, verbose=0)
    x = np.concatenate([np.concatenate(list(batch)) for batch in padded(seed=1)])
    x = x[x.any(-1)].astype("d")
    advice = [
        (padded(reshuffle_each_iteration=False), {"memory_limit": 0}),
        (padded(), {}),
    ]
    for dataset, options in advice:
        first, second = tfbn.collect(model, dataset, verbose=0, **options).values()
        np.testing.assert_allclose(first.mean, x.mean(0), rtol=1e-5)
        assert first.count == second.count == len(x)
