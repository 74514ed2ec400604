"""Tests of `tfbn.collect_shards`, in this process and in the standard library's process pool."""

import builtins
import concurrent.futures
import itertools
import multiprocessing
import operator
import pickle
import random

import keras
import networks
import numpy as np
import pytest
import shard_workers as work
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfbn

SAMPLES = 24


def cut(x, *ends):
    """Cut data into shards at the given samples."""
    bounds = [0, *ends, len(keras.tree.flatten(x)[0])]
    slices = itertools.starmap(slice, itertools.pairwise(bounds))
    return [keras.tree.map_structure(operator.itemgetter(part), x) for part in slices]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "build",
    [networks.residual, networks.branching, networks.late_input, networks.nested],
)
def test_exact_is_that_of_all_data_whatever_the_shards(build):
    model = build(layers.BatchNormalization)
    x = networks.data(model, SAMPLES)
    stats = tfbn.collect_shards(model, cut(x, 0, 1, 9, 9), batch_size=4, verbose=0)
    networks.assert_statistics(stats, tfbn.collect(model, x, batch_size=8, verbose=0), 1e-6)
    assert (stats.samples, stats.batches, stats.batch_size) == (SAMPLES, 7, 4)
    networks.assert_exact(stats, build, model, x)
    # The result is complete and includes the previous statistics.
    before = tfbn.PopulationStats.read(model)
    assert all(stats.previous[name] == held for name, held in before.items())
    stats.assign(model)
    assert stats.mismatch(model) is None


_small = networks.plain(layers.BatchNormalization)


_x = networks.data(_small, SAMPLES)


@settings(max_examples=8)
@given(ends=st.lists(st.integers(0, SAMPLES), max_size=5), size=st.integers(2, 9))
def test_any_cut_gives_the_same(ends, size):
    stats = tfbn.collect_shards(_small, cut(_x, *sorted(ends)), batch_size=size, verbose=0)
    networks.assert_statistics(stats, tfbn.collect(_small, _x, verbose=0), 1e-6)
    assert stats.samples == SAMPLES


def test_three_numbers_a_channel_go_to_a_shard_and_ten_come_back(tmp_path):
    channels = 400
    block = [layers.BatchNormalization(), layers.ReLU()]
    model = keras.Sequential([keras.Input((channels,)), *block, layers.BatchNormalization()])
    model.save(tmp_path / "model.keras")
    sent, returned = [], []

    def counting(function, items):
        for item in items:
            sent.append(len(pickle.dumps(function)))
            result = function(item)
            returned.append(len(pickle.dumps(result)))
            yield result

    x = np.random.default_rng(0).normal(3, 2, (12, channels)).astype("float32")
    path = str(tmp_path / "model.keras")
    stats = tfbn.collect_shards(path, cut(x, 6), map=counting, verbose=0)
    assert np.isfinite([layer.mean_error for layer in stats.values()]).all()
    first, second = sent[0], sent[2]
    assert 3 * 8 * channels < second - first < 3.2 * 8 * channels
    assert all(10 * 8 * channels < size < 11 * 8 * channels for size in returned)


@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
def test_one_pass_methods_for_the_same_batches(method):
    stats = tfbn.collect_shards(_small, cut(_x, 8, 8, 20), method=method, batch_size=4, verbose=0)
    expected = tfbn.collect(_small, _x, method=method, batch_size=4, verbose=0)
    networks.assert_statistics(stats, expected, 1e-12)
    assert (stats.samples, stats.batches) == (expected.samples, expected.batches)


@pytest.mark.quick(2)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", [networks.Looped, networks.Cell])
def test_networks_that_need_whole_passes(kind, eager):
    keras.utils.set_random_seed(0)
    model = kind()
    x = np.random.default_rng(0).normal(3, 2, size=(SAMPLES, 3, 4)).astype("float32")
    model(x)
    model.compile(run_eagerly=eager)
    expected = tfbn.collect(model, x, verbose=0)
    # The first shard is empty, so it does not reveal that the network cannot be cut.
    stats = tfbn.collect_shards(model, cut(x, 0, 10, 17), batch_size=5, verbose=0)
    networks.assert_statistics(stats, expected, 1e-5 if kind is networks.Cell else 1e-6)
    if kind is networks.Looped:
        np.testing.assert_allclose(stats[model.first.name].mean, x.mean((0, 1)), rtol=1e-5)


