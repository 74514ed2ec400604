"""The examples on tiny settings: the numbers they write down, computed another way.

The other way is Keras alone: models that were saved or trained again, and batch norm layers with
momentum 0, whose statistics after a step in training mode equal the batch's.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from scipy import stats

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch):
    """Their functions for data and networks are used as they are."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(name, out, *options):
    """What an example writes into results.json. Prints what it prints."""
    command = [sys.executable, EXAMPLES / name, "--out", out, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return json.loads((out / "results.json").read_text())


def with_population(path, x):
    """A saved model with the statistics of all data as one batch, by Keras alone."""
    model = keras.models.load_model(path)
    model.trainable = True
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(x, training=True)
    return model


def metrics(model, x, y):
    """Loss and accuracy in float64."""
    probabilities = np.asarray(model(x, training=False), np.float64)
    loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
    return {"loss": loss, "accuracy": (probabilities.argmax(1) == y).mean()}


def is_png(path):
    """Whether a figure was written."""
    return path.read_bytes().startswith(b"\x89PNG")


def test_digits(tmp_path, capsys):
    from digits import load

    results = run("digits.py", tmp_path / "out", "--epochs", 2, "--method", "exact")
    (x, _), test = load("digits", 0)
    oracle = metrics(with_population(tmp_path / "out" / "model.keras", x), *test)
    assert results["population"] == pytest.approx(oracle, rel=1e-4)
    assert results["samples"] == len(x) and results["batch_norm_layers"] == 4
    # Two epochs leave most of the start in the moving averages: they predict far worse.
    assert results["moving_average"]["loss"] > 2 * results["population"]["loss"]
    assert results["saved_model_max_abs_difference"] < 1e-5
    figure = tmp_path / "out" / "moving_average_vs_population.png"
    assert is_png(figure)
    assert f": {figure}\n" in capsys.readouterr().out


def test_averaged_weights(tmp_path):
    from averaged_weights import fresh, parse_arguments
    from averaged_weights import report as write

    out = tmp_path / "out"
    results = run("averaged_weights.py", out, "--epochs", 2, "--seeds", 2, "--ema-momentum", 0.9)
    sys.argv = ["averaged_weights.py", "--epochs", "2", "--ema-momentum", "0.9"]
    args = parse_arguments()
    for seed in range(2):
        actual = results["use_ema"][seed]
        saved = out / f"use_ema_seed_{seed}.keras"
        # Trained again without any callback, Keras leaves the averaged weights with the
        # moving averages; without averaging, the last weights with them.
        model, train, test = fresh(seed, args)
        model.fit(*train, epochs=2, verbose=0)
        again = actual["averaged weights"]["moving averages"]
        assert again == pytest.approx(metrics(model, *test), rel=1e-4)
        kept = keras.models.load_model(saved)
        for ours, theirs in zip(model.trainable_weights, kept.trainable_weights, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
        model, train, test = fresh(seed, args)
        model.optimizer.use_ema = False
        model.fit(*train, epochs=2, verbose=0)
        again = actual["last weights"]["moving averages"]
        assert again == pytest.approx(metrics(model, *test), rel=1e-4)
        # The sweep was in batches of 256: close to, not the same as, one batch of all.
        oracle = metrics(with_population(saved, train[0]), *test)
        swept = actual["averaged weights"]["population statistics"]
        assert swept["loss"] == pytest.approx(oracle["loss"], rel=0.02)
        # SwapEMAWeights ends with the same weights and moving averages.
        swapped = results["SwapEMAWeights"][seed]
        assert len(swapped["moving averages"]) == 2
        again = actual["averaged weights"]["moving averages"]["loss"]
        assert swapped["moving averages"][-1] == pytest.approx(again, rel=1e-3)
        again = swept["loss"]
        assert swapped["population statistics"][-1] == pytest.approx(again, rel=1e-3)
    report = (out / "report.md").read_text()
    losses = [run["averaged weights"]["moving averages"]["loss"] for run in results["use_ema"]]
    cell = f"{np.mean(losses):.4f} ± {stats.sem(losses):.4f}"
    assert f"| averaged weights | moving averages | {cell} |" in report
    # One training has no standard error.
    one = {way: results[way][:1] for way in ("use_ema", "SwapEMAWeights")}
    report = write(results | one)
    assert "1 training of 2 epochs" in report and "nan" not in report and "±" not in report
    assert f"| averaged weights | moving averages | {losses[0]:.4f} |" in report


def test_beam_sweep(tmp_path):
    pytest.importorskip("apache_beam")
    from digits import load

    import tfbn

    def sweep(*options):
        command = [sys.executable, EXAMPLES / "beam_sweep.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    printed = sweep("--demo", "demo", "--batch-size", "32")
    (x, _), test = load("digits", 0)
    held = keras.models.load_model(tmp_path / "demo" / "model.keras")
    oracle = with_population(tmp_path / "demo" / "model.keras", x)
    for name, model in (("moving averages", held), ("population statistics", oracle)):
        [row] = [line for line in printed.splitlines() if line.startswith(name)]
        loss, accuracy = map(float, row.removeprefix(name).split())
        assert {"loss": loss, "accuracy": accuracy} == pytest.approx(
            metrics(model, *test), rel=1e-3, abs=1e-4
        )
    # As for user files, with options for Beam.
    files = ["--model", "demo/model.keras", "--features", "demo/features.json"]
    sweep(*files, "--records", "demo/*.tfrecord", "--out", "own.npz", "--direct_num_workers=1")
    for path in ("demo/stats.safetensors", "own.npz"):
        stats = tfbn.PopulationStats.load(tmp_path / path)
        assert stats.samples == len(x) and stats.method == "exact"
        for name, actual in stats.items():
            layer = oracle.get_layer(name)
            np.testing.assert_allclose(actual.mean, layer.moving_mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(actual.variance, layer.moving_variance, rtol=1e-3)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Results and directory of the experiment, once."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    name = "moving_average_vs_population.py"
    return run(name, out, "--seeds", 2, "--steps", 200, "--epochs", 1), out


@pytest.mark.xdist_group("experiment")
def test_experiment_figure_1(experiment):
    """The network without batch norm, trained again by Keras alone."""
    import moving_average_vs_population as example
    import tensorflow as tf

    results = experiment[0]["figure_1"]
    assert results["steps"] == [100, 200]
    [wanted] = [
        run
        for run in results["runs"]
        if (run["seed"], run["batch_norm"], run["learning_rate"]) == (1, False, 2.0)
    ]
    (x, y), test = example.data("digits", 1)
    keras.utils.set_random_seed(1)
    model = example.sigmoid_network(x.shape[1:], False)
    model.compile(keras.optimizers.SGD(2.0), "sparse_categorical_crossentropy")
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache().shuffle(len(x), 1).repeat()
    model.fit(batches.batch(60), steps_per_epoch=200, epochs=1, shuffle=False, verbose=0)
    right = metrics(model, *test)["accuracy"]
    assert wanted["accuracy"]["plain"][-1] == pytest.approx(right, abs=0.005)
    # What enters the last sigmoid, by NumPy.
    values = test[0].reshape(len(test[0]), -1)
    kernels = [layer.get_weights() for layer in model.layers if layer.weights][:3]
    for number, (kernel, bias) in enumerate(kernels):
        values = values @ kernel + bias
        if number < 2:
            values = 1 / (1 + np.exp(-values))
    expected = np.percentile(values[:, 0], [15, 50, 85])
    np.testing.assert_allclose(wanted["percentiles"][-1], expected, rtol=0.02)
    assert len([run for run in results["runs"] if run["batch_norm"]]) == 2


@pytest.mark.xdist_group("experiment")
def test_experiment_three_ways(experiment):
    """The moving average's metrics equal the metrics of Keras's validation."""
    import moving_average_vs_population as example

    runs = experiment[0]["three_ways"]
    assert [(run["batch_size"], run["momentum"]) for run in runs] == [
        (size, momentum) for size in (2, 8, 32) for momentum in (0.9, 0.99, 0.999)
    ]
    run = runs[-2]
    (x, y), test = example.data("digits", 0)
    keras.utils.set_random_seed(0)
    model = example.convolutional_network(x.shape[1:], 0.99)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=32, epochs=1, verbose=0)
    actual = {
        way: {name: run["history"][f"val_{name}_{way}"][-1] for name in ("loss", "accuracy")}
        for way in ("moving_average", "population", "mini_batch")
    }
    assert actual["moving_average"] == pytest.approx(metrics(model, *test), rel=1e-3, abs=0.002)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(x, training=True)
    assert actual["population"] == pytest.approx(metrics(model, *test), rel=1e-3, abs=0.002)
    batches = [model(test[0][i : i + 32], training=True) for i in range(0, len(test[0]), 32)]
    probabilities = np.concatenate(batches)
    loss = -np.log(probabilities[np.arange(len(test[1])), test[1]]).mean()
    assert actual["mini_batch"]["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.xdist_group("experiment")
def test_experiment_sweeps(experiment):
    """The saved network's error and loss, with statistics by Keras alone."""
    import moving_average_vs_population as example

    results, out = experiment
    (x, _), test = example.data("digits", 0)
    last = results["sweeps"]["checkpoints"][-1]
    [actual] = [
        row["found"]
        for row in results["sweeps"]["rows"]
        if (row["seed"], row["epochs"]) == (0, last)
    ]
    saved = out / "residual_seed_0.keras"
    held = metrics(keras.models.load_model(saved), *test)
    oracle = metrics(with_population(saved, x), *test)
    for name, right in (
        ("moving average", held),
        ("one pass, one batch of all", oracle),
        ("exact, batches of 2", oracle),
    ):
        assert actual[name]["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert actual[name]["error"] == pytest.approx(100 * (1 - right["accuracy"]), abs=1e-3)
    # A biased sweep is another thing.
    assert actual["one pass, batches of 2"]["loss"] != pytest.approx(oracle["loss"], rel=0.01)


@pytest.mark.xdist_group("experiment")
def test_experiment_report(experiment):
    """The table's numbers, from the results by SciPy."""
    results, out = experiment
    report = (out / "report.md").read_text()
    last = results["sweeps"]["checkpoints"][-1]
    rows = [row["found"] for row in results["sweeps"]["rows"] if row["epochs"] == last]
    table = report[report.index(f"After {last} epochs:\n") :]
    moving = np.array([row["moving average"]["loss"] for row in rows])
    for name in ("one pass, batches of 2", "exact, batches of 2"):
        loss = np.array([row[name]["loss"] for row in rows])
        paired = stats.ttest_rel(loss, moving).confidence_interval(0.95)
        middle, half = (paired.low + paired.high) / 2, (paired.high - paired.low) / 2
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {loss.mean():.4f} ± {stats.sem(loss):.4f} |" in line
        assert f"| {middle:+.4f} ± {half:.4f} |" in line
    for name in ("figure_1", "three_ways", "sweeps"):
        assert is_png(out / f"{name}.png")
        assert f"({name}.png)" in report


def test_one_training_has_the_moving_averages_of_all_momenta():
    """They equal the averages of Keras's layer with each momentum, in the same training."""
    import error_by_batch_size as example

    x, y = np.random.default_rng(0).random((24, 8, 8, 1)).astype("float32"), np.arange(24) % 10
    trained = []
    for momentum in (0.0, *example.MOMENTA):
        keras.utils.set_random_seed(0)
        model = example.residual_network(x.shape[1:])
        model.track()
        for layer in model.norms:
            layer.momentum = momentum
        model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        trained.append(model)
    for place, model in enumerate(trained[1:]):
        averages = trained[0].averages[place].numpy()
        np.testing.assert_allclose(averages, model.statistics(), rtol=1e-4, atol=1e-5)


def test_error_by_batch_size(tmp_path):
    """The table has mean and standard error over seeds of the results."""
    import error_by_batch_size as example

    (x, y), test = example.load("digits", 0)
    errors = example.trained((x[:256], y[:256]), test, 8, epochs=1, seed=0)
    names = {"0.9", "0.99", "0.999", "population"}
    assert len(errors) == 1 and set(errors[0]) == names and errors[0]["population"] < 90
    rng = np.random.default_rng(0)
    runs = [
        {"seed": s, "batch_size": b, "errors": [dict.fromkeys(names, e) for e in rng.random(2)]}
        for s in range(3)
        for b in example.BATCH_SIZES
    ]
    results = {"data": "digits", "samples": [1, 2], "epochs": 2, "seeds": 3, "runs": runs}
    last = np.array([run["errors"][-1]["0.9"] for run in runs if run["batch_size"] == 32])
    report = example.report(results)
    [row] = [line for line in report.split("After 2 epochs")[1].splitlines() if "| 32 |" in line]
    assert row.count(f" {last.mean():.2f} ± {stats.sem(last):.2f} |") == 4
    assert row.endswith(" +0.00 ± 0.00 |")
    example.draw(results, tmp_path / "errors.png")
    assert is_png(tmp_path / "errors.png")


def test_augmentation():
    """Each way has its own statistics, and leaves the training alone."""
    import augmentation as example

    (x, y), test = example.load("digits", 0)
    train, evaluated = (x[:256], y[:256]), (test[0][:100], test[1][:100])
    light = example.AUGMENTATIONS["and light"]
    actual = example.trained(train, evaluated, light, [1, 2], seed=0)
    losses = [actual[2][way]["loss"] for way in example.WAYS]
    assert len(set(losses)) == 3 and list(actual) == [1, 2]
    runs = [
        {"seed": seed, "augmentation": name, "found": {2: actual[epochs]}}
        for seed, epochs in enumerate([1, 2])
        for name in example.AUGMENTATIONS
    ]
    errors = [actual[epochs][example.WAYS[1]]["error"] for epochs in (1, 2)]
    row = f"| and light | {example.WAYS[1]} | {np.mean(errors):.2f} ± {stats.sem(errors):.2f} |"
    assert row in example.report(runs)


def test_the_quickstart_does_today_what_its_outputs_show(tmp_path):
    """Its cells run one after the other, and print the numbers that it was committed with."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    script = "\n".join("".join(cell["source"]) for cell in code)
    environment = {**os.environ, "MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = "".join("".join(output.get("text", "")) for cell in code for output in cell["outputs"])
    line = r"Validation before and after: accuracy (\S+) -> (\S+), loss (\S+) -> (\S+)\."
    committed, printed = (
        np.array(re.search(line, text).groups(), float) for text in (shown, done.stdout)
    )
    np.testing.assert_allclose(printed, committed, atol=0.05)
    assert printed[1] > 0.9 > printed[0]
    assert "largest difference" in done.stdout and (tmp_path / "models/digits/2").is_dir()
    # The alarm, and the next version on the images that raised it.
    assert "as before: <ServedDrift: 20 samples cannot be told from" in done.stdout
    assert "darker: <ServedDrift: 20 samples have moved from" in done.stdout
    before, after = map(float, re.findall(r"version \d: accuracy (\S+) on dark", done.stdout))
    assert after > 0.9 > 0.5 > before


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Results and directory of the served population, with networks that know little."""
    out = tmp_path_factory.mktemp("served") / "out"
    return run("served_population.py", out, "--seeds", 2, "--epochs", 3), out


def arguments_of_digits():
    """What the example's `load` asks for."""
    return argparse.Namespace(data="digits", data_dir=None)


@pytest.mark.xdist_group("served")
def test_served_population_accuracy(served):
    """With blends by NumPy of statistics by Keras alone."""
    import served_population as example

    results, out = served
    count, weight, seed, shift = 16, 4, 1, "darker, x 0.3"
    _, requests, (x, y) = example.load(arguments_of_digits(), seed)
    saved = out / f"seed_{seed}.keras"
    held = keras.models.load_model(saved)
    x, field = example.shifted(shift, x, seed + 1), example.shifted(shift, requests[0], seed)
    swept = with_population(saved, field[:count])
    [run] = [r for r in results["runs"] if (r["seed"], r["shift"]) == (seed, shift)]
    place = results["counts"].index(count)
    assert run["as_trained"] == pytest.approx(metrics(held, x, y)["accuracy"], abs=0.003)
    actual = metrics(swept, x, y)["accuracy"]
    assert run["accuracy"]["0"][place] == pytest.approx(actual, abs=0.003)
    for ours, theirs in zip(swept.layers, held.layers, strict=True):
        if isinstance(ours, layers.BatchNormalization):
            for name in ("moving_mean", "moving_variance"):
                own, source = (np.float64(getattr(layer, name)) for layer in (ours, theirs))
                blended = (weight * source + count * own) / (weight + count)
                getattr(ours, name).assign(blended)
    actual = metrics(swept, x, y)["accuracy"]
    assert run["accuracy"][str(weight)][place] == pytest.approx(actual, abs=0.003)


@pytest.mark.xdist_group("served")
def test_served_population_serves_it(served):
    """The second version answers as often right as the model with the same statistics."""
    results, out = served
    assert results["served"]["before"][0] == 1 and results["served"]["after"][0] == 2
    [run] = [
        run
        for run in results["runs"]
        if (run["seed"], run["shift"]) == (0, "contrast to a quarter")
    ]
    assert results["served"]["before"][1] == pytest.approx(run["as_trained"], abs=0.003)
    place = results["counts"].index(64)
    assert results["served"]["after"][1] == pytest.approx(run["accuracy"]["0"][place], abs=0.003)
    assert (out / "models" / "seed_0" / "2" / "saved_model.pb").exists()


@pytest.mark.xdist_group("served")
def test_served_population_report(served):
    """The table's numbers, from the results by SciPy."""
    results, out = served
    report = (out / "report.md").read_text()
    place = results["counts"].index(8)
    runs = [run for run in results["runs"] if run["shift"] == "none"]
    accuracy = np.array([100 * run["accuracy"]["0"][place] for run in runs])
    assert f" {accuracy.mean():.1f} ± {stats.sem(accuracy):.1f} |" in report
    gain = np.array([100 * run["accuracy"]["4"][place] for run in runs]) - accuracy
    assert f" {gain.mean():+.1f} ± {stats.sem(gain):.1f} |" in report
    assert is_png(out / "accuracy.png") and "(accuracy.png)" in report
