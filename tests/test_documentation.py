"""The Python of the README and of public docstrings runs as printed."""

import concurrent.futures
import inspect
import multiprocessing
import pathlib
import re

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks(text):
    """The Python of a text in Markdown."""
    return re.findall(r"^```python\n(.*?)^```$", inspect.cleandoc(text), re.DOTALL | re.MULTILINE)


EXAMPLES = {
    name: "\n".join(code) for name in tfbn.__all__ if (code := blocks(getattr(tfbn, name).__doc__))
}


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that a reader of the examples has: data, a trained model, files of both."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,), name="features"),
            layers.Dense(3),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    model.save("model.keras")
    np.save("shard.npy", x)
    return {
        **{"keras": keras, "np": np, "tfbn": tfbn, "model": model, "x": x, "files": ["shard.npy"]},
        **{"x_train": x, "y_train": y, "x_val": x[:16], "y_val": y[:16]},
        **{"concurrent": concurrent, "multiprocessing": multiprocessing},
    }


def test_the_readme_from_top_to_bottom(names, capsys):
    code = blocks(README.read_text())
    assert len(code) == 4 and all("tfbn." in block for block in code)
    for block in code:
        names["model"].trainable = True  # A custom training loop has frozen nothing.
        exec(block, names)
    assert len(README.read_text().splitlines()) <= 130
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
    assert pathlib.Path("models/digits/1/saved_model.pb").is_file()
    assert pathlib.Path("model_population.keras").is_file()
    mean = names["stats"]["norm"].mean
    layer = names["model"].layers[-2]
    with pytest.raises(AssertionError):  # The last line took the population back.
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-3)


def test_every_example_is_tried():
    slow = {"collect_shards"}
    tried = {"BatchNormalization", "PopulationStatsCallback", "ServedStats", "StatsTracker"}
    tried |= {"convert", "plot_drift", "plot_history", "population_stats"}
    tried |= {"collect", "update_population_stats", "export", "fold", "describe", "recalibrate"}
    assert set(EXAMPLES) == slow | tried


def test_the_example_of_a_training_loop(names):
    names |= {"epochs": 2, "train_one_epoch": lambda model: model.fit(names["x"], names["y_train"])}
    exec(EXAMPLES["population_stats"], names)
    saved = keras.models.load_model("best.keras")
    entered = names["model"].layers[0](names["x"]).numpy().astype("float64")
    np.testing.assert_allclose(saved.layers[-2].moving_mean, entered.mean(0), rtol=1e-4, atol=1e-6)
    held = names["model"].layers[-2].moving_mean
    assert np.abs(held - entered.mean(0)).max() > 1e-3  # The moving averages are back.


@pytest.mark.parametrize("name", ["BatchNormalization", "PopulationStatsCallback", "convert"])
def test_examples_of_the_layer_and_its_population(names, name):
    exec(EXAMPLES[name], names)
    layer = names["model"].layers[-2]
    if name == "PopulationStatsCallback":
        entered = names["model"].layers[0](names["x"]).numpy().astype("float64")
        np.testing.assert_allclose(layer.moving_mean, entered.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, entered.var(0), rtol=1e-4)
    if name == "BatchNormalization":
        np.testing.assert_allclose(tf.reduce_mean(names["y"], 0), np.zeros(4), atol=1e-5)
    if name == "convert":
        assert isinstance(layer, tfbn.BatchNormalization)


@pytest.mark.parametrize("name", ["collect", "update_population_stats"])
def test_examples_of_a_sweep(names, name):
    model, before = names["model"], tfbn.PopulationStats.read(names["model"])
    exec(EXAMPLES[name], names)
    entered = model.layers[0](names["x"]).numpy().astype("float64")
    np.testing.assert_allclose(names["stats"]["norm"].mean, entered.mean(0), rtol=1e-4, atol=1e-6)
    if name == "collect":
        assert tfbn.PopulationStats.load("population.safetensors") == names["stats"]
        names["previous"].assign(model)
    assert dict(tfbn.PopulationStats.read(model)) == dict(before)  # The last line undoes it.


