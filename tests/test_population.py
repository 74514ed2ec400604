"""Tests of `tfbn.PopulationStats`."""

import json
import re

import keras
import networks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import layers

import tfbn
from tfbn import population as module
from tfbn.layer import sweep_records


@pytest.fixture
def model():
    """A network with three batch norm layers."""
    return networks.plain(layers.BatchNormalization)


@pytest.fixture
def stats(model):
    """Its population statistics, made up."""
    return made_up(model, seed=0)


def made_up(model, seed):
    """Statistics of the right shapes."""
    rng = np.random.default_rng(seed)
    before = tfbn.PopulationStats.read(model)
    actual = {
        path: tfbn.LayerStats(
            100, rng.normal(size=s.mean.shape), rng.uniform(0.1, 2, size=s.mean.shape)
        )
        for path, s in before.items()
    }
    return tfbn.PopulationStats(
        actual,
        method="pooled",
        samples=10,
        batches=2,
        batch_size=5,
        fingerprint=before.fingerprint,
        previous=before,
    )


def weights(model):
    """All weights."""
    return [np.array(w) for w in model.get_weights()]


def test_assign_sets_the_layers_and_undoes_to_the_bit(model, stats):
    networks.batch_norms(model)[0].moving_mean.assign([0.1, 1e-30, -3e20, 1 / 3])
    before = weights(model)
    previous = stats.assign(model)
    for bn, expected in zip(networks.batch_norms(model), stats.values(), strict=True):
        np.testing.assert_array_equal(bn.moving_mean, expected.mean.astype("float32"))
        np.testing.assert_array_equal(bn.moving_variance, expected.variance.astype("float32"))
    again = previous.assign(model)
    networks.assert_same(before, weights(model))
    assert again.method == previous.method == "assigned"


def assigned(model):
    """The statistics assigned to the layers of a model, each once."""
    known = [sweep_records.get(bn) for bn in networks.batch_norms(model)]
    return list({id(origin.stats): origin.stats for origin in known if origin}.values())


def test_assign_knows_what_it_put_where(model, stats):
    assert not assigned(model)
    previous = stats.assign(model)
    assert assigned(model) == [stats]
    assert stats.mismatch(model) is None
    bn = networks.batch_norms(model)[1]
    held = bn.moving_mean.numpy()
    bn.moving_mean.assign(held + 1)
    assert f"moving_mean of layer '{bn.name}'" in stats.mismatch(model)
    bn.moving_mean.assign(held)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    assert "weights have changed" in stats.mismatch(model)
    previous.assign(model)
    assert not assigned(model)


def test_assign_refuses_another_model_and_names_the_first_difference(stats):
    last = list(stats)[-1]
    one = keras.Sequential([keras.Input((4,)), *map(layer_named, list(stats)[:-1])])
    before = weights(one)
    with pytest.raises(ValueError, match=f"no batch norm layer '{last}'"):
        stats.assign(one)
    networks.assert_same(before, weights(one))
    wide = keras.Sequential([keras.Input((7,)), *map(layer_named, stats)])
    before = weights(wide)
    with pytest.raises(ValueError, match=r"shape \(7,\) for layer.*Received: shape \(4,\)"):
        stats.assign(wide)
    networks.assert_same(before, weights(wide))


def layer_named(name):
    """A batch norm layer of that name."""
    return layers.BatchNormalization(name=name)


def spoiled(stats, name, value):
    """The same with one number changed, in channel 1 of the last layer."""
    path = list(stats)[-1]
    parts = {"mean": stats[path].mean.copy(), "variance": stats[path].variance.copy()}
    parts[name][1] = value
    layers = {**stats, path: tfbn.LayerStats(stats[path].counts, **parts)}
    return path, tfbn.PopulationStats(layers, method=stats.method)


IMPOSSIBLE = [
    ("mean", np.nan),
    ("mean", -np.inf),
    ("variance", np.nan),
    ("variance", np.inf),
    ("variance", -1.0),
    ("variance", -1e-300),
]


@pytest.mark.quick(7)
@pytest.mark.parametrize("method", ["exact", "pooled", "algorithm2"])
@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_assign_and_merge_refuse_what_no_data_has(model, stats, method, name, value):
    stats = tfbn.PopulationStats(stats, method=method)
    path, bad = spoiled(stats, name, value)
    says = rf"Received: {name} {re.escape(str(value))} in channel 1 of layer '{path}'"
    before = weights(model)
    with pytest.raises(ValueError, match=says):
        bad.assign(model)
    networks.assert_same(before, weights(model))
    assert not assigned(model)
    if method != "exact":
        for a, b in ((bad, stats), (stats, bad)):
            with pytest.raises(ValueError, match=says):
                a.merge(b)


