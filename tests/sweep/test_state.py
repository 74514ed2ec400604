"""Tests of the state of a sweep."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import AGAIN, FIRST, LEVELS, SECOND, batch, begun, of, swept, values

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