class PartlyFrozen(keras.Model):
    """Calls its second layer with training=False in every mode."""

    def __init__(self):
        super().__init__()
        self.one, self.two = layers.BatchNormalization(), layers.BatchNormalization()
        self.three = layers.BatchNormalization()

    def call(self, inputs, training=None):
        x = self.two(self.one(inputs, training=training), training=False)
        return self.three(x, training=training)


@pytest.mark.parametrize("eager", [False, True])
def test_layers_that_are_frozen_by_call_are_left_alone(eager):
    model = PartlyFrozen()
    x = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype("float32")
    model(x)
    model.compile(run_eagerly=eager)
    stats = tfbn.collect_shards(model, cut(x, 0, 10), verbose=0)
    assert list(stats) == [model.one.name, model.three.name]
    networks.assert_statistics(stats, tfbn.collect(model, x, verbose=0), 1e-6)
    every = tfbn.collect_shards(model, cut(x, 0, 10), include_frozen=True, verbose=0)
    assert len(every) == 3


@pytest.mark.parametrize("kind", ["generator", "dataset", "pairs"])
def test_load_may_give_whatever_fit_takes(kind):
    kinds = {
        "generator": lambda x: (x[i : i + 5] for i in range(0, len(x), 5)),
        "dataset": lambda x: tf.data.Dataset.from_tensor_slices(x).batch(5),
        "pairs": lambda x: tf.data.Dataset.from_tensor_slices((x, range(len(x)))).batch(5),
    }
    stats = tfbn.collect_shards(_small, cut(_x, 10, 10), load=kinds[kind], verbose=0)
    networks.assert_statistics(stats, tfbn.collect(_small, _x, verbose=0), 1e-6)


def test_steps_are_those_of_every_shard():
    stats = tfbn.collect_shards(
        _small,
        [0, 1],
        load=lambda seed: tf.data.Dataset.from_tensors(_x[seed : seed + 3]).repeat(),
        steps=2,
        method="pooled",
        verbose=0,
    )
    assert (stats.samples, stats.batches) == (12, 4)


def two_layers_behind_noise(how):
    """Build noise of standard deviation 1 in inference, then two batch norm layers."""
    bn = [layers.BatchNormalization(), layers.BatchNormalization()]
    return keras.Sequential([keras.Input((8,)), networks.Drawing(how), *bn])


@pytest.mark.parametrize("how", ["generator", "tensorflow", "tf generator"])
def test_equal_batches_of_different_shards_draw_their_own_numbers(how):
    model = two_layers_behind_noise(how)
    shards = [np.zeros((20, 8), "f") for _ in range(100)]
    stats = tfbn.collect_shards(model, shards, batch_size=10, verbose=0)
    first, second = stats.values()
    # 2,000 draws per channel: a standard error of 0.022.
    np.testing.assert_allclose(first.mean, 0, atol=0.1)
    np.testing.assert_allclose(first.variance, 1, atol=0.15)
    assert np.all(first.mean_error > 0.01)
    # All passes and sweeps use the same draws.
    networks.assert_layer(second, 0, first.variance / (first.variance + 1e-3))
    assert tfbn.collect_shards(model, shards, batch_size=10, verbose=0, map=shuffled) == stats


def test_equal_batches_of_a_sampled_shard_draw_their_own_numbers_in_every_round():
    model = two_layers_behind_noise("generator")
    shards = [np.zeros((4000, 8), "f")] * 2
    stats = tfbn.collect_shards(model, shards, batch_size=4, tolerance=0.04, verbose=0)
    first, _ = stats.values()
    assert 300 < first.count < 8000
    np.testing.assert_allclose(first.mean, 0, atol=0.16)
    assert np.all(first.mean_error > 0.5 / np.sqrt(first.count))


@pytest.mark.parametrize("order", sorted(set(itertools.permutations([0, 0, 10, 14]))))
def test_empty_shards_in_any_place(order):
    model = PartlyFrozen()
    x = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype("float32")
    model(x)
    ends = list(itertools.accumulate(order))[:-1]
    stats = tfbn.collect_shards(model, cut(x, *ends), verbose=0)
    assert list(stats) == [model.one.name, model.three.name]
    networks.assert_statistics(stats, tfbn.collect(model, x, verbose=0), 1e-6)