def test_examples_of_serving(names, capsys):
    """One after the other: export, describe, recalibrate, fold."""
    model, x = names["model"], names["x"]
    tfbn.update_population_stats(model, x, verbose=0)
    names["x_field"] = x + 1
    for name in ("export", "describe", "recalibrate", "fold"):
        exec(EXAMPLES[name], names)
    assert names["stale"] is None
    assert [path.name for path in sorted(pathlib.Path("models/digits").iterdir())] == ["1", "2"]
    entered = model.layers[0](names["x_field"]).numpy().astype("float64")
    mean = names["recalibrated"].stats["norm"].mean
    np.testing.assert_allclose(mean, entered.mean(0), rtol=1e-4, atol=1e-6)
    folded = keras.models.load_model("folded.keras")
    assert not [layer for layer in folded.layers if isinstance(layer, layers.BatchNormalization)]
    np.testing.assert_allclose(
        folded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_help_begins_with_an_index_of_the_public_names():
    index = tfbn.__doc__.split("\n\n")[1]
    listed = re.findall(r"^    (\w[\w.]*(?:, \w+)*) {2,}\S", index, re.MULTILINE)
    names = {name for line in listed for name in line.split(", ")}
    assert names == {*tfbn.__all__, "beam.Collect"} - {"__version__"}
    assert all(len(line) < 100 for line in index.splitlines())


def test_options_of_a_sweep_are_in_both_signatures():
    ours, theirs = map(inspect.signature, (tfbn.update_population_stats, tfbn.collect))
    assert ours == theirs


@pytest.mark.slow  # It trains for 20 epochs.
def test_examples_of_figures(names):
    names["stats"] = tfbn.update_population_stats(names["model"], names["x"], verbose=0)
    exec(EXAMPLES["plot_drift"], names)
    names["tf"] = tf
    exec(EXAMPLES["StatsTracker"], names)
    exec(EXAMPLES["plot_history"], names)
    names["model"].fit(
        names["x_train"], names["y_train"], epochs=2, callbacks=names["callbacks"], verbose=0
    )
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator("logs/batch_norm").Reload()
    layer = names["model"].layers[-2]
    entered = names["model"].layers[0](names["x_train"]).numpy().astype("float64")
    shift = (layer.moving_mean.numpy() - entered.mean(0)) / entered.std(0)
    rows = tf.make_ndarray(events.Tensors("mean_shift/norm")[-1].tensor_proto)
    np.testing.assert_allclose([rows[0, 0], rows[-1, 1]], [shift.min(), shift.max()], rtol=1e-3)
    for figure in ("drift.png", "history.png"):
        assert pathlib.Path(figure).read_bytes().startswith(b"\x89PNG")


def test_the_example_of_the_alarm(names, capsys):
    model = names["model"]
    tfbn.update_population_stats(model, names["x"], verbose=0)
    path = tfbn.export(model, "models/digits", monitor=True).path
    monitor = tf.saved_model.load(path).signatures["monitor"]
    names["answers"] = [
        {key: value.numpy() for key, value in monitor(tf.constant(names["x"][i : i + 1])).items()}
        for i in range(20)
    ]
    exec(EXAMPLES["ServedStats"], names)
    assert "norm" in capsys.readouterr().out


@pytest.mark.slow  # It starts processes.
def test_the_example_of_shards(names):
    exec(EXAMPLES["collect_shards"], names)
    entered = names["model"].layers[0](names["x"]).numpy().astype("float64")
    mean = names["stats"]["norm"].mean
    np.testing.assert_allclose(mean, entered.mean(0), rtol=1e-5, atol=1e-6)


def test_the_page_on_a_sweep_names_every_module():
    folder = README.parent / "tfbn" / "sweep"
    named = set(re.findall(r"`(\w+)`", (folder / "README.md").read_text()))
    assert {path.stem for path in folder.glob("*.py")} - named == {
        *("__init__", "first_trace", "report", "trained_layers")
    }
