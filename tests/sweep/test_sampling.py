"""Tests of `tolerance`, and of the standard errors that sweeps return."""

import itertools
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.sweep import sampling
from tfbn.sweep.adapters import NumberedSamples

METHODS = ["exact", "pooled", "algorithm2"]


def drawn(digits, samples, seed):
    """Draw images at random, with replacement."""
    return digits[np.random.default_rng(seed).integers(0, len(digits), samples)]


@pytest.mark.slow
def test_95_percent_intervals_cover_the_population_in_95_percent(model, digits):
    # The population of a one-pass method is the mean over all batches of that size.
    options = {"method": "pooled", "batch_size": 16, "verbose": 0}
    truth = tfbn.collect(model, drawn(digits, 1500 * 16, 0), **options)
    hits = {"mean": [], "variance": []}
    for seed in range(1, 61):
        stats = tfbn.collect(model, drawn(digits, 640, seed), **options)
        for path, actual in stats.items():
            for name, covered in hits.items():
                distance = np.abs(getattr(actual, name) - getattr(truth[path], name))
                covered.append(distance <= 1.96 * getattr(actual, f"{name}_error"))
    for covered in hits.values():
        assert 0.93 <= np.mean(np.concatenate(covered)) <= 0.97


@pytest.mark.slow
def test_errors_with_a_tolerance_cover_the_population_of_exact_statistics(
    model, digits, population
):
    hits = {"mean": [], "variance": []}
    for seed in range(60):
        images = np.array_split(drawn(digits, 640, seed), 40)
        stats = tfbn.collect(model, iter(images), tolerance=1e-6, verbose=0)
        for path, actual in stats.items():
            for name, covered in hits.items():
                distance = np.abs(getattr(actual, name) - getattr(population[path], name))
                covered.append(distance <= 1.96 * getattr(actual, f"{name}_error"))
    for covered in hits.values():
        assert 0.93 <= np.mean(np.concatenate(covered)) <= 0.97


def test_errors_of_the_first_layer_are_those_of_cluster_sampling(model, digits):
    stats = tfbn.collect(model, digits, batch_size=300, verbose=0)
    inner = keras.Model(model.input, model.layers[1].output)
    values = [inner(digits[i : i + 300]).numpy().astype(np.float64) for i in range(0, 1797, 300)]
    n = np.array([[len(v)] for v in values])
    means = np.array([v.mean((0, 1, 2)) for v in values])
    mean = np.sum(n * means, 0) / n.sum()
    error = np.sqrt(6 / 5 * np.sum((n * (means - mean)) ** 2, 0)) / n.sum()
    np.testing.assert_allclose(next(iter(stats.values())).mean_error, error, rtol=1e-4)


def test_one_batch_tells_no_errors(model, digits):
    stats = tfbn.collect(model, digits[:50], batch_size=50, verbose=0)
    assert np.isnan(stats.relative_error)
    assert all(np.isnan(layer.mean_error).all() for layer in stats.values())


@pytest.mark.slow
def test_a_smaller_tolerance_takes_more_and_is_closer(model, digits, population):
    samples, errors = [], []
    for tolerance in (0.05, 0.02, 0.01):
        stats = tfbn.collect(model, digits, batch_size=8, tolerance=tolerance, verbose=0)
        assert stats.relative_error <= tolerance
        samples.append(stats.samples)
        errors.append(networks.off(stats, population))
    assert samples == sorted(set(samples)) and errors[-1] < errors[0]