@pytest.mark.parametrize(("name", "value"), [("mean", -1e39), ("variance", 1e39)])
def test_assign_refuses_what_the_variable_cannot_hold(model, stats, name, value):
    path, bad = spoiled(stats, name, value)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"float32.*'{path}'.*moving_{name}.*channel 1"):
        bad.assign(model)
    networks.assert_same(before, weights(model))


def test_assign_refuses_a_layer_without_values(model, stats):
    path = next(iter(stats))
    layers = {**stats, path: tfbn.LayerStats(0, stats[path].mean, stats[path].variance)}
    before = weights(model)
    with pytest.raises(ValueError, match=rf"'{path}'. Received: none or masked ones"):
        tfbn.PopulationStats(layers, method="pooled").assign(model)
    networks.assert_same(before, weights(model))


def test_a_broken_model_is_read_and_put_back_to_the_bit(model, stats):
    bn = networks.batch_norms(model)[0]
    bn.moving_mean.assign([np.nan, np.inf, -0.0, 1e-45])
    bn.moving_variance.assign([-1.0, np.nan, 0.0, -np.inf])
    before = weights(model)
    held = tfbn.PopulationStats.read(model)
    previous = stats.assign(model)
    assert previous == held and held != stats
    held.summary(print_fn=lambda line: None)
    previous.assign(model)
    for a, b in zip(before, weights(model), strict=True):
        assert a.tobytes() == b.tobytes()


