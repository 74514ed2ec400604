"""Regressions: where a sweep was once wrong without a word, and all cases of its kind.

The oracle is NumPy in float64, or a network of Keras's own layers after one step in training mode
over all data as one batch.
"""

import copy
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn
from tfbn.sweep import network

HERE = pathlib.Path(__file__).parents[1]


def assert_stats(found, mean, variance, rtol=1e-5):
    """Compare one layer's statistics, the mean in units of the standard deviation."""
    std = np.sqrt(variance)
    np.testing.assert_allclose(found.mean / std, mean / std, rtol=0, atol=rtol)
    np.testing.assert_allclose(found.variance, variance, rtol=rtol)


def assert_exact(stats, build, model, x, rtol=1e-4):
    """Compare with one batch in training mode, in float64."""
    [expected] = networks.in_training(build, model, x, [slice(None)])
    for found, (mean, variance) in zip(stats.values(), expected, strict=True):
        assert_stats(found, mean, variance, rtol)


def normal(*shape, seed=0, loc=0.0, scale=1.0):
    """Random numbers."""
    return np.random.default_rng(seed).normal(loc, scale, shape).astype("float32")


def three_levels(bn=layers.BatchNormalization):
    """Three dense layers, each with batch norm."""
    parts = [part for _ in range(3) for part in (layers.Dense(6, "tanh"), bn())]
    return keras.Sequential([keras.Input((4,)), *parts])


def varied(samples=400):
    """Samples that differ in place and spread, so that each of them counts."""
    rng = np.random.default_rng(5)
    spread = rng.uniform(0.1, 4, (samples, 1))
    return (spread * rng.normal(size=(samples, 4)) + spread).astype("float32")


# Data in another order, or other data, in every pass.


@pytest.mark.quick(2)
@pytest.mark.parametrize("memory_limit", [0, 2_000, 6_000, 10**9])
def test_a_dataset_that_shuffles_anew_in_every_pass(memory_limit):
    model, x = three_levels(), varied()
    dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(400).batch(10)
    stats = tfbn.collect(model, dataset, memory_limit=memory_limit, verbose=0)
    assert [layer.count for layer in stats.values()] == [400] * 3
    assert_exact(stats, three_levels, model, x, rtol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("memory_limit", [0, 2_000, 6_000])
def test_whole_batches_in_another_order(memory_limit):
    model, x = three_levels(), varied()
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(10).shuffle(40)
    stats = tfbn.collect(model, dataset, memory_limit=memory_limit, verbose=0)
    assert_exact(stats, three_levels, model, x, rtol=1e-5)


class Changing(keras.utils.PyDataset):
    """Batches of ten, of which one sample differs in every pass."""

    def __init__(self, x, change):
        super().__init__()
        self.x, self.change, self.passes = x, change, 0

    def __len__(self):
        return len(self.x) // 10

    def __getitem__(self, i):
        x = self.x
        if i == 0:
            self.passes += 1
            x = self.change(x.copy(), self.passes)
        return x[10 * i : 10 * i + 10], np.zeros(10)


def swap_columns(x, number):
    """Two features of one sample change places."""
    return x[:, ::-1] if number % 2 else x


def repeat_a_sample(x, number):
    """One sample comes twice, another never."""
    x[number] = x[0]
    return x


def last_bit(x, number):
    """The last bit of one value changes."""
    for _ in range(number):
        x[3, 2] = np.nextafter(x[3, 2], np.float32(1000))
    return x


@pytest.mark.quick(2)
@pytest.mark.parametrize("change", [swap_columns, repeat_a_sample, last_bit])
@pytest.mark.parametrize("memory_limit", [0, 1_000])
def test_other_data_in_a_later_pass_is_an_error_that_names_the_ways_out(change, memory_limit):
    model, x = three_levels(), varied(100)
    before = model.get_weights()
    with pytest.raises(ValueError, match="same data in every pass") as caught:
        tfbn.update_population_stats(
            model, Changing(x, change), memory_limit=memory_limit, verbose=0
        )
    for way in ("memory_limit", "seed", "pooled"):
        assert way in str(caught.value)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_augmentation_is_read_once_where_it_fits():
    x = varied()
    reads = []

    def augment(value):
        reads.append(1)
        return value * np.random.default_rng(len(reads)).uniform(0.5, 2, 4).astype("f")

    def augmented():
        dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(400)
        return dataset.map(lambda v: tf.ensure_shape(tf.numpy_function(augment, [v], "float32"), 4))

    model = three_levels()
    tfbn.collect(model, augmented().batch(10), verbose=0)
    assert len(reads) == 400
    with pytest.raises(ValueError, match="same data in every pass"):
        tfbn.collect(model, augmented().batch(10), memory_limit=6_000, verbose=0)
    seen = []

    def remembered(value):
        seen.append(value)
        return value

    dataset = augmented().map(
        lambda v: tf.ensure_shape(tf.numpy_function(remembered, [v], "float32"), 4)
    )
    stats = tfbn.collect(model, dataset.batch(10), verbose=0)
    assert_exact(stats, three_levels, model, np.stack(seen), rtol=1e-5)


# Layers that draw random numbers in inference.


DRAWS = ["generator", "global", "tensorflow", "uniform", "truncated", "tf generator"]


@pytest.mark.quick(2)
@pytest.mark.parametrize("memory_limit", [0, 10**9])
@pytest.mark.parametrize("how", DRAWS)
def test_every_batch_draws_anew_and_two_sweeps_agree(how, memory_limit):
    drawing = networks.Drawing(how)
    model = keras.Sequential(
        [keras.Input((8,)), drawing, layers.BatchNormalization(), layers.BatchNormalization()]
    )
    x = np.zeros((4000, 8), "f")  # All batches are equal but for their noise.
    options = {"batch_size": 100, "memory_limit": memory_limit, "verbose": 0}
    seeds = drawing.seeds.state.numpy(), drawing.generator.state.numpy()
    one = tfbn.collect(model, x, **options)
    two = tfbn.collect(model, x, **options)
    pooled = tfbn.collect(model, x, method="pooled", batch_size=100, verbose=0)
    assert one == two
    first, second = one.values()
    np.testing.assert_allclose(first.mean, 0, atol=0.08)
    np.testing.assert_allclose(first.variance, 1, atol=0.12)
    # The second layer sees the draws that the first one saw.
    np.testing.assert_allclose(second.mean, 0, atol=1e-5)
    np.testing.assert_allclose(second.variance, first.variance / (first.variance + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(next(iter(pooled.values())).variance, first.variance, rtol=1e-5)
    np.testing.assert_array_equal(drawing.seeds.state, seeds[0])
    np.testing.assert_array_equal(drawing.generator.state, seeds[1])


@pytest.mark.parametrize("eager", [False, True])
def test_global_seeds_are_left_alone(eager):
    draws = []
    for sweep in (False, True):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                networks.Drawing("global"),
                networks.Drawing("tensorflow"),
                tfbn.BatchNormalization(),
            ]
        )
        model.run_eagerly = eager
        keras.utils.clear_session()  # Before Keras 3.13 the seed alone leaves its generator be.
        keras.utils.set_random_seed(5)
        if sweep:
            tfbn.collect(model, np.zeros((20, 3), "f"), verbose=0)
        draws.append([keras.random.normal([3]).numpy(), tf.random.normal([3]).numpy()])
    np.testing.assert_array_equal(*draws)


def test_draws_that_cannot_be_made_again_are_refused_only_where_they_would_have_to_be():
    model = keras.Sequential(
        [keras.Input((3,)), networks.Drawing("gamma"), layers.BatchNormalization(), layers.Dense(3)]
    )
    deep = keras.Sequential([model, layers.BatchNormalization()])
    x = np.zeros((2000, 3), "f")
    deep(x[:1])
    with pytest.raises(ValueError, match="drawn again"):
        tfbn.collect(deep, x, memory_limit=0, verbose=0)
    first, _ = tfbn.collect(deep, x, verbose=0).values()
    np.testing.assert_allclose(first.variance, 1, atol=0.3)


def test_random_draws_in_other_batches_of_the_same_data_are_an_error():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            networks.Drawing("generator"),
            layers.BatchNormalization(),
            layers.Dense(4),
        ]
    )
    deep = keras.Sequential([model, layers.BatchNormalization()])
    x = varied(100)
    deep(x[:1])
    shuffled = tf.data.Dataset.from_tensor_slices(x).shuffle(100).batch(10)
    with pytest.raises(ValueError, match="same batches in every pass"):
        tfbn.collect(deep, shuffled, memory_limit=0, verbose=0)
    tfbn.collect(deep, shuffled, verbose=0)


