"""Tests of the commands, compared with Keras on files that tfbn did not write."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import fails, network, run, run_for_json
from keras import layers

import tfbn
from tfbn.cli import main
from tfbn.cli.model_files import RECORD
from tfbn.layer.sweep_records import ASSET

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (30, 6, 5, 1), dtype=np.uint8)
IMAGES = (PIXELS / 255).astype("float32")


def two_inputs():
    """Build batch norm of two inputs and of their sum."""
    keras.utils.set_random_seed(0)
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    sum_of_both = layers.Add()(
        [layers.BatchNormalization(center=False)(a), layers.ReLU()(layers.BatchNormalization()(b))]
    )
    return keras.Model({"a": a, "b": b}, layers.BatchNormalization()(sum_of_both))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model after a short training."""
    path = tmp_path_factory.mktemp("models") / "model.keras"
    model = network()
    model.compile("sgd", "mse")
    model.fit(IMAGES, np.zeros((30, 2)), epochs=2, verbose=0)
    model.save(path)
    return path


def whole_batch(path, x):
    """Compute mean and variance of each layer's input over all data with Keras."""
    twin = keras.models.load_model(path)
    norms = [layer for layer in twin.layers if isinstance(layer, layers.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    twin(x, training=True)
    return [(n.moving_mean.numpy(), n.moving_variance.numpy()) for n in norms]


def held(path):
    """Return mean and variance of the layers of a file's model."""
    return [
        (layer.moving_mean.numpy(), layer.moving_variance.numpy())
        for layer in keras.models.load_model(path).layers
        if isinstance(layer, layers.BatchNormalization)
    ]


def assert_equal(statistics, expected, rtol=2e-5):
    """Compare statistics up to float32's rounding."""
    assert len(statistics) == len(expected)
    for (mean, variance), (right_mean, right_variance) in zip(statistics, expected, strict=True):
        scale = np.sqrt(right_variance.max())
        np.testing.assert_allclose(mean, right_mean, rtol=rtol, atol=rtol * scale)
        np.testing.assert_allclose(variance, right_variance, rtol=rtol, atol=rtol * scale**2)


def as_npy(directory):
    """Write the images as one array."""
    np.save(directory / "x.npy", IMAGES)
    return [directory / "x.npy"]


def as_npz(directory):
    """Write the images and their targets."""
    np.savez(directory / "data.npz", y=np.zeros(30), x_train=IMAGES)
    return [directory / "data.npz"]


def as_npz_named(directory):
    """Write the images under the name of the model's input, with other arrays of common names."""
    np.savez(directory / "data.npz", x=np.zeros((3, 2)), image=IMAGES)
    return [directory / "data.npz"]


def as_folder(directory):
    """Write the images as PNG files, in a folder for each class."""
    for number, image in enumerate(PIXELS):
        file = directory / "images" / str(number % 3) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tf.io.encode_png(image).numpy())
    return [directory / "images", "--scale", "1/255"]


def as_function(directory):
    """Write a module with a function that returns the images."""
    name = f"data_of_{directory.parent.name}_{directory.name}".replace("-", "_")
    (directory / f"{name}.py").write_text(
        f"import numpy\ndef train():\n    return numpy.load({str(directory / 'x.npy')!r})\n"
    )
    np.save(directory / "x.npy", IMAGES)
    return [f"{name}:train"]


@pytest.mark.quick(2)
@pytest.mark.parametrize("data", [as_npy, as_function, as_npz, as_npz_named, as_folder])
def test_recalibrate_gives_the_statistics_of_all_data_as_one_batch(
    capsys, tmp_path, monkeypatch, saved, data
):
    monkeypatch.chdir(tmp_path)
    before = saved.read_bytes()
    out = tmp_path / "out.keras"
    arguments = ["--method", "exact", "--batch-size", 7, "--out", out]
    run_for_json(capsys, "recalibrate", saved, *arguments, "--data", *data(tmp_path))
    assert_equal(held(out), whole_batch(saved, IMAGES))
    assert saved.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_recalibrate_changes_nothing_but_the_statistics(capsys, tmp_path, saved):
    out = tmp_path / "out.keras"
    assert run(capsys, "recalibrate", saved, "--data", *as_npy(tmp_path), "--out", out)[0] == 0
    before, after = keras.models.load_model(saved), keras.models.load_model(out)
    assert after.get_config() == before.get_config()
    assert after.optimizer.iterations == before.optimizer.iterations == 2
    for old, new in zip(before.trainable_weights, after.trainable_weights, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())


def test_one_pass_sweep_is_of_batches_of_the_size_asked_for(capsys, tmp_path, saved):
    """With batches of 10, the second layer's mean is the mean of three batches in training mode."""
    out = tmp_path / "out.keras"
    data = as_npy(tmp_path)
    arguments = ["recalibrate", saved, "--method", "pooled", "--data", *data]
    run_for_json(capsys, *arguments, "--out", out, "--batch-size", 30)
    assert_equal(held(out), whole_batch(saved, IMAGES))
    arguments += ["--out", tmp_path / "b.keras", "--batch-size", 10, "--json"]
    code, _, err = run(capsys, *arguments)
    assert code == 0 and err.startswith("tfbn: warning: A one-pass sweep") and err.count("\n") == 1
    parts = [whole_batch(saved, IMAGES[start : start + 10]) for start in (0, 10, 20)]
    mean = np.mean([part[1][0] for part in parts], axis=0)
    variance = np.mean([part[1][1] + (part[1][0] - mean) ** 2 for part in parts], axis=0)
    assert_equal(held(tmp_path / "b.keras")[1:], [(mean, variance)])


def test_arrays_of_several_inputs_go_by_name(capsys, tmp_path):
    model = two_inputs()
    model.save(tmp_path / "model.keras")
    x = {name: rng.normal(size=(20, 3)).astype("float32") for name in "ba"}
    np.savez(tmp_path / "x.npz", **x, targets=np.zeros(20))
    arguments = ["--data", tmp_path / "x.npz", "--out", tmp_path / "out.keras", "--method", "exact"]
    run_for_json(capsys, "recalibrate", tmp_path / "model.keras", *arguments)
    assert_equal(held(tmp_path / "out.keras"), whole_batch(tmp_path / "model.keras", x))


def test_inspect_says_not_known_then_swept_then_stale(capsys, tmp_path, saved):
    code, out, _ = run(capsys, "inspect", saved)
    assert code == 0 and "statistics: not known" in out and "never" not in out
    assert run(capsys, "inspect", saved, "--check")[0] == 1
    swept = tmp_path / "swept.keras"
    arguments = ["--data", *as_npy(tmp_path), "--method", "exact", "--out", swept]
    run_for_json(capsys, "recalibrate", saved, *arguments)
    code, out, _ = run(capsys, "inspect", swept, "--check")
    assert code == 0
    assert "swept, method='exact', 30 samples in 1 batches of at most 30" in out
    assert len(re.findall(r"^batch_normalization\S* +[34] +0.99 +0.001 +yes", out, re.M)) == 2
    model = keras.models.load_model(swept)
    model.layers[0].kernel.assign_add(keras.ops.ones_like(model.layers[0].kernel))
    model.save(tmp_path / "changed.keras")
    # Keras drops the record. A manually combined file has a wrong one.
    with (
        zipfile.ZipFile(swept) as source,
        zipfile.ZipFile(tmp_path / "changed.keras", "a") as target,
    ):
        assert RECORD not in target.namelist()
        target.writestr(RECORD, source.read(RECORD))
    assert run(capsys, "inspect", tmp_path / "changed.keras")[0] == 0
    code, out, _ = run(capsys, "inspect", tmp_path / "changed.keras", "--check")
    assert code == 1 and "stale: the weights have changed since the sweep" in out
    keras.Sequential([keras.Input((2,)), layers.Dense(1)]).save(tmp_path / "none.keras")
    code, out, _ = run(capsys, "inspect", tmp_path / "none.keras", "--check")
    assert code == 0 and "no batch norm layers" in out


@pytest.mark.slow
def test_a_sweep_in_python_is_known_of_a_file_with_our_layers(capsys, tmp_path, saved):
    model = keras.models.load_model(saved)
    tfbn.update_population_stats(model, IMAGES, verbose=0)
    model.save(tmp_path / "ours.keras")
    code, out, _ = run(capsys, "inspect", tmp_path / "ours.keras", "--check")
    assert code == 0 and "swept, method='exact', 30 samples" in out
    exported = run_for_json(capsys, "export", tmp_path / "ours.keras", tmp_path / "served")
    described = run_for_json(capsys, "describe", exported["path"])
    assert described["stale"] is None and described["statistics"]["samples"] == 30
    model.layers[0].kernel.assign_add(model.layers[0].kernel)
    model.save(tmp_path / "changed.keras")
    code, out, _ = run(capsys, "inspect", tmp_path / "changed.keras", "--check")
    assert code == 1 and "stale: the weights have changed since the sweep" in out
    stock = two_inputs()  # A file stores no sweep of Keras's layers.
    tfbn.update_population_stats(stock, dict.fromkeys("ab", IMAGES[:, 0, :3, 0]), verbose=0)
    stock.save(tmp_path / "stock.keras")
    code, out, _ = run(capsys, "inspect", tmp_path / "stock.keras", "--check")
    assert code == 1 and "not known: no sweep" in out and "never" not in out
    code, _, err = run(capsys, "export", tmp_path / "stock.keras", tmp_path / "stock")
    assert code == 0 and "no sweep of them is known" in err and "never" not in err


def test_a_damaged_record_is_no_error_but_told(capsys, tmp_path, saved):
    model = keras.models.load_model(saved)
    tfbn.update_population_stats(model, IMAGES, verbose=0)
    model.save(tmp_path / "whole.keras")
    with (
        zipfile.ZipFile(tmp_path / "whole.keras") as whole,
        zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad,
    ):
        for name in whole.namelist():
            bad.writestr(name, b"PK" if name.endswith(ASSET) else whole.read(name))
    code, out, _ = run(capsys, "inspect", tmp_path / "bad.keras", "--check")
    assert code == 1 and "not known: the record of their sweep in the model's file is" in out
    code, _, err = run(capsys, "export", tmp_path / "bad.keras", tmp_path / "served")
    assert code == 0 and err.startswith("tfbn: warning: ") and "record of their sweep" in err


def test_inspect_and_compare_give_the_drift(capsys, tmp_path, saved):
    swept = tmp_path / "swept.keras"
    run_for_json(capsys, "recalibrate", saved, "--data", *as_npy(tmp_path), "--out", swept)
    printed = run_for_json(capsys, "inspect", swept)
    assert printed["state"] == "swept"
    stats = tfbn.PopulationStats.read(keras.models.load_model(saved))
    stats.save(tmp_path / "moving.npz")
    compared = run_for_json(capsys, "compare", saved, swept, tmp_path / "moving.npz")
    assert compared["of_other_weights"] == []
    expected = zip(held(swept), held(saved), printed["layers"], strict=True)
    for (mean, variance), (old_mean, old_variance), path in expected:
        shift = (old_mean - mean) / np.sqrt(variance)
        ratio = np.sqrt(old_variance / variance)
        for drift in printed["layers"][path], compared["layers"][path]:
            np.testing.assert_allclose(
                [drift["mean_shift"], drift["mean_shift_max"], drift["std_ratio"]],
                [np.sqrt(np.mean(shift**2)), np.abs(shift).max(), np.exp(np.log(ratio).mean())],
                rtol=1e-5,
            )
    code, out, _ = run(capsys, "compare", saved, saved, saved)
    assert code == 0 and out.count("0.000 std") == 4


def test_compare_says_when_weights_are_others(capsys, tmp_path, saved):
    model = keras.models.load_model(saved)
    model.layers[-1].bias.assign_add([1.0, 0.0])
    model.save(tmp_path / "other.keras")
    printed = run_for_json(capsys, "compare", saved, saved, tmp_path / "other.keras")
    assert printed["of_other_weights"] == [str(tmp_path / "other.keras")]
    two_inputs().save(tmp_path / "two.keras")


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 1]])
def test_compare_names_the_file_of_another_model(capsys, tmp_path, saved, order):
    files = [saved, tmp_path / "two.keras"]
    two_inputs().save(files[1])
    line = fails(capsys, "compare", saved, *(files[i] for i in order))
    assert f"layers of {saved}. Received: {files[1]}, with layer " in line