@pytest.mark.slow
def test_halves_that_disagree_are_a_warning(model, digits):
    """Data in random order, which a tolerance requires, gives no warning."""
    dark = np.concatenate([digits[::4] * 0.3, digits[::4]])
    for images, expected in ((dark, 1), (digits[np.random.default_rng(0).permutation(1797)], 0)):
        dataset = tf.data.Dataset.from_tensor_slices(images).batch(8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tfbn.collect(model, dataset, tolerance=0.01, verbose=0)
        assert sum("half of the sample" in str(w.message) for w in caught) == expected


@pytest.mark.parametrize("tolerance", [0, -0.1, 2, np.nan, "a"])
def test_wrong_tolerances_are_refused_before_anything_is_read(model, tolerance):
    with pytest.raises(ValueError, match=r"Expected tolerance .* Received"):
        tfbn.collect(model, iter(()), tolerance=tolerance)
    with pytest.raises(ValueError, match=r"Expected tolerance .* Received"):
        tfbn.PopulationStatsCallback(np.zeros((3, 2)), tolerance=tolerance)


def test_nothing_is_changed(model, digits):
    before = [np.array(w) for w in model.get_weights()]
    tfbn.collect(model, digits, tolerance=0.05, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_shards_give_a_random_sample_of_all(model, digits, population, method):
    # One shard per class, and an empty one.
    shards = [*np.array_split(digits, 10), digits[:0]]
    stats = tfbn.collect_shards(
        model, shards, method=method, batch_size=8, tolerance=0.03, verbose=0
    )
    assert stats.population_size == len(digits) and stats.tolerance == 0.03
    assert stats.samples < len(digits) and stats.relative_error <= 0.03
    if method == "pooled":  # Batches of one class change the normalization of deeper layers.
        population = dict([next(iter(population.items()))])
    assert networks.off(stats, population) < 4 * 0.03


def test_shards_of_other_sizes_are_weighted_by_them(model, digits, population):
    shards = np.split(digits, [30, 60, 90, 120])
    stats = tfbn.collect_shards(model, shards, batch_size=4, tolerance=0.03, verbose=0)
    assert networks.off(stats, population) < 3 * 0.03


def test_only_the_shards_of_the_sample_are_loaded_after_their_sizes(model, digits):
    shards, loads = np.array_split(drawn(digits, 1600, seed=0), 100), []

    def load(number):
        loads.append(number)
        return shards[number]

    stats = tfbn.collect_shards(
        model, range(100), load=load, batch_size=16, tolerance=0.5, verbose=0
    )
    assert stats.batches == 20 and stats.levels == 3
    loaded = set(loads[100:])
    assert sorted(loads[:100]) == list(range(100)) and len(loaded) <= 20
    assert len(loads) == 100 + len(loaded) * 3  # Three levels.


def test_shards_that_end_first_are_swept_whole(model, digits):
    shards = np.array_split(digits[:300], 3)
    stats = tfbn.collect_shards(model, shards, tolerance=1e-6, verbose=0)
    assert stats.samples == stats.population_size == 300 and stats.relative_error == 0
    whole = tfbn.collect(model, digits[:300], verbose=0)
    for path, layer in stats.items():
        np.testing.assert_allclose(layer.mean, whole[path].mean, atol=1e-5)


def test_shards_of_unknown_length_are_refused_with_advice_that_works():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    x = networks.normal(320, 4, loc=3)
    parts = np.array_split(x, 10)
    spec = tf.TensorSpec((None, 4), tf.float32)
    unknown = tf.data.Dataset.from_generator(lambda: parts, output_signature=spec)
    options = {"tolerance": 1e-6, "verbose": 0}
    with pytest.raises(RuntimeError, match=r"shard 0 .*number of batches that is known.*Set `st"):
        tfbn.collect_shards(model, [unknown], **options)
    with pytest.raises(RuntimeError, match=r"shard 0 .*a generator\. Load arrays or a dataset"):
        tfbn.collect_shards(model, [0], load=lambda _: iter(parts), steps=10, **options)
    for shard, steps in [(unknown, 10), (x, None)]:
        stats = tfbn.collect_shards(model, [shard], steps=steps, **options)
        assert stats.samples == 320
        networks.assert_layer(*stats.values(), x.astype("d").mean(0), x.astype("d").var(0))


@pytest.mark.slow
def test_devices_and_callbacks_take_a_tolerance(model, digits):
    network = keras.models.clone_model(model)
    network.compile("sgd", "mse")
    targets = np.zeros((len(digits), 4), "float32")
    callback = tfbn.PopulationStatsCallback(digits, batch_size=16, tolerance=0.05, verbose=0)
    tracker = tfbn.StatsTracker(
        digits, validation_data=(digits[:50], targets[:50]), batch_size=16, tolerance=0.05
    )
    network.fit(digits, targets, batch_size=256, callbacks=[tracker, callback], verbose=0)
    for stats in (callback.stats, tracker.stats):
        assert stats.tolerance == 0.05 and stats.samples < len(digits)


def test_layer_whose_channels_never_vary_gives_one_warning():
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")])
    with pytest.warns(UserWarning, match="never varied") as caught:
        stats = tfbn.collect(model, np.ones((9000, 2), "f"), tolerance=0.1, verbose=0)["bn"]
    assert len(caught) == 1
    np.testing.assert_allclose(stats.variance_error, 3 / stats.counts)


def test_a_channel_that_never_varies_has_the_error_of_what_was_not_seen():
    """The error is 3 / n, the bound on the rate of unseen values; the sample still ends."""
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    x = np.random.default_rng(0).normal(size=(4000, 3)).astype("float32")
    x[:, 1] = 1
    with pytest.warns(UserWarning, match="never varied in .* samples: 1 of layer 'bn'"):
        stats = tfbn.collect(model, x, tolerance=0.05, verbose=0)
    actual = stats["bn"]
    assert stats.samples < 4000 and stats.relative_error <= 0.05
    assert actual.mean[1] == 1 and actual.variance[1] == 0
    assert actual.mean_error[1] == actual.variance_error[1] == 3 / stats.samples
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything = tfbn.collect(model, x[:40], batch_size=2, tolerance=1e-3, verbose=0)
    assert everything["bn"].mean_error[1] == 0
    x[3999, 1] = 401  # Rare.
    whole = tfbn.collect(model, x, verbose=0)["bn"]  # The advice.
    networks.assert_layer(whole, x.astype("d").mean(0), x.astype("d").var(0))


def test_few_values_that_dominate_a_channel_make_errors_unknown():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    model.add(layers.Dense(2))
    model.add(layers.BatchNormalization(name="behind"))
    x = np.random.default_rng(0).normal(size=(40, 32, 3)).astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(model, iter(x), tolerance=0.05, verbose=0)
    assert stats.relative_error <= 0.05
    x[7, 5, 1] = 1000
    with pytest.warns(UserWarning, match="'bn' and 1 more .* few values dominate channel 1 of lay"):
        stats = tfbn.collect(model, iter(x), tolerance=0.05, verbose=0)
    assert all(np.isnan(layer.mean_error).all() for layer in stats.values())
    whole = tfbn.collect(model, iter(x), verbose=0)["bn"]  # The advice.
    networks.assert_layer(whole, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


def test_errors_of_one_heavy_channel_are_mostly_unknown():
    """A sample that misses the largest values looks harmless; its error would be too small."""
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization(name="bn")])
    options = {"tolerance": 0.1, "verbose": 0}
    unknown = {"normal": 0, "heavy": 0}
    for seed in range(10):
        normal = np.random.default_rng(seed).normal(size=(60, 128, 1)).astype("float32")
        for name, x in (("normal", normal), ("heavy", np.exp(normal))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stats = tfbn.collect(model, iter(x), **options)
            unknown[name] += np.isnan(stats.relative_error)
    assert unknown["normal"] == 0 and unknown["heavy"] >= 5


def test_errors_that_cancel_do_not_make_others_unknown():
    """After a linear map of a normalized channel, mean and variance have almost no error."""
    keras.utils.set_random_seed(0)
    parts = [layers.BatchNormalization(name="a"), layers.Dense(2), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((1,)), *parts])
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(20_000, 1)).astype("float32")
        stats = tfbn.collect(model, x, tolerance=0.05, verbose=0)
        assert stats.samples <= 1280 and stats.relative_error == stats["a"].relative_error


