"""Tests of `ServedStats`: merged answers, drift and noise, and errors for other answers."""

import dataclasses
import functools
import os

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from exported_models import dense_model, sweep
from keras import layers
from monitored_models import CHANNELS, images, network, served_by

import tfbn
from tfbn import export
from tfbn.serving.monitor import monitor
from tfbn.stats import moments


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1] * 70, [5, 1, 7, 2], [12]])
def test_requests_of_any_size_add_up(exported, ask, sizes):
    x = images(np.random.default_rng(1), sum(sizes))
    requests = np.split(x, np.cumsum(sizes)[:-1])
    served = served_by(exported, map(ask, requests))
    assert served.samples == sum(sizes)
    first = served.layers()["first"]
    exact = np.float64(x).reshape(-1, CHANNELS)
    assert first.count == len(exact)
    networks.assert_layer(first, exact.mean(0), exact.var(0))


def test_standard_errors_are_those_of_merged_batches(exported, ask):
    """Up to 31 samples are separate batches of `tfbn.stats.moments`, for any requests."""
    x = images(np.random.default_rng(1), 29)
    actual = served_by(exported, map(ask, np.split(x, [1, 5, 6, 17, 18, 24]))).layers()["first"]
    batches = [np.float64(b).reshape(-1, CHANNELS) for b in x]
    merged = [moments.of_batch(len(b), b.mean(0), b.var(0), method="pooled") for b in batches]
    merged = functools.reduce(functools.partial(moments.merge, method="pooled"), merged)
    mean_error, variance_error = moments.standard_errors(merged)
    np.testing.assert_allclose(actual.mean_error, mean_error, rtol=1e-4)
    np.testing.assert_allclose(actual.variance_error, variance_error, rtol=1e-4)


def test_drift_is_by_the_one_formula(exported, ask):
    served = served_by(exported, map(ask, np.split(images(np.random.default_rng(2), 30), 30)))
    actual = served.compare().layers
    assert list(actual) == ["first", "second"]
    for path, ours in served.population.items():
        theirs = served.layers()[path]
        scale = np.sqrt(ours.variance + 1e-3)
        shift = (theirs.mean - ours.mean) / scale
        ratio = np.sqrt(theirs.variance + 1e-3) / scale
        assert actual[path]["mean_shift"] == pytest.approx(np.sqrt(np.mean(shift**2)))
        assert actual[path]["std_ratio"] == pytest.approx(np.exp(np.mean(np.log(ratio))))


def test_the_errors_are_those_of_repeated_samples(exported, ask):
    """They estimate the spread of the results over repetitions with other requests."""
    rng = np.random.default_rng(3)
    actual = []
    for _ in range(40):
        served = served_by(exported, map(ask, np.split(images(rng, 24), 24)))
        actual.append(served.compare().layers["first"])
    ratios = [layer["std_ratio"] for layer in actual]
    reported = np.sqrt(np.mean([layer["std_ratio_error"] ** 2 for layer in actual]))
    assert reported == pytest.approx(np.std(ratios), rel=0.35)
    shifts = np.sqrt(np.mean([layer["mean_shift"] ** 2 for layer in actual]))
    reported = np.sqrt(np.mean([layer["mean_shift_error"] ** 2 for layer in actual]))
    assert reported == pytest.approx(shifts, rel=0.35)


@pytest.mark.parametrize(("size", "runs"), [(1, 40), (4, 20)])
def test_noise_is_not_taken_for_drift(exported, ask, size, runs):
    rng = np.random.default_rng(4)
    values = []
    for _ in range(runs):
        answers = map(ask, np.split(images(rng, 20 * size), 20))
        values.append(served_by(exported, answers).compare().p_value)
    assert min(values) > 0.001
    assert np.median(values) > 0.2


SHIFTS = {
    "darker": lambda x: 0.5 * x,
    "brighter": lambda x: x + 2.0,
    "noise": lambda x: x + np.random.default_rng(0).normal(0, 2.0, x.shape),
    "one channel": lambda x: x + 4.0 * (np.arange(CHANNELS) == 2),
}


@pytest.mark.parametrize("kind", SHIFTS)
def test_drift_is_seen_in_a_few_samples(exported, ask, kind):
    x = SHIFTS[kind](images(np.random.default_rng(5), 24)).astype("float32")
    actual = served_by(exported, [ask(x)]).compare()
    assert actual.drifted and actual.p_value < 1e-3 and actual.distance > 0.1


def test_few_samples_tell_nothing(exported, ask):
    x = images(np.random.default_rng(5), 16) + 20.0
    served = tfbn.ServedStats(exported)
    with pytest.raises(ValueError, match="Received: none so far"):
        served.compare()
    for number, sample in enumerate(x, 1):
        served.add(ask(sample[None]))
        actual = served.compare()
        assert actual.drifted == (number == 16)
        assert np.isnan([actual.p_value, actual.layers["first"]["p_value"]]).all() == (number < 16)
        if number in (1, 15):
            assert repr(actual) == f"<ServedDrift: {number} of 16 samples: too few to tell>"
    assert repr(actual).startswith("<ServedDrift: 16 samples have moved from the population: ")
    far = dataclasses.replace(actual, p_value=0.0)
    assert repr(far).endswith(", p < 1e-300>") and ", p = " in repr(actual)
    assert repr(served) == f"<ServedStats of {exported}: 16 samples>"


