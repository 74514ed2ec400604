"""Tests of the state of a sweep."""

import dataclasses
import functools
import itertools
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from states import AGAIN, FIRST, LEVELS, SECOND, batch, begun, of, swept, values

import tfbn
from tfbn.stats import moments
from tfbn.sweep.state import NetworkFacts, SweepState


def test_nothing_has_been_swept_at_the_start():
    state = begun()
    assert (state.level, state.complete, state.samples, state.batches) == (1, False, 0, 0)
    assert not state.layers and not state.moments


def test_batches_add_up_and_calls_of_a_layer_are_joined():
    x, y, z = values(3, 0), values(5, 1), values(5, 2)
    one = swept(begun(), [(FIRST, x)])
    two = one.note(NetworkFacts(LEVELS, random=True))
    two = two.add(batch(5, 7), [(FIRST, of(y)), (AGAIN, of(z))])
    assert (one.samples, one.batches, len(one.moments)) == (3, 1, 1)  # Unchanged.
    assert (two.samples, two.batches, two.batch_size, two.random) == (8, 2, 5, True)
    assert (two.data, two.keys) == (7, 207)
    actual = two.next_level().layers["a"]
    both = np.concatenate([x, y, z])
    assert np.all(actual.count == 13)
    np.testing.assert_allclose(actual.mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance(actual), both.var(0), rtol=1e-12)


@settings(max_examples=30)
@given(ends=st.lists(st.integers(0, 12), max_size=4), order=st.randoms(use_true_random=False))
def test_any_shards_merged_in_any_order_are_all_the_data(ends, order):
    x = values(12, 3)
    one = swept(begun(), *([(FIRST, x[i : i + 1])] for i in range(12)))
    bounds = [0, *sorted(ends), 12]
    shards = []
    for start, end in itertools.pairwise(bounds):
        shard = begun()
        for i in range(start, end):
            shard = shard.note(NetworkFacts(LEVELS))
            shard = shard.add(batch(1, i), [(FIRST, of(x[i : i + 1]))])
        shards.append(shard)
    order.shuffle(shards)
    merged = functools.reduce(SweepState.merge, shards)
    assert (merged.samples, merged.data, merged.keys) == (one.samples, one.data, one.keys)
    np.testing.assert_allclose(merged.moments[FIRST].mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance(merged.moments[FIRST]), x.var(0), rtol=1e-12)


def test_a_level_settles_those_before():
    x, y, z = values(4, 0), values(4, 1), values(4, 2)
    second = swept(begun(), [(FIRST, x), (AGAIN, z)]).next_level()
    assert (second.level, second.complete, second.samples, second.moments) == (2, False, 0, {})
    assert second.levels == LEVELS
    done = swept(second, [(SECOND, y)]).next_level()
    assert (done.level, done.complete, done.samples) == (2, True, 4)
    np.testing.assert_allclose(done.layers["a"].mean, np.concatenate([x, z]).mean(0), rtol=1e-12)
    np.testing.assert_allclose(done.layers["b"].mean, y.mean(0), rtol=1e-12)


def test_other_data_at_the_next_level_is_an_error():
    x = values(4, 0)
    second = swept(begun(), [(FIRST, x)]).next_level()
    fewer = second.add(batch(3, 0), [(SECOND, of(x[:3]))])
    with pytest.raises(ValueError, match=r"4 samples then, 3 now"):
        fewer.next_level()
    others = second.add(batch(4, 1), [(SECOND, of(x))])
    with pytest.raises(ValueError, match="same data in every pass"):
        others.next_level()
    random = second.note(NetworkFacts(LEVELS, random=True))
    random = random.add(batch(4, 0)._replace(key=1), [(SECOND, of(x))])
    with pytest.raises(ValueError, match="same batches in every pass"):
        random.next_level()


def test_shards_that_disagree_on_levels_need_passes_over_all():
    one = swept(begun(), [(FIRST, values(4, 0))])
    other = swept(begun(), [(FIRST, values(4, 0))], levels={"a": 2, "b": 1})
    merged = one.merge(other)
    assert merged.turned_uncut(one)
    anew = merged.uncut()
    assert anew.fixed_point and (anew.level, anew.samples, anew.settled) == (1, 0, {})
    assert anew.paths == one.paths