class Dropping(keras.Model):
    """Dropout that is active in inference too, Monte Carlo dropout."""

    def __init__(self):
        super().__init__()
        self.drop = layers.Dropout(0.5, seed=1)
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        """Dropout, then batch norm."""
        return self.bn(self.drop(x, training=True), training=training)


def test_dropout_called_with_training_true():
    model = Dropping()
    x = np.ones((4000, 4), "f")
    model(x[:1])
    seed = model.drop.seed_generator.state.numpy()
    options = {"batch_size": 100, "memory_limit": 0, "verbose": 0}
    [found] = tfbn.collect(model, x, **options).values()
    np.testing.assert_allclose(found.mean, 1, atol=0.1)  # 0 and 2, each half of the time.
    np.testing.assert_allclose(found.variance, 1, atol=0.02)
    [again] = tfbn.collect(model, x, **options).values()
    np.testing.assert_array_equal(found.mean, again.mean)
    np.testing.assert_array_equal(model.drop.seed_generator.state, seed)


# Another thread at work.


def traced_paths(model):
    """The paths of the layers of the traces that a model keeps."""
    _, traces = network._traces[model]
    return {call.site.path for kept in traces.values() for trace in kept for call in trace.calls}


@pytest.mark.slow
def test_another_thread_keeps_its_numbers_and_the_sweep_its_own():
    def build(bn=layers.BatchNormalization):
        return keras.Sequential(
            [keras.Input((6, 4)), layers.GRU(5, return_sequences=True), bn(), layers.Dense(3), bn()]
        )

    model = build()
    x = normal(30, 6, 4, loc=2, scale=3)
    expected = tfbn.collect(model, x, verbose=0)
    alone = model.predict(x, verbose=0), model(x).numpy(), tf.function(model)(x).numpy()
    wrong, rounds, done = [], [], threading.Event()

    def work():
        try:
            while not done.is_set():
                found = model.predict(x, verbose=0), model(x).numpy(), tf.function(model)(x).numpy()
                wrong.extend(i for i in range(3) if not np.allclose(found[i], alone[i], 1e-4, 1e-5))
                rounds.append(1)
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(4):
            model.layers[-1].name = f"last_{number}"  # Another path: the sweep traces anew.
            assert not any(f"last_{number}" in path for path in traced_paths(model))
            stats = tfbn.collect(model, x, verbose=0)
            for one, two in zip(stats.values(), expected.values(), strict=True):
                np.testing.assert_allclose(one.mean, two.mean, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(one.variance, two.variance, rtol=1e-5)
    finally:
        done.set()
        thread.join(120)
    assert not wrong
    assert rounds and not tf.config.functions_run_eagerly()


# NaN that a kernel hides.

HIDDEN_NAN = """
import sys
sys.path.insert(0, sys.argv[1])
import keras, numpy as np, tfbn
from keras import layers
x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("f")
x[5, 2, 2, 1] = np.nan
def refused(first, name, **options):
    parts = first if isinstance(first, list) else [first]
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), *parts, layers.BatchNormalization(name="seen")])
    model.run_eagerly = options.pop("eager", False)
    try:
        tfbn.collect(model, x, batch_size=4, verbose=0, **options)
    except ValueError as error:
        assert "batch 1 " in str(error) and "NaN" in str(error), error
        return
    print("missed", name, options)
for method in ("exact", "pooled", "algorithm2"):
    for kind in (layers.Conv2D, layers.SeparableConv2D):
        for activation in ("relu", "relu6", "elu", "leaky_relu"):
            refused(kind(4, 3, activation=activation), (kind.__name__, activation), method=method)
    refused(layers.Dense(4, activation="relu"), "Dense", method=method)
    refused([layers.Conv2D(4, 3), layers.ReLU(6.0)], "ReLU(6)", method=method)
    for eager in (False, True):
        refused([layers.MaxPooling2D(3)], "max pooling", method=method, eager=eager)
        refused([layers.Conv2D(4, 3, activation="relu"), layers.GlobalMaxPooling2D()], "both",
                method=method, eager=eager)
print("all")
"""


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_nan_behind_a_fused_kernel_is_an_error(method):
    convolution = layers.Conv2D(4, 3, activation="relu")
    model = keras.Sequential([keras.Input((8, 8, 3)), convolution, layers.BatchNormalization()])
    x = normal(12, 8, 8, 3)
    x[5, 2, 2] = np.nan
    with pytest.raises(ValueError, match=r"batch 1 .*NaN"):
        tfbn.collect(model, x, method=method, batch_size=4, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("one_dnn", ["1", "0"])
def test_nan_behind_a_kernel_that_hides_it_is_an_error(one_dnn):
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": one_dnn, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN_NAN, str(HERE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2:] == ["all", ""] and "missed" not in done.stdout, done.stdout


IMPUTERS = {
    "is_nan": lambda x: tf.where(tf.math.is_nan(x), 0.0, x),
    "keras": lambda x: ops.nan_to_num(x),
    "equal": lambda x: tf.where(tf.equal(x, x), x, 0.0),
    "not_equal": lambda x: ops.where(x != x, 0.0, x),
    "is_finite": lambda x: tf.where(tf.math.is_finite(x), x, 0.0),
    "a comparison": lambda x: ops.cast(x > 0, "float32"),
    "buckets": lambda x: layers.Discretization([-1.0, 0.0, 1.0], output_mode="one_hot")(x[:, 0]),
}


@pytest.mark.quick(6)
@pytest.mark.parametrize("how", IMPUTERS)
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_network_that_takes_nan_may_have_it(how, method):
    function = IMPUTERS[how]
    inputs = keras.Input((3,))
    imputed = layers.Lambda(function)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(imputed))
    x = normal(40, 3)
    x[::4, 1] = np.nan
    [found] = tfbn.collect(model, x, method=method, batch_size=16, verbose=0).values()
    entered = np.asarray(keras.Model(inputs, imputed)(x), np.float64)
    np.testing.assert_allclose(found.mean, entered.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.variance, entered.var(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_nan_in_an_input_that_no_batch_norm_layer_reads_is_fine(method):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    outputs = layers.BatchNormalization()(a), layers.Dense(2)(b)
    model = keras.Model({"a": a, "b": b}, outputs)
    x = {"a": normal(20, 3), "b": np.full((20, 3), np.nan, "f")}
    [found] = tfbn.collect(model, x, method=method, verbose=0).values()
    assert_stats(found, x["a"].astype("d").mean(0), x["a"].astype("d").var(0))


# Shards, level by level.


def shards_of(x, count=4):
    """Parts of different sizes, the last of them empty."""
    ends = np.linspace(0, 1, count) ** 2 * len(x)
    return [x[int(a) : int(b)] for a, b in itertools.pairwise(ends)] + [x[:0]]


def test_shards_give_what_one_batch_gives():
    model, x = three_levels(), varied(90)
    generators = [lambda part=part: iter([part]) for part in shards_of(x)[:-1]]
    stats = tfbn.collect_shards(model, generators, load=lambda make: make(), verbose=0)
    assert_exact(stats, three_levels, model, x, rtol=1e-5)
    stats = tfbn.collect_shards(model, shards_of(x), verbose=0)
    assert stats.samples == 90
    assert_exact(stats, three_levels, model, x, rtol=1e-5)


def losing_at(level):
    """A `map` that loses the second shard's result at one level."""
    calls = []

    def lossy(function, items):
        calls.append(1)
        found = list(map(function, items))
        return found[:1] + found[2:] if len(calls) == level else found

    return lossy


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_shard_that_is_lost_at_any_level_is_an_error(level):
    model, x = three_levels(), varied(90)
    with pytest.raises(ValueError, match=r"result for every shard.*shard 1 "):
        tfbn.collect_shards(model, shards_of(x), map=losing_at(level), verbose=0)


@pytest.mark.quick(2)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_shard_that_is_other_data_at_any_level_is_an_error(level):
    model, x = three_levels(), varied(90)
    loads = []

    def load(number):
        loads.append(number)
        part = shards_of(x)[number]
        return part[:-1] if number == 1 and loads.count(1) == level else part

    with pytest.raises(ValueError, match=r"same data at every level.*shard 1 "):
        if level == 1:  # The others then differ from the first.
            tfbn.collect_shards(model, [0, 1, 2], load=load, verbose=0)
        tfbn.collect_shards(model, [0, 1, 2], load=load, verbose=0)


def test_a_result_that_comes_twice_counts_once():
    model, x = three_levels(), varied(90)

    def twice(function, items):
        found = list(map(function, items))
        return found + found[::-1]

    stats = tfbn.collect_shards(model, shards_of(x), map=twice, verbose=0)
    assert stats.samples == 90
    assert_exact(stats, three_levels, model, x, rtol=1e-5)


class Branching(keras.Model):
    """Batch norm layers that long inputs pass in another order, or in greater number."""

    def __init__(self, swaps):
        super().__init__()
        self.one, self.two = layers.BatchNormalization(), layers.BatchNormalization()
        self.swaps = swaps

    def order(self, steps):
        """The layers that an input passes."""
        if steps > 3:
            return [self.one, self.two]
        return [self.two, self.one] if self.swaps else [self.two]

    def call(self, x, training=None):
        """One layer after the other."""
        for layer in self.order(x.shape[1]):
            x = ops.tanh(layer(x, training=training))
        return x


@pytest.mark.quick(2)
@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("short_first", [False, True])
def test_a_layer_whose_level_differs_between_signatures(swaps, shards, short_first):
    model = Branching(swaps)
    x = [normal(30, 3, 2, loc=1), normal(50, 6, 2, loc=-2, scale=2)]
    model(x[0]), model(x[1])
    x = x if short_first else x[::-1]
    collect = tfbn.collect_shards if shards else tfbn.collect
    if swaps:  # Each layer's statistics then depend on the other's.
        with pytest.raises(ValueError, match="exact statistics"):
            collect(model, x if shards else iter(x), verbose=0)
        return
    stats = collect(model, x if shards else iter(x), verbose=0)
    seen = {model.one.name: [], model.two.name: []}
    for part in x:
        value = part.astype("d")
        for layer in model.order(part.shape[1]):
            seen[layer.name].append(value.reshape(-1, 2))
            found = stats[layer.name]
            value = np.tanh((value - found.mean) / np.sqrt(found.variance + layer.epsilon))
    for name, values in seen.items():
        values = np.concatenate(values)
        assert stats[name].count == len(values)
        assert_stats(stats[name], values.mean(0), values.var(0), rtol=1e-4)


# Renorm.


def test_renorm_survives_save_load_and_assign(tmp_path):
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    model.compile("sgd", "mse")
    model.fit(normal(64, 3, loc=2), normal(64, 3), epochs=2, verbose=0)
    before = model.get_weights()
    stats = tfbn.update_population_stats(model, normal(64, 3, loc=-5, scale=3), verbose=0)
    stats.previous.save(tmp_path / "before.npz")
    tfbn.PopulationStats.load(tmp_path / "before.npz").assign(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Batches that are none.


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_data_without_a_batch_axis_is_refused(method):
    images = normal(12, 8, 8, 3)
    model = networks.plain(layers.BatchNormalization)
    unbatched = tf.data.Dataset.from_tensor_slices(images)
    for x in (unbatched, iter(images), tf.data.Dataset.from_tensor_slices((images, np.zeros(12)))):
        with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
            tfbn.collect(model, x, method=method, verbose=0)
    gray = keras.Sequential([keras.Input((8, 8, 1)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(gray, unbatched.map(lambda v: v[..., 0]), method=method, verbose=0)
    vectors = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(
            vectors, tf.data.Dataset.from_tensor_slices(normal(9, 3)), method=method, verbose=0
        )
    two = networks.branching(layers.BatchNormalization)
    single = tf.data.Dataset.from_tensor_slices({"a": normal(9, 5), "b": normal(9, 3)})
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(two, single, method=method, verbose=0)


def test_inputs_that_lack_the_last_axis_of_one_are_taken_as_fit_takes_them():
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    x = normal(20, loc=3)
    [found] = tfbn.collect(
        model, tf.data.Dataset.from_tensor_slices(x).batch(6), verbose=0
    ).values()
    assert found.count == 20
    assert_stats(found, x.astype("d").mean(), x.astype("d").var())


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_batches_is_told_from_several_inputs(kind):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="one array, for a model with one input"):
        tfbn.collect(model, kind([normal(6, 3), normal(6, 3)]), verbose=0)
    a, b = keras.Input((3,)), keras.Input((3,))
    bn = layers.BatchNormalization()
    two = keras.Model([a, b], bn(layers.Add()([a, b])))
    x = [normal(6, 3), normal(6, 3, seed=1)]
    [found] = tfbn.collect(two, kind(x), verbose=0).values()
    assert_stats(found, (x[0].astype("d") + x[1]).mean(0), (x[0].astype("d") + x[1]).var(0))


# Small things that were lost.


@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("eager", [False, True])
def test_losses_of_the_last_call_are_kept(method, eager):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, kernel_regularizer="l2"),
            layers.ActivityRegularization(l1=0.1),
            layers.BatchNormalization(),
        ]
    )
    model.run_eagerly = eager
    x = normal(20, 3)
    model(x, training=True)
    before = [float(loss) for loss in model.losses]
    tfbn.collect(model, x, method=method, verbose=0)
    assert [float(loss) for loss in model.losses] == before and len(before) == 2


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_saved_files_have_the_mode_that_the_umask_leaves(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    stats = tfbn.collect(model, normal(9, 3), verbose=0)
    before = os.umask(0o027)
    try:
        stats.save(tmp_path / "stats.npz")
    finally:
        os.umask(before)
    assert (tmp_path / "stats.npz").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("method", ["exact", "pooled", "algorithm2"])
def test_counts_are_whole_numbers(method):
    model = keras.Sequential(
        [keras.Input((4, 3)), layers.Masking(), layers.BatchNormalization(), layers.Flatten()]
    )
    x = normal(9, 4, 3)
    x[:, 3] = 0
    for layer in tfbn.collect(model, x, method=method, verbose=0).values():
        assert type(layer.count) is int and layer.count == 27


# What users reported.


@pytest.mark.quick(4)
@pytest.mark.parametrize("bn", [tfbn.BatchNormalization, layers.BatchNormalization])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_integers_straight_into_batch_norm(bn, dtype, method):
    inputs = keras.Input((5,), dtype=dtype)
    model = keras.Model(inputs, bn()(bn()(inputs)))
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, (40, 5)).astype(dtype)
    first, second = tfbn.collect(model, x, method=method, batch_size=40, verbose=0).values()
    values = x.astype("d")
    assert_stats(first, values.mean(0), values.var(0))
    np.testing.assert_allclose(second.variance, values.var(0) / (values.var(0) + 1e-3), rtol=1e-4)


class Pretrained(keras.Model):
    """A base that always infers, and a head that trains."""

    def __init__(self):
        super().__init__()
        self.base = keras.Sequential([keras.Input((4,)), layers.Dense(4), bn_of(3.0)])
        self.head = keras.Sequential([keras.Input((4,)), layers.Dense(3), bn_of(0.0)])

    def call(self, x, training=None):
        """The head over the frozen base."""
        return self.head(self.base(x, training=False), training=training)


def bn_of(mean):
    """A layer whose moving mean tells whether it is used."""
    return layers.BatchNormalization(moving_mean_initializer=keras.initializers.Constant(mean))


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_a_layer_that_fit_does_not_train_is_left_alone(method, shards, eager):
    model = Pretrained()
    x = normal(40, 4, loc=1, scale=2)
    model(x)
    model.run_eagerly = eager
    collect = tfbn.collect_shards if shards else tfbn.collect
    stats = collect(model, [x] if shards else x, method=method, batch_size=40, verbose=0)
    base, head = model.base.layers[-1], model.head.layers[-1]
    assert [path.split("/")[-1] for path in stats] == [head.name]
    # As fit: the base's moving averages do not move.
    model.compile("sgd", "mse")
    model.fit(x, normal(40, 3), verbose=0)
    np.testing.assert_array_equal(base.moving_mean, 3.0)
    model2 = Pretrained()
    model2(x)
    model2.set_weights(model.get_weights())
    [found] = collect(
        model2, [x] if shards else x, method=method, batch_size=40, verbose=0
    ).values()
    entered = np.asarray(model2.head.layers[0](model2.base(x, training=False)), np.float64)
    assert_stats(found, entered.mean(0), entered.var(0), rtol=1e-4)
    # And the frozen layer, where it is asked for.
    both = collect(model, [x] if shards else x, method=method, include_frozen=True, verbose=0)
    assert len(both) == 2


def test_a_functional_model_that_fixes_training_is_swept_as_fit_trains_it():
    inputs = keras.Input((4,))
    fixed = bn_of(3.0)
    x = layers.Dense(4)(inputs)
    model = keras.Model(inputs, bn_of(0.0)(fixed(x, training=False)))
    data = normal(40, 4)
    stats = tfbn.collect(model, data, verbose=0)
    model.compile("sgd", "mse")
    model.fit(data, data, verbose=0)
    # Keras 3 has `fit` train it all the same.
    trains = not np.array_equal(fixed.moving_mean, [3.0] * 4)
    assert (fixed.name in stats) == trains and len(stats) == 1 + trains


class OfRagged(keras.Model):
    """Batch norm over the values of a ragged tensor."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 1))

    def call(self, inputs, training=None):
        """Normalised values."""
        return self.bn(tf.cast(inputs.flat_values, tf.float32)[:, None], training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_ragged_last_batch(method):
    rows = [list(range(i % 5 + 1)) for i in range(23)]
    dataset = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(rows, dtype=tf.float32))
    model = OfRagged()
    model(tf.ragged.constant(rows, dtype=tf.float32))
    [found] = tfbn.collect(model, dataset.batch(5), method=method, verbose=0).values()
    values = np.concatenate(rows).astype("d")
    assert found.count == len(values)
    assert_stats(found, values.mean(), values.var())


@pytest.mark.parametrize("memory_limit", [0, 100])
@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_data_may_shuffle_too(kind, memory_limit):
    if kind == "ragged":
        rows = [list(range(i % 5 + 1)) for i in range(23)]
        x, model = tf.ragged.constant(rows, dtype=tf.float32), OfRagged()
        values = np.concatenate(rows)[:, None].astype("d")
    else:
        dense = normal(23, 6) * (np.random.default_rng(1).uniform(size=(23, 6)) < 0.4)
        x, model = tf.sparse.from_dense(dense), OfSparse()
        values = dense.astype("d") @ model.kernel.numpy()
    deep = Deep(model)
    deep(x)
    dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(23).batch(5)
    first, second = tfbn.collect(deep, dataset, memory_limit=memory_limit, verbose=0).values()
    assert first.count == second.count == len(values)
    assert_stats(first, values.mean(0), values.var(0))
    np.testing.assert_allclose(second.variance, values.var(0) / (values.var(0) + 1e-3), rtol=1e-4)


class Deep(keras.Model):
    """Batch norm over what another model gives."""

    def __init__(self, model):
        super().__init__()
        self.model, self.bn = model, layers.BatchNormalization()

    def call(self, x, training=None):
        """Normalised twice."""
        return self.bn(self.model(x, training=training), training=training)


class OfSparse(keras.Model):
    """Batch norm over a product with a sparse tensor."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 2))
        self.kernel = tf.constant(normal(6, 2))

    def call(self, inputs, training=None):
        """Normalised products."""
        return self.bn(tf.sparse.sparse_dense_matmul(inputs, self.kernel), training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_sparse_last_batch(method):
    x = normal(23, 6) * (np.random.default_rng(1).uniform(size=(23, 6)) < 0.4)
    dataset = tf.data.Dataset.from_tensor_slices(tf.sparse.from_dense(x)).batch(5)
    model = OfSparse()
    model(tf.sparse.from_dense(x))
    stats = tfbn.collect(model, dataset, method=method, verbose=0)
    [found] = stats.values()
    values = x.astype("d") @ model.kernel.numpy()
    assert (found.count, stats.samples) == (23, 23)
    assert_stats(found, values.mean(0), values.var(0))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_batch_norm_behind_a_stateful_rnn_is_refused_by_name(method, eager):
    inputs = keras.Input((3, 4), batch_size=10)
    x = layers.GRU(5, stateful=True, name="keeps_its_state")(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    model.run_eagerly = eager
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(ValueError, match="keeps_its_state"):
        tfbn.collect(model, normal(40, 3, 4), method=method, batch_size=10, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stateful_rnn_behind_batch_norm_is_fine():
    inputs = keras.Input((3, 4), batch_size=10)
    outputs = layers.GRU(5, stateful=True)(layers.BatchNormalization()(inputs))
    model = keras.Model(inputs, outputs)
    x = normal(40, 3, 4)
    [found] = tfbn.collect(model, x, batch_size=10, verbose=0).values()
    assert_stats(found, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


# What `fit` takes.


class OfGraphs(keras.Model):
    """One step of message passing, with batch norm over nodes and over edges."""

    def __init__(self):
        super().__init__()
        self.nodes, self.edges = layers.BatchNormalization(), layers.BatchNormalization()
        self.message = layers.Dense(3)

    def call(self, inputs, training=None):
        """Sums of messages, scaled."""
        nodes = self.nodes(inputs["nodes"], training=training)
        sent = self.message(tf.gather(nodes, inputs["edges"][:, 0]))
        sent = self.edges(sent * inputs["scale"], training=training)
        return tf.math.unsorted_segment_sum(sent, inputs["edges"][:, 1], tf.shape(nodes)[0])


def graph_batches(count=6):
    """Graphs of about ten nodes and 25 edges, and a scalar."""
    rng = np.random.default_rng(0)
    for i in range(count):
        edges = rng.integers(0, 10 + i, (25 - i, 2)).astype("int32")
        nodes = rng.normal(i, 1, (10 + i, 3)).astype("f")
        yield {"nodes": nodes, "edges": edges, "scale": np.float32(1 + i / 10)}


@pytest.mark.parametrize("memory_limit", [0, 10**9])
def test_graphs_with_other_numbers_of_nodes_and_edges_and_a_scalar(memory_limit):
    model = OfGraphs()
    parts = list(graph_batches())
    model(parts[0])

    class Repeatable:
        def __iter__(self):
            return iter(parts)

    stats = tfbn.collect(model, Repeatable(), memory_limit=memory_limit, verbose=0)
    nodes = np.concatenate([part["nodes"] for part in parts]).astype("d")
    found = stats[model.nodes.name]
    assert_stats(found, nodes.mean(0), nodes.var(0))
    kernel, bias = (w.numpy().astype("d") for w in model.message.weights)
    sent = []
    for part in parts:
        normed = (part["nodes"] - nodes.mean(0)) / np.sqrt(nodes.var(0) + 1e-3)
        sent.append((normed[part["edges"][:, 0]] @ kernel + bias) * part["scale"])
    sent = np.concatenate(sent)
    assert stats[model.edges.name].count == len(sent)
    assert_stats(stats[model.edges.name], sent.mean(0), sent.var(0))


class Static(keras.Model):
    """A network that reshapes by the size of its batch."""

    def __init__(self, bn=layers.BatchNormalization):
        super().__init__()
        self.first, self.second, self.dense = bn(), bn(), layers.Dense(4)

    def call(self, x, training=None):
        """Two batch norms."""
        x = self.first(x, training=training)
        x = tf.reshape(x, [x.shape[0], 4])
        return self.second(self.dense(ops.relu(x)), training=training)


def static(bn):
    """The same, built."""
    model = Static(bn)
    model(np.zeros((2, 2, 2)))
    return model


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_network_that_uses_the_static_size_of_its_batch(method):
    model = static(layers.BatchNormalization)
    x = normal(41, 2, 2, loc=2)
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(10, drop_remainder=True)
    for source, options, used in (
        (dataset, {}, x[:40]),
        (x, {"batch_size": 10}, x),  # A last batch of one.
    ):
        stats = tfbn.collect(model, source, method=method, verbose=0, **options)
        if method == "exact":
            assert_exact(stats, static, model, used)
        else:
            first, _ = stats.values()
            values = used.astype("d").reshape(-1, 2)
            assert_stats(first, values.mean(0), values.var(0))


def test_two_layers_under_one_mask_without_a_reader_between_them():
    def build(bn=layers.BatchNormalization):
        inputs = keras.Input((6, 3))
        x = layers.Masking()(inputs)
        return keras.Model(inputs, bn()(bn()(x)))

    model = build()
    x = normal(30, 6, 3, loc=2, scale=3)
    kept = np.arange(6) < (np.arange(30) % 6 + 1)[:, None]
    x[~kept] = 0
    for memory_limit in (0, 10**9):
        for batch_size in (4, 30):
            first, second = tfbn.collect(
                model, x, batch_size=batch_size, memory_limit=memory_limit, verbose=0
            ).values()
            values = x[kept].astype("d")
            assert first.count == second.count == len(values)
            assert_stats(first, values.mean(0), values.var(0))
            std = np.sqrt(values.var(0) + 1e-3)
            np.testing.assert_allclose(second.mean, 0, atol=1e-5)
            np.testing.assert_allclose(second.variance, values.var(0) / std**2, rtol=1e-5)


@pytest.mark.slow
def test_no_function_is_traced_again_and_again(caplog):
    model = three_levels()
    for size in range(1, 12):
        tfbn.collect(model, varied(50), batch_size=size, verbose=0)
        fresh = three_levels()
        tfbn.collect(fresh, varied(50), batch_size=size + 10, verbose=0)
    assert not [record for record in caplog.records if "retracing" in record.getMessage()]


def test_pandas_frames():
    pandas = pytest.importorskip("pandas")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    x = normal(23, 3, loc=4)
    [found] = tfbn.collect(model, pandas.DataFrame(x), verbose=0).values()
    assert_stats(found, x.astype("d").mean(0), x.astype("d").var(0))


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    x = normal(23, 3, loc=4)
    [found] = tfbn.collect(model, jax.numpy.asarray(x), verbose=0).values()
    assert_stats(found, x.astype("d").mean(0), x.astype("d").var(0))


def test_torch_loaders():
    torch = pytest.importorskip("torch")
    model = three_levels()
    x = varied(50)
    loader = torch.utils.data.DataLoader(torch.tensor(x), batch_size=8, shuffle=True)
    stats = tfbn.collect(model, loader, memory_limit=0, verbose=0)
    assert_exact(stats, three_levels, model, x, rtol=1e-5)


@pytest.mark.parametrize("memory_limit", [0, 10**9])
def test_grain_loaders(memory_limit):
    grain = pytest.importorskip("grain")
    model = three_levels()
    x = varied(50)
    loader = grain.MapDataset.source(list(x)).shuffle(seed=1).batch(8)
    for source in (loader, loader.to_iter_dataset()):
        stats = tfbn.collect(model, source, memory_limit=memory_limit, verbose=0)
        assert_exact(stats, three_levels, model, x, rtol=1e-5)


class OwnStep(keras.Model):
    """A model with its own training step."""

    def __init__(self, bn=layers.BatchNormalization):
        super().__init__()
        self.dense, self.bn = layers.Dense(3), bn()

    def call(self, x, training=None):
        """Dense and batch norm."""
        return self.bn(self.dense(x), training=training)

    def train_step(self, data):
        """One step."""
        x, _ = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(x, training=True) ** 2)
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


def test_a_model_with_its_own_training_step():
    model = OwnStep()
    x = normal(40, 4, loc=2)
    model(x)
    model.compile("sgd")
    model.fit(x, np.zeros(40), verbose=0)
    [found] = tfbn.collect(model, x, verbose=0).values()
    entered = np.asarray(model.dense(x), "d")
    assert_stats(found, entered.mean(0), entered.var(0), rtol=1e-4)


class Cell(layers.Layer):
    """A recurrent cell with batch norm over its input and its state."""

    def __init__(self, bn=layers.BatchNormalization, **options):
        super().__init__(**options)
        self.state_size = 3
        self.kernel, self.bn = layers.Dense(3), bn()

    def build(self, shape):
        """Both parts."""
        self.kernel.build(shape)
        self.bn.build((None, 3))

    def call(self, x, states, training=None):
        """tanh(bn(W x + h))."""
        h = ops.tanh(self.bn(self.kernel(x) + states[0], training=training))
        return h, [h]


@pytest.mark.parametrize("unroll", [True, False])
def test_batch_norm_in_a_recurrent_cell(unroll):
    model = keras.Sequential([keras.Input((3, 4)), layers.RNN(Cell(), unroll=unroll)])
    x = normal(50, 3, 4, loc=1)
    if not unroll:
        with pytest.raises(ValueError, match="loop that feeds its output back"):
            tfbn.collect(model, x, verbose=0)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # The calls differ.
        [found] = tfbn.collect(model, x, batch_size=7, verbose=0).values()
    cell = model.layers[0].cell
    kernel, bias = (w.numpy().astype("d") for w in cell.kernel.weights)
    h, seen = np.zeros((50, 3)), []
    for i in range(3):
        seen.append(x[:, i].astype("d") @ kernel + bias + h)
        h = np.tanh((seen[-1] - seen[-1].mean(0)) / np.sqrt(seen[-1].var(0) + 1e-3))
    values = np.concatenate(seen)
    assert found.count == 150
    assert_stats(found, values.mean(0), values.var(0), rtol=1e-4)


def test_layers_behind_a_shared_one_are_measured_as_inference_has_them():
    shared, behind = layers.BatchNormalization(name="shared"), layers.BatchNormalization(name="end")
    a, b = keras.Input((3,)), keras.Input((3,))
    outputs = behind(ops.tanh(layers.Concatenate(axis=1)([shared(a), shared(b)])))
    model = keras.Model([a, b], outputs)
    x = [normal(40, 3), normal(40, 3, seed=1, loc=4, scale=3)]
    with pytest.warns(UserWarning, match=r"'shared' is called 2 times.*differ"):
        stats = tfbn.collect(model, x, batch_size=7, verbose=0)
    both = np.concatenate(x).astype("d")
    assert_stats(stats["shared"], both.mean(0), both.var(0))
    normed = [(v - both.mean(0)) / np.sqrt(both.var(0) + 1e-3) for v in x]
    values = np.tanh(np.concatenate(normed, axis=1))
    assert_stats(stats["end"], values.mean(0), values.var(0))


@pytest.mark.slow
def test_clones_copies_and_pickles():
    def build(bn=tfbn.BatchNormalization):
        return networks.plain(bn)

    model = build()
    x = networks.data(model, 20)
    stats = tfbn.update_population_stats(model, x, verbose=0)
    for twin in (
        keras.models.clone_model(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        twin.set_weights(model.get_weights())
        again = tfbn.collect(twin, x, verbose=0)
        for one, two in zip(again.values(), stats.values(), strict=True):
            np.testing.assert_allclose(one.mean, two.mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(one.variance, two.variance, rtol=1e-5)
    for same in (copy.deepcopy(stats), copy.copy(stats), pickle.loads(pickle.dumps(stats))):
        assert same == stats


def test_a_second_sweep_finds_nothing_to_change():
    for build in (networks.residual, networks.nested):
        model = build(layers.BatchNormalization)
        x = networks.data(model, 30)
        stats = tfbn.update_population_stats(model, x, batch_size=4, verbose=0)
        again = tfbn.collect(model, x, batch_size=9, verbose=0)
        for off in again.compare(stats).values():
            assert off["mean_shift_max"] < 1e-5 and off["std_ratio_max"] < 1 + 1e-5


class Rescaling(layers.Layer):
    """Rescales by a statistic of a batch norm layer, as folding for quantization does."""

    def __init__(self, statistic):
        super().__init__()
        self.bn = layers.BatchNormalization(name="read")
        self.statistic = statistic

    def call(self, x, training=None):
        """The normalised inputs, rescaled."""
        return self.bn(x, training=training) * (1 + getattr(self.bn, self.statistic))


class OwnReader(layers.BatchNormalization):
    """A layer that reads its statistic beside the computation that it inherits."""

    def call(self, inputs, training=None, mask=None):
        """The normalised inputs, moved."""
        return super().call(inputs, training=training, mask=mask) + self.moving_mean


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("build", "statistic"),
    [
        (lambda: Rescaling("moving_variance"), "moving_variance of layer '.*read'"),
        (lambda: Rescaling("moving_mean"), "moving_mean of layer '.*read'"),
        (lambda: OwnReader(name="read"), "moving_mean of layer 'read'"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_statistic_that_is_read_past_its_layer_is_an_error(build, statistic, method, eager):
    reads = build()
    model = keras.Sequential([keras.Input((3,)), reads, layers.BatchNormalization(name="behind")])
    model.run_eagerly = eager
    before = [w.copy() for w in model.get_weights()]
    x = 3 * normal(20, 3)
    with pytest.raises(ValueError, match=statistic):
        tfbn.collect(model, x, method=method, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    reads.trainable = False  # It keeps its statistics, so that the others may be found.
    entering = np.asarray(reads(x), "d")
    [found] = tfbn.collect(model, x, method=method, verbose=0).values()
    assert_stats(found, entering.mean(0), entering.var(0))


def test_a_statistic_that_is_read_only_for_the_outputs_is_fine():
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), Rescaling("moving_mean")]
    )
    x = 3 * normal(20, 3)
    first, second = tfbn.collect(model, x, verbose=0).values()
    assert_stats(first, x.astype("d").mean(0), x.astype("d").var(0))
    assert_stats(second, 0, first.variance / (first.variance + 1e-3))
