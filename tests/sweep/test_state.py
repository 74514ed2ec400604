"""Tests of the accumulator of a sweep."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfbn
from tfbn.stats import moments
from tfbn.sweep import state_bytes
from tfbn.sweep.batches import Batch
from tfbn.sweep.state import Site, SweepState

FIRST, AGAIN, SECOND = Site("a", 0), Site("a", 1), Site("b", 0)
LEVELS = {"a": 1, "b": 2}


@pytest.fixture
def model():
    """Two batch norm layers, a and b."""
    bns = [layers.BatchNormalization(name=name) for name in "ab"]
    return keras.Sequential([keras.Input((2,)), *bns])


def begun(**options):
    """The state at the beginning of a sweep."""
    return SweepState("exact", "weights", ("a", "b"), **options)


def of(values):
    """The moments of some values, by NumPy."""
    count = np.full(values.shape[1], float(len(values)))
    return moments.of_values(count, values.mean(0), values.var(0) * count)


def values(n, seed):
    """Values of two channels."""
    return np.random.default_rng(seed).normal(seed, 2, size=(n, 2))


def batch(size, number=0):
    """A batch whose digests are its number."""
    return Batch(number, None, size, number, number + 100)


def swept(state, *batches, levels=LEVELS):
    """A state after batches of (site, values)."""
    for number, found in enumerate(batches):
        size = len(found[0][1])
        sites = [(site, of(entered)) for site, entered in found]
        state = state.add(batch(size, number), sites, levels, False)
    return state


def test_nothing_has_been_swept_at_the_start():
    state = begun()
    assert (state.level, state.complete, state.samples, state.batches) == (1, False, 0, 0)
    assert not state.layers and not state.moments


def test_batches_add_up_and_calls_of_a_layer_are_joined():
    x, y, z = values(3, 0), values(5, 1), values(5, 2)
    one = swept(begun(), [(FIRST, x)])
    two = one.add(batch(5, 7), [(FIRST, of(y)), (AGAIN, of(z))], LEVELS, True)
    assert (one.samples, one.batches, len(one.moments)) == (3, 1, 1)  # It is as it was.
    assert (two.samples, two.batches, two.batch_size, two.random) == (8, 2, 5, True)
    assert (two.data, two.keys) == (7, 207)
    found = two.next_level().layers["a"]
    both = np.concatenate([x, y, z])
    assert np.all(found.count == 13)
    np.testing.assert_allclose(found.mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance(found), both.var(0), rtol=1e-12)


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
            shard = shard.add(batch(1, i), [(FIRST, of(x[i : i + 1]))], LEVELS, False)
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
    fewer = second.add(batch(3, 0), [(SECOND, of(x[:3]))], LEVELS, False)
    with pytest.raises(ValueError, match=r"4 samples then, 3 now"):
        fewer.next_level()
    others = second.add(batch(4, 1), [(SECOND, of(x))], LEVELS, False)
    with pytest.raises(ValueError, match="same data in every pass"):
        others.next_level()
    random = second.add(batch(4, 0)._replace(key=1), [(SECOND, of(x))], LEVELS, True)
    with pytest.raises(ValueError, match="same batches in every pass"):
        random.next_level()


@pytest.mark.parametrize(
    ("found", "settled"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 1e-7), True),
        (lambda x: x + np.array([0, 0.01]), False),
        (lambda x: x.mean(0) + 1.01 * (x - x.mean(0)), False),
        (lambda x: x * [0, 1], False),
    ],
)
def test_whole_passes_go_on_until_nothing_moves(found, settled):
    x = values(50, 1)
    state = swept(begun(whole=True), [(FIRST, x), (SECOND, x)], levels={}).next_level()
    assert not state.complete
    state = swept(state, [(FIRST, x), (SECOND, found(x))], levels={}).next_level()
    assert state.complete is settled


def test_whole_passes_that_never_settle_are_an_error():
    x = values(50, 1)
    state = begun(whole=True)
    with pytest.raises(ValueError, match=r"'b'.*loop that feeds"):
        for number in range(9):
            state = swept(state, [(FIRST, x), (SECOND, x + number)], levels={}).next_level()
    assert state.level >= 3  # As many passes as calls have to pass.


def test_a_constant_channel_settles_but_for_rounding():
    x = np.full((4, 2), 1 / 3)
    state = swept(begun(whole=True), [(FIRST, x)], levels={}).next_level()
    assert swept(state, [(FIRST, x * (1 + 1e-9))], levels={}).next_level().complete
    assert not swept(state, [(FIRST, x + 0.1)], levels={}).next_level().complete


def test_shards_that_disagree_on_levels_need_whole_passes():
    one = swept(begun(), [(FIRST, values(4, 0))])
    other = swept(begun(), [(FIRST, values(4, 0))], levels={"a": 2, "b": 1})
    merged = one.merge(other)
    assert merged.whole and not one.whole
    anew = merged.whole_passes()
    assert anew.whole and (anew.level, anew.samples, anew.settled) == (1, 0, {})
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


def test_bytes_and_back():
    state = swept(begun(), [(FIRST, values(4, 0)), (AGAIN, values(4, 1))]).next_level()
    state = swept(state, [(SECOND, values(4, 2))])
    back = state_bytes.unpack(state_bytes.pack(state))
    for field in dataclasses.fields(SweepState):
        ours, theirs = getattr(state, field.name), getattr(back, field.name)
        if field.name in ("settled", "moments"):
            assert ours.keys() == theirs.keys()
            for site in ours:
                np.testing.assert_array_equal(ours[site].rows, theirs[site].rows)
        else:
            assert ours == theirs, field.name
    with pytest.raises(ValueError):
        state_bytes.unpack(state_bytes.pack(state)[:-9])
    with pytest.raises(ValueError, match="state of a sweep"):
        state_bytes.unpack(tfbn.PopulationStats({}, method="exact").to_bytes())


def test_what_is_finished_holds_every_layer_that_inference_calls(model):
    previous = tfbn.PopulationStats.read(model)
    x = values(4, 0)
    one_level = {"a": 1, "b": 1}
    done = swept(begun(), [(SECOND, x), (FIRST, x)], levels=one_level).next_level()
    stats = done.finish(model, previous)
    assert list(stats) == ["a", "b"] and stats.previous is previous
    np.testing.assert_allclose(stats["a"].variance, x.var(0), rtol=1e-12)
    lacking = swept(begun(), [(FIRST, x)], levels=one_level).next_level()
    stats = lacking.finish(model, previous)
    assert list(stats) == list(stats.previous) == ["a"]
    with pytest.raises(ValueError, match="does not call a, b"):
        begun().add(batch(4), [], one_level, False).next_level().finish(model, previous)
    none = moments.of_values(*np.zeros((3, 2)))
    masked = begun().add(batch(4), [(FIRST, of(x)), (SECOND, none)], one_level, False)
    with pytest.raises(ValueError, match="values for layer 'b'"):
        masked.next_level().finish(model, previous)


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
    for data, options in advice:
        first, second = tfbn.collect(model, data, verbose=0, **options).values()
        np.testing.assert_allclose(first.mean, x.mean(0), rtol=1e-5)
        assert first.count == second.count == len(x)


def test_the_callback_has_a_memory_limit():
    model = keras.Sequential(
        [
            keras.Input((None, 2)),
            keras.layers.Masking(),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
        ]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((8, 3, 2), "float32"), np.zeros((8, 3, 3), "float32")
    callback = tfbn.PopulationStatsCallback(padded(), memory_limit=0)
    with pytest.raises(ValueError, match="Raise `memory_limit`"):
        model.fit(x, y, callbacks=[callback], verbose=0)
    callback = tfbn.PopulationStatsCallback(padded(), memory_limit=2**20)
    model.fit(x, y, callbacks=[callback], verbose=0)
    assert callback.stats.samples == 40