@pytest.mark.parametrize("name", ["method", "fingerprint", "paths", "level", "first", "settled"])
def test_shards_of_other_sweeps_do_not_merge(name):
    other = {
        "method": "pooled",
        "level": 2,
        "settled": {FIRST: of(values(3, 0))},
        "first": (1, 2, 3),
    }
    ours, theirs = begun(), dataclasses.replace(begun(), **{name: other.get(name, ("x",))})
    with pytest.raises(ValueError, match="shards of one sweep"):
        ours.merge(theirs)


def test_every_field_says_how_it_merges():
    for field in dataclasses.fields(SweepState):
        assert callable(field.metadata["merge"]), field.name


BN = [tfbn.BatchNormalization, layers.BatchNormalization]


def test_other_data_in_the_second_pass_is_an_error():
    model = keras.Sequential([keras.Input((3,)), BN[0](), layers.ReLU(), BN[0]()])
    x = networks.data(model, 40)
    lengths = itertools.count(40, -1)

    class Shrinking:
        def __iter__(self):
            return iter([x[: next(lengths)]])

    with pytest.raises(ValueError, match=r"same data in every pass.*\(39 samples then, 38 now\)"):
        tfbn.collect(model, Shrinking(), method="exact", memory_limit=0, verbose=0)


def padded(**options):
    """Return sequences of 1 to 9 steps in shuffled batches, each padded to its longest."""

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


@pytest.mark.quick(2)
@pytest.mark.parametrize("memory_limit", [0, 2_000, 6_000, 10**9])
def test_a_dataset_that_shuffles_anew_in_every_pass(memory_limit):
    model, x = networks.three_levels(), networks.varied()
    dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(400).batch(10)
    stats = tfbn.collect(model, dataset, memory_limit=memory_limit, verbose=0)
    assert [layer.count for layer in stats.values()] == [400] * 3
    networks.assert_exact(stats, networks.three_levels, model, x, rtol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("memory_limit", [0, 2_000, 6_000])
def test_whole_batches_in_another_order(memory_limit):
    model, x = networks.three_levels(), networks.varied()
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(10).shuffle(40)
    stats = tfbn.collect(model, dataset, memory_limit=memory_limit, verbose=0)
    networks.assert_exact(stats, networks.three_levels, model, x, rtol=1e-5)


class Changing(keras.utils.PyDataset):
    """Batches of ten; one sample differs in every pass."""

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
    """Reverse the features in every other pass."""
    return x[:, ::-1] if number % 2 else x


def repeat_a_sample(x, number):
    """Replace one sample by a copy of another."""
    x[number] = x[0]
    return x


def last_bit(x, number):
    """Change the last bits of one value."""
    for _ in range(number):
        x[3, 2] = np.nextafter(x[3, 2], np.float32(1000))
    return x


@pytest.mark.quick(2)
@pytest.mark.parametrize("change", [swap_columns, repeat_a_sample, last_bit])
@pytest.mark.parametrize("memory_limit", [0, 1_000])
def test_other_data_in_a_later_pass_is_an_error_that_names_the_ways_out(change, memory_limit):
    model, x = networks.three_levels(), networks.varied(100)
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
    x = networks.varied()
    reads = []

    def augment(value):
        reads.append(1)
        return value * np.random.default_rng(len(reads)).uniform(0.5, 2, 4).astype("f")

    def augmented():
        dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(400)
        return dataset.map(lambda v: tf.ensure_shape(tf.numpy_function(augment, [v], "float32"), 4))

    model = networks.three_levels()
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
    networks.assert_exact(stats, networks.three_levels, model, np.stack(seen), rtol=1e-5)


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
    x = networks.varied(100)
    deep(x[:1])
    shuffled = tf.data.Dataset.from_tensor_slices(x).shuffle(100).batch(10)
    with pytest.raises(ValueError, match="same batches in every pass"):
        tfbn.collect(deep, shuffled, memory_limit=0, verbose=0)
    # Each way out: the noise adds a variance of 1, and the second layer gets normalized values.
    ordered = tf.data.Dataset.from_tensor_slices(x).batch(10)
    for data, options in [
        (shuffled, {}),
        (ordered, {"memory_limit": 0}),
        (shuffled, {"memory_limit": 0, "method": "pooled"}),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Small batches, one pass.
            first, second = tfbn.collect(deep, data, verbose=0, **options).values()
        np.testing.assert_allclose(first.mean, x.mean(0), atol=0.5)
        np.testing.assert_allclose(first.variance, x.var(0) + 1, rtol=0.5)
        assert second.count == 100 and np.isfinite(second.variance).all()