def test_compare_needs_layers_that_both_have(capsys, tmp_path, saved):
    stats = tfbn.PopulationStats.read(keras.models.load_model(saved))
    files = {path: tmp_path / f"{path[-1]}.npz" for path in stats}
    for path, file in files.items():
        tfbn.PopulationStats({path: stats[path]}, method="assigned").save(file)
    line = fails(capsys, "compare", saved, *files.values())
    assert all(f"{file} with {path!r}" in line for path, file in files.items())
    plain = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(plain)
    assert f"{plain}, without any" in fails(capsys, "compare", saved, saved, plain)


def test_compare_refuses_statistics_of_other_shapes(capsys, tmp_path, saved):
    stats = tfbn.PopulationStats.read(keras.models.load_model(saved))
    wide = {path: tfbn.LayerStats(1, np.zeros(9), np.ones(9)) for path in stats}
    tfbn.PopulationStats(wide, method="assigned").save(tmp_path / "wide.npz")
    line = fails(capsys, "compare", saved, saved, tmp_path / "wide.npz")
    assert "wide.npz" in line and "(9,)" in line


@pytest.mark.slow
def test_export_passes_the_sweep_on(capsys, tmp_path, saved):
    swept = tmp_path / "swept.keras"
    run_for_json(capsys, "recalibrate", saved, "--data", *as_npy(tmp_path), "--out", swept)
    exported = run_for_json(capsys, "export", swept, tmp_path / "serving" / "small")
    loaded = tf.saved_model.load(exported["path"])
    expected = keras.models.load_model(swept).predict(IMAGES, verbose=0)
    np.testing.assert_allclose(loaded.serve(IMAGES), expected, rtol=1e-5, atol=1e-6)
    printed = run_for_json(capsys, "describe", tmp_path / "serving" / "small")
    assert printed["stale"] is None
    assert printed["statistics"]["samples"] == 30
    code, out, _ = run(capsys, "describe", exported["path"])
    assert code == 0 and "30 samples" in out
    # A model without a sweep is exported with a warning.
    code, _, err = run(capsys, "export", saved, tmp_path / "serving" / "never")
    assert code == 0 and err.startswith("tfbn: warning: ") and err.count("\n") == 1
    assert run_for_json(capsys, "describe", tmp_path / "serving" / "never")["stale"]