def shuffled(function, items):
    """A map that returns its results in random order."""
    results = list(builtins.map(function, items))
    random.shuffle(results)
    return results


def twice(function, items):
    """A map that runs some tasks twice."""
    return builtins.map(function, [*items, *items[::2]])


def in_threads(function, items):
    """A map that works on several items at once, in this process."""
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        return list(threads.map(function, items))


@pytest.mark.parametrize("method", ["exact", "pooled"])
@pytest.mark.parametrize("any_map", [shuffled, twice, in_threads])
def test_any_order_any_repetition_to_the_bit(any_map, method):
    options = {"method": method, "batch_size": 4, "verbose": 0}
    expected = tfbn.collect_shards(_small, cut(_x, 7, 13, 20), **options)
    stats = tfbn.collect_shards(_small, cut(_x, 7, 13, 20), map=any_map, **options)
    networks.assert_statistics(stats, expected, 0)
    assert (stats.samples, stats.batches) == (SAMPLES, expected.batches)


def test_only_the_moments_of_one_level_come_back():
    width, sizes = 3000, []
    model = keras.Sequential(
        [keras.Input((3,))]
        + [
            layer
            for _ in range(3)
            for layer in (layers.Dense(width), layers.BatchNormalization(), layers.Dense(3))
        ]
    )

    def weighed(function, items):
        for number, content in builtins.map(function, items):
            sizes.append(len(content))
            yield number, content

    x = np.random.default_rng(0).normal(size=(SAMPLES, 3)).astype("float32")
    tfbn.collect_shards(model, cut(x, 10), map=weighed, verbose=0)
    assert len(sizes) == 6  # Two shards at three levels.
    assert max(sizes) < 10 * 8 * width + 3000  # Ten numbers per channel.


def test_one_progress_bar(capsys):
    tfbn.collect_shards(_small, cut(_x, 8, 16))
    out = capsys.readouterr().out
    assert out.count("Population statistics, exact") == 1
    assert out.count("\n") == 2 and "9/9" in out


@pytest.fixture(autouse=True)
def untouched():
    """Require that the model does not change."""
    before = [weight.copy() for weight in _small.get_weights()]
    yield
    for held, now in zip(before, _small.get_weights(), strict=True):
        np.testing.assert_array_equal(held, now)


def test_a_lost_result_is_named():
    def losing(function, items):
        return list(builtins.map(function, items))[:-1]

    with pytest.raises(ValueError, match=r"a result for every shard.*none for shard 2 \('c'\)"):
        tfbn.collect_shards(
            _small, "abc", map=losing, load=lambda name: _x["abc".index(name) :][:3], verbose=0
        )


@pytest.mark.parametrize("shape", ["levels", "whole passes"])
def test_a_shard_that_changes_between_levels_is_named(shape):
    calls = []
    model, x = _small, _x
    if shape == "whole passes":
        model = networks.Looped()
        x = np.random.default_rng(0).normal(size=(SAMPLES, 3, 4)).astype("float32")
        model(x)

    def load(number):
        calls.append(number)
        part = x[number * 8 :][:8]
        return part + (1 if number == 1 and calls.count(1) > 2 - (model is _small) else 0)

    with pytest.raises(ValueError, match=r"same data at every level.*shard 1 \(1\), which had 8 s"):
        tfbn.collect_shards(model, range(3), load=load, verbose=0)


def test_what_two_shards_swap_between_levels_is_no_change_of_the_data_but_named_all_the_same():
    order, calls = [0, 1], []

    def load(number):
        calls.append(number)
        if len(calls) == 3:
            order.reverse()
        return _x[order[number] * 12 :][:12]

    with pytest.raises(ValueError, match="shard 0"):
        tfbn.collect_shards(_small, range(2), load=load, verbose=0)