def test_halves_without_errors_are_not_apart():
    zeros = np.zeros((10, 3))
    assert sampling._standardized_difference(zeros, zeros, np.ones(3, bool)) == 0


def test_shards_that_are_sorted_alike_are_drawn_from_unlike_places():
    """Shards sorted by time of day, for example: each is sampled in a different order."""
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization(name="bn")])
    hours = (np.arange(960) * 10 // 960).astype("float32")[:, None]
    noise = np.random.default_rng(0).normal(0, 0.1, (50, 960, 1)).astype("float32")
    stats = tfbn.collect_shards(model, list(hours + noise), tolerance=0.05, verbose=0)
    assert abs(stats["bn"].mean[0] - 4.5) < 4 * stats["bn"].mean_error[0]


@pytest.mark.parametrize("batches", [21, 60])
def test_a_drifting_stream_is_a_warning_in_the_first_round(batches):
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    noise = np.random.default_rng(0).normal(size=(batches, 32, 1))
    drifting = (noise + np.linspace(0, 3, batches)[:, None, None]).astype("float32")
    with pytest.warns(UserWarning, match="first half of the sample") as caught:
        tfbn.collect(model, iter(drifting), tolerance=0.5, verbose=0)
    assert caught[0].filename == __file__
    shuffled = np.random.default_rng(1).permutation(drifting.reshape(-1, 1))
    mean, std = drifting.mean(dtype="d"), drifting.std(dtype="d")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tfbn.collect(
            model, iter(shuffled.reshape(drifting.shape)), tolerance=0.5, verbose=0
        )
        [whole] = tfbn.collect(model, iter(drifting), verbose=0).values()
    assert stats.relative_error <= 0.5
    [layer] = stats.values()
    assert abs(layer.mean[0] - mean) < 4 * layer.mean_error[0]
    networks.assert_layer(whole, mean, std**2)


def test_an_endless_stream_that_never_reaches_the_tolerance_ends(capsys):
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    rng = np.random.default_rng(0)

    def heavy():
        while True:
            yield np.exp(4 * rng.normal(size=(32, 1))).astype("float32")

    with pytest.warns(UserWarning, match=r"do not reach tolerance=0.2, .*Say with `steps`"):
        stats = tfbn.collect(model, heavy(), tolerance=0.2)
    assert stats.samples < 5000 and np.isnan(stats.relative_error)
    stats.summary()
    out = capsys.readouterr().out
    assert out.count("samples in") >= 2 and "tolerance=0.2 (not reached)" in out
    # The advice.
    x = list(itertools.islice(heavy(), 40))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the data goes on")
        [layer] = tfbn.collect(
            model, itertools.cycle(x), steps=40, tolerance=0.2, verbose=0
        ).values()
    values = np.concatenate(x).astype("d")
    np.testing.assert_allclose(layer.mean, values.mean(0), rtol=1e-5)


class Sequence(keras.utils.PyDataset):
    """Batches as a PyDataset; `None` is a damaged batch."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        batch = self.batches[number]
        if batch is None:
            raise OSError("damaged")
        return batch


@pytest.mark.parametrize("kind", ["arrays", "PyDataset", "stream", "numbered"])
def test_errors_name_the_position_in_the_data(kind):
    """Errors do not give the position in the sample, because it is drawn at random."""
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")])
    x = np.random.default_rng(0).normal(size=(1280, 2)).astype("float32")
    x[815, 1] = np.nan
    batches = list(x.reshape(-1, 32, 2))
    take = {"take": lambda rows: x[rows], "number": 1280, "batch_size": 32}
    data, place = {
        "arrays": (x, "row 815"),
        "numbered": (
            NumberedSamples(tf.data.Dataset.from_tensor_slices(x).batch(32), **take),
            "row 815",
        ),
        "PyDataset": (Sequence(batches), "batch 25"),
        "stream": (iter(batches), "batch 25"),
    }[kind]
    options = {"tolerance": 1e-3, "verbose": 0}
    with pytest.raises(ValueError, match=rf"in {place} \(counting from 0\), channel 1, mean nan"):
        tfbn.collect(model, data, **options)
    if kind != "stream":
        place = rf"shard 1 .*in {place} \(counting from 0\)"
        with pytest.raises(RuntimeError, match=place):
            tfbn.collect_shards(model, [x[:64], data], **options)


@pytest.mark.parametrize("damage", ["shape", "error"])
def test_batches_that_fail_are_named_by_their_number_in_the_data(damage):
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")])
    x = np.random.default_rng(0).normal(size=(40, 32, 2)).astype("float32")
    batches = [*x[:25], np.ones((32, 3), "float32") if damage == "shape" else None, *x[25:]]
    with pytest.raises((ValueError, RuntimeError), match=r"batch 25 \(counting from 0\)"):
        tfbn.collect(model, Sequence(batches), tolerance=1e-3, verbose=0)


def test_values_that_overflow_name_the_rows_of_their_batch():
    model = keras.Sequential(
        [keras.Input((1,)), layers.Rescaling(1e30), layers.BatchNormalization()]
    )
    x = np.zeros((640, 1), "float32")
    x[300] = 1e30
    with pytest.raises(ValueError, match=r"a batch of rows (\d+, ){3}\.\.\. \(counting from 0\)"):
        tfbn.collect(model, x, tolerance=1e-3, verbose=0)


def test_a_checkpoint_of_a_sample_is_refused(model, digits):
    options = {"tolerance": 0.1, "checkpoint": "x", "verbose": 0}
    with pytest.raises(ValueError, match="Leave out `checkpoint`"):
        tfbn.collect(model, iter(()), **options)
    del options["checkpoint"]
    assert tfbn.collect(model, digits, **options).tolerance == 0.1


@pytest.mark.parametrize("second", ["sample", "all"])
def test_merged_samples_count_as_the_populations_behind_them(second):
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")])
    rng = np.random.default_rng(0)
    few, many = rng.normal(0, 1, (500, 2)), rng.normal(4, 2, (20000, 2))
    options = {"method": "pooled", "verbose": 0}
    a = tfbn.collect(model, many.astype("float32"), tolerance=0.05, **options)
    more = {"tolerance": 0.05} if second == "sample" else {}
    b = tfbn.collect(model, few.astype("float32"), **more, **options)
    everything = np.concatenate([few, many])
    for merged in (a.merge(b), b.merge(a)):
        actual = merged["bn"]
        assert merged.population_size == 20500 and merged.samples == a.samples + b.samples
        assert actual.count == a["bn"].count + b["bn"].count
        share = 20000 / 20500
        other = b["bn"].mean_error / 41 if second == "sample" else 0
        error = np.hypot(share * a["bn"].mean_error, other)
        np.testing.assert_allclose(actual.mean_error, error)
        assert (np.abs(actual.mean - everything.mean(0)) < 4 * actual.mean_error).all()
        off = np.abs(actual.variance - everything.var(0))
        assert (off < 4 * actual.variance_error).all()


def test_a_sample_of_a_stream_is_not_merged():
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(30, 32, 1)).astype("float32")
    options = {"method": "pooled", "verbose": 0}
    sampled = tfbn.collect(model, iter(x), tolerance=0.3, **options)
    whole = tfbn.collect(model, iter(x), **options)
    for pair in ((sampled, whole), (whole, sampled), (sampled, sampled)):
        with pytest.raises(ValueError, match="without `tolerance`"):
            pair[0].merge(pair[1])
    assert whole.merge(whole).samples == 2 * whole.samples


def test_the_summary_says_how_the_sample_was_taken(capsys):
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(100, 32, 1)).astype("float32")
    tfbn.collect(model, x.reshape(-1, 1), tolerance=0.1, verbose=0).summary()
    tfbn.collect(model, iter(x), tolerance=0.1, verbose=0).summary()
    out = capsys.readouterr().out
    assert "drawn at random from 3200" in out and "in the order of the data" in out