def test_assign_hashes_no_weights(model, stats, monkeypatch):
    monkeypatch.setattr(module.fingerprints, "fingerprint", lambda model: pytest.fail("hashed"))
    assert stats.assign(model).fingerprint == ""
    assert tfbn.PopulationStats.read(model, fingerprint=False).fingerprint == ""
    monkeypatch.undo()
    assert tfbn.PopulationStats.read(model).fingerprint == stats.fingerprint != ""
    assert stats.mismatch(model) is None
    unknown = tfbn.PopulationStats(stats, method="pooled")
    assert "not known" in unknown.mismatch(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", range(6))
def test_an_interrupted_assign_puts_everything_back(model, stats, fails_at, error, monkeypatch):
    earlier = made_up(model, seed=1)
    earlier.assign(model)
    before = weights(model)
    calls = []
    variable = type(networks.batch_norms(model)[0].moving_mean)
    original = variable.assign

    def assign(self, value):
        calls.append(self)
        if len(calls) == fails_at + 1:
            raise error("stop")
        return original(self, value)

    monkeypatch.setattr(variable, "assign", assign)
    with pytest.raises(error, match="stop"):
        stats.assign(model)
    monkeypatch.undo()
    assert len(calls) > fails_at
    networks.assert_same(before, weights(model))
    assert assigned(model) == [earlier]


def part_of(values, method):
    """The statistics of one batch, by NumPy; of zeros if it has no values."""
    n = len(values)
    ddof = 1 if method == "algorithm2" else 0
    mean = values.mean(0) if n else np.zeros(2)
    variance = values.var(0, ddof=ddof) if n else np.zeros(2)
    layer = tfbn.LayerStats(n, mean, variance)
    return tfbn.PopulationStats(
        {"bn": layer}, method=method, samples=n, batches=int(n > 0), batch_size=n
    )


@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
@given(
    st.lists(
        st.sampled_from([0, 2, 3, 9]).flatmap(
            lambda n: arrays(np.float64, (n, 2), elements=st.floats(-1e3, 1e3))
        ),
        min_size=3,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_shards_merge_in_any_order_and_grouping(method, shards, random):
    parts = [part_of(values, method) for values in shards]
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    [total] = parts
    values = np.concatenate(shards)
    assert total.samples == total["bn"].count == len(values)
    assert total.batches == sum(len(shard) > 0 for shard in shards)
    assert total.batch_size == max(map(len, shards))
    if len(values):
        variance = values.var(0)
        if method == "algorithm2":
            share = np.array([len(shard) for shard in shards if len(shard)]) / len(values)
            variance = share @ [shard.var(0, ddof=1) for shard in shards if len(shard)]
        np.testing.assert_allclose(total["bn"].mean, values.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(total["bn"].variance, variance, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
@pytest.mark.parametrize("mean", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("variance", [np.nan, np.inf, -1.0])
def test_an_empty_part_changes_nothing_whatever_it_holds(method, mean, variance):
    part = part_of(np.array([[0.1, 2], [3, 1 / 3], [0.7, 5]]), method)
    empty = tfbn.LayerStats(0, np.full(2, mean), np.full(2, variance))
    empty = tfbn.PopulationStats({"bn": empty}, method=method)
    assert part.merge(empty) == empty.merge(part) == part
    assert empty.merge(empty)["bn"].count == 0


@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
def test_an_empty_part_changes_no_bit(method):
    rng = np.random.default_rng(0)
    held = tfbn.LayerStats(7, rng.normal(size=1000), rng.uniform(size=1000))
    part = tfbn.PopulationStats({"bn": held}, method=method)
    empty = tfbn.LayerStats(0, np.zeros(1000), np.zeros(1000))
    empty = tfbn.PopulationStats({"bn": empty}, method=method)
    assert part.merge(empty) == empty.merge(part) == part


def test_counts_that_differ_between_channels_are_merged():
    # A mask may differ between channels that are not on the last axis.
    rng = np.random.default_rng(0)
    shards = [[rng.normal(size=n) for n in counts] for counts in ((3, 5, 2), (4, 1, 0))]
    parts = []
    for shard in shards:
        counts = np.array([len(values) for values in shard])
        mean, variance = (
            np.array([f(values) if len(values) else np.nan for values in shard])
            for f in (np.mean, np.var)
        )
        layer = tfbn.LayerStats(counts, mean, variance)
        parts.append(tfbn.PopulationStats({"bn": layer}, method="pooled", samples=5))
    a, b = parts
    assert type(a["bn"].count) is int and a["bn"].count == 2 and b["bn"].count == 0
    for total in (a.merge(b), b.merge(a)):
        assert type(total["bn"].count) is int and total["bn"].count == 2
        np.testing.assert_array_equal(total["bn"].counts, [7, 6, 2])
        assert total["bn"].counts.dtype == np.int64
        for channel, both in enumerate(zip(*shards, strict=True)):
            values = np.concatenate(both)
            np.testing.assert_allclose(total["bn"].mean[channel], values.mean(), rtol=1e-12)
            np.testing.assert_allclose(total["bn"].variance[channel], values.var(), rtol=1e-12)
        lines = []
        total.summary(print_fn=lines.append)
        assert lines[2].split()[:2] == ["bn", "2"]
        actual = json.loads(json.dumps(total.to_dict()))["layers"]["bn"]
        assert actual["count"] == 2 and actual["counts"] == [7, 6, 2]


def test_merge_refuses_what_does_not_belong_together(model, stats):
    for method in ("exact", "assigned"):
        other = tfbn.PopulationStats(stats, method=method)
        for a, b in ((other, other), (other, stats), (stats, other)):
            with pytest.raises(ValueError, match=r"Received: .*tfbn\.collect_shards"):
                a.merge(b)
    with pytest.raises(ValueError, match="'pooled' and 'algorithm2'"):
        stats.merge(tfbn.PopulationStats(stats, method="algorithm2"))
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    with pytest.raises(ValueError, match="same weights"):
        stats.merge(made_up(model, 1))
    with pytest.raises(ValueError, match="PopulationStats"):
        stats.merge({})
    first = next(iter(stats))
    fewer = tfbn.PopulationStats({first: stats[first]}, method="pooled")
    with pytest.raises(ValueError, match=r"Expected the same layers.*and None"):
        stats.merge(fewer)
    wide = tfbn.PopulationStats(
        {path: tfbn.LayerStats(1, np.zeros(9), np.ones(9)) for path in stats}, method="pooled"
    )
    for f in (stats.merge, stats.compare):
        with pytest.raises(ValueError, match=r"\(4,\) and \(9,\)"):
            f(wide)


ONE = tfbn.LayerStats(1, np.zeros(2), np.ones(2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "magic"}, "'magic'"),
        ({"method": None}, "None"),
        ({"samples": -1}, "samples.*Received: -1"),
        ({"samples": 1.5}, "samples.*Received: 1.5"),
        ({"batches": "two"}, "batches.*Received: 'two'"),
        ({"batch_size": 2**70}, "batch_size"),
        ({"levels": np.nan}, "levels.*Received: nan"),
        ({"fingerprint": None}, "fingerprint.*Received: None"),
        ({"layers": {"bn": 3}}, "LayerStats.*Received.*int.*'bn'"),
        ({"layers": {3: ONE}}, "LayerStats.*Received.*under 3"),
        (
            {
                "previous": tfbn.PopulationStats(
                    {"bn": tfbn.LayerStats(0, np.zeros(3), np.ones(3))}, method="assigned"
                )
            },
            r"\(2,\) and \(3,\)",
        ),
    ],
)
def test_what_no_sweep_gives_is_refused(arguments, says):
    with pytest.raises(ValueError, match=f"(?s)Expected.*{says}"):
        tfbn.PopulationStats(**{"layers": {"bn": ONE}, "method": "pooled", **arguments})


def test_summary_has_the_worst_layer_first(model, stats):
    lines = []
    stats.summary(print_fn=lines.append)
    assert "pooled" in lines[0] and "10 samples" in lines[0]
    worst, *_ = stats.compare(stats.previous)
    assert lines[2].split()[0] == worst
    assert lines[2].split()[1] == "100"
    assert lines[2].split()[-1] == "-"  # One batch has no error estimate.
    assert len(lines) == 2 + len(stats)
    assert len({len(line) for line in lines[1:]}) == 1


def test_statistics_that_were_not_swept_say_so(model, stats):
    """A count of 0 samples would look as if the sweep had failed."""
    lines = []
    stats.previous.summary(print_fn=lines.append)
    assert lines[0] == "Statistics of 3 layers as the model held them, not swept".replace(
        "3", str(len(stats.previous))
    )
    assert "0" not in lines[1] and len(lines) == 2 + len(stats.previous)
    for shown in (repr(stats.previous), stats.previous._repr_html_()):
        assert "as the model held them" in shown and "samples" not in shown


def with_errors(stats):
    """The same with standard errors of 0.01 to 0.03 standard deviations."""
    scale = {path: np.linspace(0.01, 0.03, len(s.mean)) for path, s in stats.items()}
    return {
        path: s.with_errors(scale[path] * np.sqrt(s.variance), scale[path] * s.variance)
        for path, s in stats.items()
    }


@pytest.mark.parametrize(
    "tolerance, says", [(None, "5"), (0.03, "reached)"), (0.02, "(not reached)")]
)
def test_summary_has_the_standard_error_of_the_worst_channel(stats, tolerance, says):
    lines = []
    known = stats.replace(layers=with_errors(stats), tolerance=tolerance)
    known.summary(print_fn=lines.append)
    assert lines[0].endswith(says)
    assert {line.split()[-1] for line in lines[2:]} == {"0.0300"}
    assert known.relative_error == pytest.approx(0.03)
    assert np.isnan(stats.relative_error)


def test_standard_errors_survive_a_file_and_json(stats, tmp_path):
    known = stats.replace(layers=with_errors(stats), tolerance=0.05, population_size=77)
    known.save(tmp_path / "stats.npz")
    loaded = tfbn.PopulationStats.load(tmp_path / "stats.npz")
    assert loaded == known and (loaded.tolerance, loaded.population_size) == (0.05, 77)
    assert loaded.relative_error == known.relative_error
    path, layer = next(iter(known.items()))
    assert json.loads(json.dumps(known.to_dict()))["layers"][path]["mean_error"] == (
        layer.mean_error.tolist()
    )
    assert set(stats.to_dict()["layers"][path]["variance_error"]) == {None}


@pytest.mark.parametrize("tolerance", [0, -1, 1.1, np.nan, True, "0.1"])
def test_a_tolerance_is_a_number_up_to_1(stats, tolerance):
    with pytest.raises(ValueError, match=r"Expected tolerance .* Received"):
        stats.replace(tolerance=tolerance)


def test_summary_without_anything_to_compare_with(stats):
    lines = []
    tfbn.PopulationStats(stats, method="exact").summary(print_fn=lines.append)
    assert [line.split() for line in lines[2:]] == [[path, "100", *"---"] for path in stats]


def test_a_notebook_shows_the_table(stats):
    first = next(iter(stats))
    shown = stats._repr_html_()
    assert "10 samples in 2 batches" in shown and shown.index(next(iter(stats))) > 0
    worst, *_ = stats.compare(stats.previous)
    assert (
        f'<tr><td style="text-align: left">{worst}</td>' in shown.split("<tbody>")[1].lstrip()[:200]
    )
    hostile = tfbn.PopulationStats({"<script>&": stats[first]}, method="pooled")
    assert "&lt;script&gt;&amp;" in hostile._repr_html_()
    assert "<script>" not in hostile._repr_html_()


def test_to_dict_survives_json(stats):
    actual = json.loads(json.dumps(stats.to_dict()))
    assert actual["method"] == "pooled" and actual["samples"] == 10
    for path, layer in stats.items():
        np.testing.assert_array_equal(actual["layers"][path]["mean"], layer.mean)
        np.testing.assert_array_equal(actual["layers"][path]["variance"], layer.variance)


def test_layers_without_weights_are_named():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    stats = made_up(model, 1)
    unbuilt = keras.Sequential([layers.BatchNormalization(name="bn")])
    with pytest.raises(ValueError, match=r"built model.*'bn' has no weights yet"):
        stats.assign(unbuilt)
    assert stats.mismatch(unbuilt) == "the model has no batch norm layer 'bn'"
    unbuilt(np.ones((2, 3)))  # The advice.
    stats.assign(unbuilt)
    np.testing.assert_array_equal(unbuilt.layers[0].moving_mean, stats["bn"].mean.astype("f"))