@pytest.mark.slow
def test_a_missing_file_is_named(pool, tmp_path):
    _small.save(tmp_path / "model.keras")
    shards = work.in_file(tmp_path, _x, 10)
    shards.append((str(tmp_path / "none.npy"), 0, 3))
    with pytest.raises(RuntimeError, match=r"shard 2 .*FileNotFoundError.*none\.npy"):
        tfbn.collect_shards(
            tmp_path / "model.keras", shards, map=pool.map, load=work.slice_of, verbose=0
        )


def test_bad_data_names_the_shard():
    bad = _x.copy()
    bad[15, 2, 2] = np.nan
    with pytest.raises(
        RuntimeError, match=r"(?s)from shard 1 \(.*Error: Expected finite values .* in batch 1 \(c"
    ):
        tfbn.collect_shards(_small, cut(bad, 10), batch_size=4, verbose=0)


@pytest.mark.parametrize("shards", [[], [_x[:0]], [_x[:0]] * 3])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_no_data(shards, method):
    with pytest.raises(ValueError, match="at least one batch"):
        tfbn.collect_shards(_small, shards, method=method, verbose=0)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("missing.keras", {}, "'missing.keras', which does not exist"),
        (3, {}, r"the path of a \.keras file, or a function"),
        (lambda: 3, {}, "Expected a Keras model. Received: 3"),
        (_small, {"method": "fast"}, "method to be one of"),
        (_small, {"batch_size": 0}, "batch_size to be an integer >= 1"),
        (_small, {"steps": -1}, "steps to be an integer >= 1"),
    ],
)
def test_bad_arguments_get_one_clear_error(model, options, message):
    with pytest.raises(ValueError, match=message):
        tfbn.collect_shards(model, [_x], verbose=0, **options)


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_sweeps(pool, tmp_path):  # Last: it ends the pool.
    _small.save(tmp_path / "model.keras")
    shards = work.in_file(tmp_path, _x, 8, 8, 16)
    deadly = work.Deadly(tmp_path / "log", 4, shards[-1])
    deaths = []

    def again(function, items):
        """Run the remaining tasks in another pool if a worker dies, which breaks the pool."""
        left = dict(items)
        for one in itertools.cycle(pools):
            try:
                for number, content in one.map(function, left.items()):
                    del left[number]
                    yield number, content
                return
            except concurrent.futures.process.BrokenProcessPool:
                deaths.append(len(left))

    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as fresh:
        pools = [pool, fresh]
        options = {"load": deadly, "verbose": 0}
        stats = tfbn.collect_shards(tmp_path / "model.keras", shards, map=again, **options)
        assert len(deaths) >= 1
        networks.assert_statistics(stats, tfbn.collect(_small, _x, verbose=0), 1e-6)
        assert stats.samples == SAMPLES
        with pytest.raises(concurrent.futures.process.BrokenProcessPool):
            tfbn.collect_shards(tmp_path / "model.keras", shards, map=pool.map, **options)


def shards_of(x, count=4):
    """Cut data into parts of different sizes; the last is empty."""
    ends = np.linspace(0, 1, count) ** 2 * len(x)
    return [x[int(a) : int(b)] for a, b in itertools.pairwise(ends)] + [x[:0]]


def losing_at(level):
    """Return a `map` that loses the result of the second shard at one level."""
    calls = []

    def lossy(function, items):
        calls.append(1)
        actual = list(map(function, items))
        return actual[:1] + actual[2:] if len(calls) == level else actual

    return lossy


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_shard_that_is_lost_at_any_level_is_an_error(level):
    model, x = networks.three_levels(), networks.varied(90)
    with pytest.raises(ValueError, match=r"result for every shard.*shard 1 "):
        tfbn.collect_shards(model, shards_of(x), map=losing_at(level), verbose=0)


@pytest.mark.quick(2)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_shard_that_is_other_data_at_any_level_is_an_error(level):
    model, x = networks.three_levels(), networks.varied(90)
    loads = []

    def load(number):
        loads.append(number)
        part = shards_of(x)[number]
        return part[:-1] if number == 1 and loads.count(1) == level else part

    with pytest.raises(ValueError, match=r"same data at every level.*shard 1 "):
        if level == 1:  # The others then differ from the first.
            tfbn.collect_shards(model, [0, 1, 2], load=load, verbose=0)
        tfbn.collect_shards(model, [0, 1, 2], load=load, verbose=0)