def test_export_is_verified_on_a_sample(capsys, tmp_path):
    """The network returns NaN for random numbers in [0, 1)."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    root = layers.Rescaling(1.0, offset=-2.0)(a)
    outputs = layers.Activation("log_softmax")(keras.ops.sqrt(root) + b)
    keras.Model([a, b], outputs).save(tmp_path / "model.keras")
    line = fails(capsys, "export", tmp_path / "model.keras", tmp_path / "served")
    assert "random numbers" in line
    rows = rng.uniform(3, 9, (100, 3)).astype("float32")
    rows[40:] = 0  # Only the first inputs are used.
    np.savez(tmp_path / "x.npz", b=rows, a=rows, other=np.zeros(7))
    sample = ["--sample", tmp_path / "x.npz"]
    printed = run_for_json(capsys, "export", tmp_path / "model.keras", tmp_path / "served", *sample)
    served = tf.saved_model.load(printed["path"]).serve([rows[:5], rows[:5]])
    np.testing.assert_allclose(served, tf.nn.log_softmax(np.sqrt(rows[:5] - 2) + rows[:5]), 1e-5)


def test_samples_that_do_not_fit_are_one_line(capsys, tmp_path, saved):
    (tmp_path / "bad.npz").write_text("text")
    np.save(tmp_path / "wide.npy", IMAGES[:, :, 1:])
    np.save(tmp_path / "number.npy", np.float32(1))
    np.savez(tmp_path / "names.npz", a=IMAGES, b=IMAGES)
    for name, says in (
        ("missing.npy", "no such file"),
        ("bad.npz", "damaged"),
        ("wide.npy", "in sample"),
        ("number.npy", "axis of samples"),
        ("names.npz", "named 'image'"),
        (".", "another kind of file"),
    ):
        line = fails(capsys, "export", saved, tmp_path / "served", "--sample", tmp_path / name)
        assert says in line and str(tmp_path / name) in line
    assert not (tmp_path / "served").exists()


def test_a_new_signature_has_to_be_allowed(capsys, tmp_path, saved):
    served = tmp_path / "served"
    run(capsys, "export", saved, served)
    keras.Sequential([keras.Input((2,), name="x"), layers.Dense(1)]).save(tmp_path / "new.keras")
    assert "--allow-new-signature" in fails(capsys, "export", tmp_path / "new.keras", served)
    assert os.listdir(served) == ["1"]
    allowed = ["export", tmp_path / "new.keras", served, "--allow-new-signature"]
    assert run_for_json(capsys, *allowed)["version"] == 2


def test_nothing_is_overwritten(capsys, tmp_path, saved):
    taken = tmp_path / "taken.keras"
    taken.write_text("mine")
    data = as_npy(tmp_path)
    assert "exists" in fails(capsys, "recalibrate", saved, "--data", *data, "--out", taken)
    assert taken.read_text() == "mine"
    own = shutil.copy(saved, tmp_path / "own.keras")
    before = pathlib.Path(own).read_bytes()
    fails(capsys, "recalibrate", own, "--data", *data, "--out", own)
    assert pathlib.Path(own).read_bytes() == before


def test_a_name_that_is_taken_during_the_sweep_is_not_overwritten(
    capsys, monkeypatch, tmp_path, saved
):
    out = tmp_path / "out.keras"
    sweep = tfbn.collect

    def sweep_while_another_writes(*args, **options):
        out.write_text("theirs")
        return sweep(*args, **options)

    monkeypatch.setattr(tfbn, "collect", sweep_while_another_writes)
    data = as_npy(tmp_path)
    code, _, err = run(capsys, "recalibrate", saved, "--data", *data, "--out", out, "--json")
    assert code == 2 and "exists" in err
    assert out.read_text() == "theirs"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.keras", "x.npy"]


class Touch:
    """Run a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Create a file when it is loaded."""
        return os.system, (f"touch {self.path}",)


def test_code_in_files_is_refused(capsys, tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Lambda(lambda x: x * 2)(inputs)))
    model.save(tmp_path / "lambda.keras")
    assert "--unsafe" in fails(capsys, "inspect", tmp_path / "lambda.keras")
    code, out, _ = run(capsys, "inspect", tmp_path / "lambda.keras", "--unsafe")
    assert code == 0 and "1 batch norm layers" in out
    array = np.array([Touch(tmp_path / "pwned")], object)
    np.save(tmp_path / "hostile.npy", array, allow_pickle=True)
    np.savez(tmp_path / "hostile.npz", x=array)
    two_inputs().save(tmp_path / "model.keras")
    for name in ("hostile.npy", "hostile.npz"):
        arguments = ["--data", tmp_path / name, "--out", tmp_path / "out.keras"]
        code, _, err = run(capsys, "recalibrate", tmp_path / "model.keras", *arguments)
        assert code == 2 and err.count("\n") == 1
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out.keras").exists()


def test_errors_are_one_line_that_says_what_to_do(capsys, tmp_path, saved):
    out = ["--out", tmp_path / "out.keras"]
    data = ["--data", *as_npy(tmp_path)]
    assert "no such file" in fails(capsys, "inspect", tmp_path / "missing.keras")
    (tmp_path / "text.keras").write_text("text")
    assert ".keras file" in fails(capsys, "inspect", tmp_path / "text.keras")
    assert "missing.npy" in fails(
        capsys, "recalibrate", saved, *out, "--data", tmp_path / "missing.npy"
    )
    assert "only for images" in fails(capsys, "recalibrate", saved, *out, *data, "--scale", "2")
    assert ".keras" in fails(capsys, "recalibrate", saved, *data, "--out", tmp_path / "out.h5")
    np.savez(tmp_path / "two.npz", a=IMAGES, b=IMAGES)
    assert "['a', 'b']" in fails(capsys, "recalibrate", saved, *out, "--data", tmp_path / "two.npz")
    frozen = keras.models.load_model(saved)
    frozen.trainable = False
    frozen.save(tmp_path / "frozen.keras")
    line = fails(capsys, "recalibrate", tmp_path / "frozen.keras", *out, *data)
    assert "--include-frozen" in line
    assert not (tmp_path / "out.keras").exists()
    run_for_json(capsys, "recalibrate", tmp_path / "frozen.keras", *out, *data, "--include-frozen")
    assert_equal(held(tmp_path / "out.keras"), whole_batch(saved, IMAGES))
    assert "tfbn.export" in fails(capsys, "describe", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["recalibrate", "m.keras"], ["inspect", "m", "--batch-size", "0"]],
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: tfbn" in capsys.readouterr().err


def test_interruption_is_clean(capsys, monkeypatch, tmp_path, saved):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "save", interrupted)
    out = ["--out", tmp_path / "out.keras", "--data", *as_npy(tmp_path), "--json"]
    code, _, err = run(capsys, "recalibrate", saved, *out)
    assert (code, err) == (130, "tfbn: interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.slow
def test_control_c_ends_the_process_at_once(tmp_path, saved):
    np.save(tmp_path / "x.npy", np.zeros((3_000_000, 6, 5, 1), "uint8"))
    files = [saved, "--data", tmp_path / "x.npy", "--out", tmp_path / "out.keras"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tfbn", "recalibrate", *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job and its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()  # The sweep has started.
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and err.endswith("tfbn: interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_a_tolerance_sweeps_a_sample(capsys, tmp_path, saved):
    images = np.tile(IMAGES, (100, 1, 1, 1))
    np.save(tmp_path / "x.npy", images)
    arguments = ["recalibrate", saved, "--data", tmp_path / "x.npy", "--out", tmp_path / "o.keras"]
    printed = run_for_json(capsys, *arguments, "--tolerance", "0.1")
    assert printed["tolerance"] == 0.1 and printed["samples"] < len(images) / 2
    for (mean, variance), (exact, of_all) in zip(
        held(tmp_path / "o.keras"), whole_batch(saved, IMAGES), strict=True
    ):
        assert np.abs(mean - exact).max() < 0.5 * np.sqrt(of_all).max()
        assert np.abs(np.sqrt(variance / of_all) - 1).max() < 0.5
    for wrong in ("0", "1.5", "nan", "much"):
        with pytest.raises(SystemExit):
            run(capsys, *arguments, "--tolerance", wrong)
        assert "is no number over 0 and up to 1" in capsys.readouterr().err


def sorted_by_class():
    """Return 1,500 images of ten classes of different brightness, sorted by class."""
    values = np.random.default_rng(0).integers(0, 24, (1500, 6, 5, 1))
    return (values + 23 * np.arange(10).repeat(150)[:, None, None, None]).astype("uint8")


def folder_by_class(directory):
    """Write a PNG file for each image, in a folder for each class."""
    for number, image in enumerate(sorted_by_class()):
        file = directory / "images" / str(number // 150) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tf.io.encode_png(image).numpy())
    return [directory / "images"]


def npy_by_class(directory):
    """Write one array."""
    np.save(directory / "x.npy", sorted_by_class().astype("float32"))
    return [directory / "x.npy"]


def npz_by_class(directory):
    """Write a .npz file."""
    np.savez(directory / "x.npz", image=sorted_by_class().astype("float32"))
    return [directory / "x.npz"]


def stream_by_class(directory):
    """Write a function that returns a dataset, which supports only sequential reads."""
    np.save(directory / "x.npy", sorted_by_class().astype("float32"))
    (directory / "sorted_stream.py").write_text(
        "import numpy, pathlib, tensorflow as tf\n"
        "def read():\n"
        "    x = numpy.load(pathlib.Path(__file__).with_name('x.npy'))\n"
        "    return tf.data.Dataset.from_tensor_slices(x).batch(32)\n"
    )
    return ["sorted_stream:read"]


@pytest.mark.parametrize(
    "data, at_random",
    [(folder_by_class, True), (npy_by_class, True), (npz_by_class, True), (stream_by_class, False)],
)
def test_a_sample_of_data_sorted_by_class(capsys, monkeypatch, tmp_path, data, at_random):
    """It has all classes if it can be drawn at random; otherwise a warning is issued."""
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs = keras.Input((6, 5, 1), name="image")
    model = keras.Model(inputs, layers.BatchNormalization(name="norm")(inputs))
    model.save(tmp_path / "m.keras")
    out = ["--out", tmp_path / "o.keras", "--tolerance", "0.05", "--json"]
    given = ["recalibrate", tmp_path / "m.keras", "--data", *data(tmp_path)]
    code, text, err = run(capsys, *given, *out)
    assert code == 0
    samples = json.loads(text)["samples"]
    [(_, variance)] = held(tmp_path / "o.keras")
    off = np.sqrt(variance / np.var(sorted_by_class().astype("float64")))[0]
    if at_random:
        assert samples < 1500 and off == pytest.approx(1, abs=0.1) and err == ""
    else:
        assert "half" in err or (samples == 1500 and off == pytest.approx(1, abs=1e-3))