@pytest.mark.slow
@pytest.mark.parametrize(("scenes", "frames"), [(32, 16), (5, 4)])
def test_samples_that_come_together_count_for_less(exported, ask, scenes, frames):
    """32 scenes of 16 frames are 32 samples, not 512, and 5 scenes of 4 frames are not 20.

    Blocks of the 32 scenes hold whole scenes; in the 5 scenes, every frame is a block.
    """
    rng = np.random.default_rng(6)
    alarms = 0
    for _ in range(4):
        answers = [ask(x[None]) for x in images(rng, scenes)]
        served = served_by(exported, [answer for answer in answers for _ in range(frames)])
        alarms += served.compare().drifted
    assert alarms == 0


def test_channels_that_never_vary_and_rounding_are_no_drift(tmp_path):
    """A dead channel has variance 0, so any rounding would be infinitely far away."""
    x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
    inputs = keras.Input((3,), name="x")
    constant = layers.Dense(
        2, kernel_initializer="zeros", bias_initializer=lambda *_, **__: [0.1, 7.3]
    )
    y = layers.Concatenate()([constant(inputs), inputs])
    model = keras.Model(inputs, layers.BatchNormalization(name="bn")(y))
    tfbn.update_population_stats(model, x, verbose=0)
    path = export(model, tmp_path, monitor=True).path
    loaded = tf.saved_model.load(os.fspath(path))
    answers = []
    for i in range(40):
        answer = {k: v.numpy() for k, v in loaded.signatures["monitor"](x=x[i : i + 1]).items()}
        answer["bn/mean"] = np.nextafter(answer["bn/mean"], np.float32(9))  # From another kernel.
        answers.append(answer)
    actual = served_by(path, answers).compare()
    assert actual.p_value > 0.01
    assert actual.layers["bn"]["mean_shift_max"] < 1


# Invalid answers.


def test_the_answer_of_another_version_is_refused(tmp_path, exported, ask):
    model = network()
    sweep(model)
    other = export(model, tmp_path, monitor=True).path
    answer = ask(images(np.random.default_rng(8), 2))
    with pytest.raises(ValueError, match="one of another model"):
        tfbn.ServedStats(other).add(answer)


def test_the_other_version_is_named(tmp_path):
    model = dense_model()
    first = export(model, tmp_path, monitor=True).path
    second = export(sweep_again(model), tmp_path, monitor=True).path
    signature = tf.saved_model.load(os.fspath(second)).signatures["monitor"]
    [name] = signature.structured_input_signature[1]
    answer = {k: v.numpy() for k, v in signature(**{name: tf.ones((2, 4))}).items()}
    for served in (tfbn.ServedStats(first), tfbn.ServedStats(str(first))):
        with pytest.raises(ValueError, match=r"answers of '.*/1'.*one of version 2"):
            served.add(answer)
    tfbn.ServedStats(second).add(answer)


def sweep_again(model):
    """Assign statistics of other data."""
    x = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")
    tfbn.update_population_stats(model, x, verbose=0)
    return model


def test_the_drift_is_drawn(exported, ask):
    plots = pytest.importorskip("matplotlib.pyplot")
    plots.switch_backend("Agg")
    served = served_by(exported, [ask(2 * images(np.random.default_rng(9), 20))])
    actual = served.compare()
    left, right = tfbn.plot_drift(actual).axes
    dots = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"]
    assert dots == [layer["mean_shift"] for layer in actual.layers.values()]
    ours, theirs = served.population["first"], served.layers()["first"]
    shift = np.abs(theirs.mean - ours.mean) / np.sqrt(ours.variance + 1e-3)
    [first, _] = [line.get_xdata() for line in left.lines if line.get_color() == "0.5"]
    np.testing.assert_allclose(first, [shift.min(), shift.max()])
    bars = [line.get_xdata()[1] for line in right.lines if line.get_linewidth() == 7]
    assert bars == [1 + layer["std_ratio_error"] for layer in actual.layers.values()]
    plots.close("all")


def test_a_version_without_a_monitor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tfbn\.export wrote"):
        tfbn.ServedStats(tmp_path)
    path = export(dense_model(), tmp_path).path
    with pytest.raises(ValueError, match="exported with monitor"):
        tfbn.ServedStats(path)


@pytest.mark.slow
def test_a_population_that_is_gone_or_of_another_version_is_refused(tmp_path):
    path = export(dense_model(), tmp_path / "a", monitor=True).path
    tfbn.ServedStats(tmp_path / "a")
    (path / monitor.FILE).unlink()
    with pytest.raises(ValueError, match="population"):
        tfbn.ServedStats(path)
    other = export(sweep(network()), tmp_path / "b", monitor=True).path
    (path / monitor.FILE).write_bytes((other / monitor.FILE).read_bytes())
    with pytest.raises(ValueError, match="population"):
        tfbn.ServedStats(path)


def test_the_summary_names_layers_and_the_verdict(exported, ask, capsys):
    x = images(np.random.default_rng(9), 17)
    actual = served_by(exported, map(ask, np.split(x, 17))).compare()
    actual.summary()
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("17 samples cannot be told from the population")
    assert head.split()[0] == "layer" and {row.split()[0] for row in rows} == {"first", "second"}
