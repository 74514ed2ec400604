"""Tests of `tfbn recalibrate` for served models and with few samples."""

import os
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import fails, network, run, run_for_json
from keras import layers

import tfbn

IMAGES = np.random.default_rng(0).random((30, 6, 5, 1)).astype("float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = network()
    tfbn.update_population_stats(model, IMAGES, verbose=0)
    model.save(folder / "model.keras")
    tfbn.export(model, folder / "served")
    np.savez(folder / "field.npz", image=0.3 * IMAGES + 0.5)
    return folder


@pytest.fixture
def files(tmp_path, saved):
    """Return a model file, the directory of its export, and data from the field."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.keras", tmp_path / "served", tmp_path / "field.npz"


def held(model):
    """Return mean and variance of the layers."""
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    return [np.float64(v) for n in norms for v in (n.moving_mean, n.moving_variance)]


def of_one_batch(path, x):
    """Compute the statistics of all data as a single batch with Keras."""
    twin = keras.models.load_model(path)
    for layer in twin.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    twin(x, training=True)
    return held(twin)


@pytest.mark.slow
def test_few_samples_are_blended_with_what_the_file_holds(capsys, tmp_path, files):
    model, _, field = files
    out = tmp_path / "out.keras"
    arguments = ["recalibrate", model, "--data", field, "--out", out, "--blend-samples", 10]
    printed = run_for_json(capsys, *arguments)
    assert (printed["samples"], printed["prior_samples"]) == (30, 10)
    before = held(keras.models.load_model(model))
    swept = of_one_batch(model, np.load(field)["image"])
    after = held(keras.models.load_model(out))
    for source, own, blended in zip(before, swept, after, strict=True):
        np.testing.assert_allclose(blended, (10 * source + 30 * own) / 40, rtol=1e-4, atol=1e-5)
    code, text, _ = run(capsys, "inspect", out, "--check")
    assert code == 0 and "blended: 30 field samples, 10 prior samples" in text
    # The export describes it too.
    run(capsys, "export", out, tmp_path / "served")
    code, text, _ = run(capsys, "describe", tmp_path / "served")
    assert "blended: 30 field samples, 10 prior samples" in text


def test_a_served_model_gets_its_next_version(capsys, files):
    model, served, field = files
    code, text, err = run(capsys, "recalibrate", served, "--data", field)
    assert (code, err) == (0, "")
    assert f"Wrote {served / '2'}. {served / '1'} is as it was." in text
    x = np.load(field)["image"]
    keras_model = keras.models.load_model(model)
    tfbn.update_population_stats(keras_model, x, verbose=0)
    loaded = tf.saved_model.load(os.fspath(served / "2"))
    [answer] = loaded.signatures["serving_default"](image=x).values()
    np.testing.assert_allclose(answer, keras_model(x), rtol=1e-5, atol=1e-6)
    options = ["--blend-samples", 10, "--method", "pooled", "--batch-size", 20]
    printed = run_for_json(capsys, "recalibrate", served, "--data", field, *options)
    assert printed["out"] == str(served / "3")
    assert (printed["method"], printed["prior_samples"], printed["batch_size"]) == (
        "pooled",
        10,
        20,
    )
    code, text, _ = run(capsys, "describe", served)
    assert "blended: 30 field samples, 10 prior samples" in text
    assert "version 1: method='exact' over 30" in text and "version 2: method='exact'" in text


def test_a_folder_of_images_for_a_served_model(capsys, tmp_path, files):
    _, served, _ = files
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES):
        keras.utils.save_img(tmp_path / "images" / f"{i}.png", image)
    printed = run_for_json(
        capsys, "recalibrate", served, "--data", tmp_path / "images", "--scale", "1/255"
    )
    assert printed["samples"] == 30


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("served", ["--data", "field.npz", "--out", "x.keras"], "--out"),
        ("served", ["--data", "field.npz", "--include-frozen"], "--include-frozen"),
        ("model.keras", ["--data", "field.npz"], "Expected --out"),
        ("served", ["--data", "nan.npz", "--json"], "in batch 0"),
        ("served", ["--data", "wide.npz"], "wide.npz"),
        (".", ["--data", "field.npz"], "numbered"),
    ],
)
def test_errors_leave_the_versions_alone(
    capsys, tmp_path, monkeypatch, files, model, options, says
):
    monkeypatch.chdir(tmp_path)
    np.savez("wide.npz", image=np.zeros((4, 6, 5, 3)))
    np.savez("nan.npz", image=np.where(IMAGES > 0.5, np.nan, IMAGES))
    assert says in fails(capsys, "recalibrate", model, *options)
    assert os.listdir("served") == ["1"]


def test_validation_is_printed_before_and_after(capsys, tmp_path):
    """Compare with the metrics of Keras on both files."""
    model = network()
    model.compile("sgd", "mse", metrics=["mae"])
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", IMAGES)
    np.savez(tmp_path / "val.npz", x_val=IMAGES[:9], y_val=np.ones((9, 2)))
    files = [tmp_path / "model.keras", "--data", tmp_path / "x.npy", "--out"]
    options = ["--validation", tmp_path / "val.npz"]
    printed = run_for_json(capsys, "recalibrate", *files, tmp_path / "a.keras", *options)
    for name, values in printed["validation"].items():
        for file, value in zip(("model.keras", "a.keras"), values, strict=True):
            loaded = keras.models.load_model(tmp_path / file)
            [right] = [
                loaded.evaluate(IMAGES[:9], np.ones((9, 2)), verbose=0, return_dict=True)[name]
            ]
            assert value == pytest.approx(right, rel=1e-5)
    assert set(printed["validation"]) == {"loss", "mae"}
    code, out, _ = run(capsys, "recalibrate", *files, tmp_path / "b.keras", *options)
    assert code == 0 and "\nValidation before and after: loss " in out
    np.savez(tmp_path / "val.npz", x_val=IMAGES[:9])
    assert "'y'" in fails(capsys, "recalibrate", *files, tmp_path / "c.keras", *options)
    network().save(tmp_path / "plain.keras")
    np.savez(tmp_path / "val.npz", x_val=IMAGES[:9], y=np.ones((9, 2)))
    files[0] = tmp_path / "plain.keras"
    assert "compiled" in fails(capsys, "recalibrate", *files, tmp_path / "c.keras", *options)
    assert not (tmp_path / "c.keras").exists()


def test_averages_that_lag_cannot_explain_are_another_preprocessing(capsys, tmp_path):
    """Pixels of 0 to 255 in fit and in [0, 1] in the sweep, or the reverse; then only lag."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6, 5, 1), name="image"), layers.BatchNormalization(name="first")]
    )
    model.save(tmp_path / "lags.keras")
    for name, factor in (("pixels", 255.0), ("unit", 1.0)):
        tfbn.update_population_stats(model, factor * IMAGES, verbose=0)
        model.save(tmp_path / f"{name}.keras")
    np.save(tmp_path / "unit.npy", IMAGES)
    np.save(tmp_path / "pixels.npy", 255 * IMAGES)
    for file, data, warned in (
        ("pixels", "unit", True),
        ("unit", "pixels", True),
        ("unit", "unit", False),
        ("lags", "pixels", False),
        ("lags", "unit", False),
    ):
        out = tmp_path / f"{file}_{data}.keras"
        data = tmp_path / f"{data}.npy"
        options = ["--data", data, "--out", out, "--json"]
        code, _, err = run(capsys, "recalibrate", tmp_path / f"{file}.keras", *options)
        assert code == 0
        assert ("layer 'first' are further off than lag explains" in err) == warned, out
