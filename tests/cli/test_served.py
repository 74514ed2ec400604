"""Tests of export, convert, fold and drift."""

import importlib.util
import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import fails, network, run, run_for_json

import tfbn
from tfbn.models.keras_models import batch_norm_layers

IMAGES = np.random.default_rng(0).random((30, 6, 5, 1)).astype("float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model that the command line has swept, which records the sweep."""
    home = tmp_path_factory.mktemp("models")
    network().save(home / "before.keras")
    np.save(home / "x.npy", IMAGES)
    files = [home / "before.keras", "--data", home / "x.npy", "--out", home / "model.keras"]
    assert tfbn.cli.main(["recalibrate", *map(str, files), "--json"]) == 0
    return home / "model.keras"


@pytest.fixture(scope="module")
def served(saved, tmp_path_factory):
    """Return the directory of an export with the monitor."""
    path = tmp_path_factory.mktemp("served") / "model"
    assert tfbn.cli.main(["export", str(saved), str(path), "--monitor", "--json"]) == 0
    return path


def answers(served, images):
    """Return the JSON answers of the REST interface to requests of one image."""
    monitor = tf.saved_model.load(os.fspath(served / "1")).signatures["monitor"]

    def plain(value):
        text = value.dtype == tf.string
        return (value.numpy().astype(str) if text else value.numpy()).tolist()

    return [
        {
            "outputs": {
                name: plain(value) for name, value in monitor(tf.constant(image[None])).items()
            }
        }
        for image in images
    ]


FORMS = {
    "a list": json.dumps,
    "lines": lambda answers: "\n".join(map(json.dumps, answers)),
    "one after the other": lambda answers: "".join(json.dumps(a, indent=1) + "\n" for a in answers),
}


@pytest.mark.parametrize("form", FORMS)
def test_drift_is_exit_status_1(capsys, tmp_path, served, form):
    own, dark = answers(served, IMAGES[:20]), answers(served, 0.2 * IMAGES[:20])
    (tmp_path / "own.json").write_text(FORMS[form](own))
    (tmp_path / "dark.json").write_text(FORMS[form](dark))
    code, out, err = run(capsys, "drift", served, tmp_path / "own.json")
    assert (code, err) == (0, "") and out.startswith("20 samples cannot be told from")
    code, out, err = run(capsys, "drift", served, tmp_path / "dark.json")
    assert (code, err) == (1, "") and out.startswith("20 samples have moved from")
    expected = tfbn.ServedStats(served)
    for answer in dark:
        expected.add(answer)
    code, out, _ = run(capsys, "drift", served / "1", tmp_path / "dark.json", "--json")
    printed = json.loads(out)
    assert code == 1 and printed["drifted"] and printed["samples"] == 20
    assert printed["p_value"] == expected.compare().p_value < 0.001


def test_an_archive_is_one_answer(capsys, tmp_path, served):
    """Fewer than 16 samples raise no alarm at any distance."""
    monitor = tf.saved_model.load(os.fspath(served / "1")).signatures["monitor"]
    for count, code, says in ((16, 1, "16 samples have moved"), (5, 0, "5 of 16 samples: too few")):
        answer = monitor(tf.constant(0.1 * IMAGES[:count]))
        arrays = {name: value.numpy() for name, value in answer.items()}
        np.savez(tmp_path / "a.npz", **arrays)  # Text as Python objects
        assert "astype(bytes)" in fails(capsys, "drift", served, tmp_path / "a.npz")
        text = {name: y.astype(bytes) for name, y in arrays.items() if y.dtype == object}
        np.savez(tmp_path / "a.npz", **{**arrays, **text})
        printed = run(capsys, "drift", served, tmp_path / "a.npz")
        assert printed[0] == code and printed[1].startswith(says) and not printed[2]
    code, out, _ = run(capsys, "drift", served, tmp_path / "a.npz", "--json")
    assert json.loads(out)["p_value"] is None


def test_answers_that_are_none_fail_with_2(capsys, tmp_path, served, saved):
    for content, says in (("", "empty file"), ("{", "Expecting"), ('{"a": 1}', "'monitor'")):
        (tmp_path / "a.json").write_text(content)
        assert says in fails(capsys, "drift", served, tmp_path / "a.json")
    (tmp_path / "a.npz").write_text("text")
    assert "a.npz" in fails(capsys, "drift", served, tmp_path / "a.npz")
    run(capsys, "export", saved, tmp_path / "plain")
    (tmp_path / "a.json").write_text("[]")
    assert "monitor=True" in fails(capsys, "drift", tmp_path / "plain", tmp_path / "a.json")
    assert "none so far" in fails(capsys, "drift", served, tmp_path / "a.json")


def test_export_monitors_the_layers_that_are_named(capsys, tmp_path, saved):
    paths = list(run_for_json(capsys, "inspect", saved)["layers"])
    run_for_json(capsys, "export", saved, tmp_path / "m", "--monitor", paths[1])
    described = run_for_json(capsys, "describe", tmp_path / "m")
    assert list(described["monitor"]["epsilon"]) == paths[1:]
    line = fails(capsys, "export", saved, tmp_path / "m", "--monitor", "no_layer")
    assert "no_layer" in line


def test_export_folds_and_requires_the_population(capsys, tmp_path, saved):
    options = ["--fold", "--require-population"]
    run_for_json(capsys, "export", saved, tmp_path / "m", *options)
    assert run_for_json(capsys, "describe", tmp_path / "m")["folded"]
    before = saved.with_name("before.keras")
    line = fails(capsys, "export", before, tmp_path / "n", *options)
    assert "tfbn recalibrate" in line and not (tmp_path / "n").exists()
    code, _, err = run(capsys, "export", before, tmp_path / "n", "--fold")
    assert code == 0 and "`tfbn recalibrate`" in err
    with pytest.raises(SystemExit) as exited:
        run(capsys, "export", saved, tmp_path / "m", "--fold", "--monitor")
    assert exited.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_export_writes_requests_for_warm_up(capsys, tmp_path, saved):
    pytest.importorskip("tensorflow_serving")
    np.save(tmp_path / "x.npy", IMAGES)
    run_for_json(capsys, "export", saved, tmp_path / "m", "--warmup", tmp_path / "x.npy")
    file = tmp_path / "m" / "1" / "assets.extra" / "tf_serving_warmup_requests"
    assert len(list(tf.data.TFRecordDataset(str(file)))) == 1  # 30 images


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_serving") is not None, reason="It is installed."
)
def test_warm_up_without_its_package_says_what_to_install(capsys, tmp_path, saved):
    np.save(tmp_path / "x.npy", IMAGES)
    code, out, err = run(capsys, "export", saved, tmp_path / "m", "--warmup", tmp_path / "x.npy")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tfbn: Warm-up needs ") and "tfbn[serving]" in err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command, layers", [("convert", 2), ("fold", 0)])
def test_copies_predict_the_same(capsys, tmp_path, saved, command, layers):
    out = tmp_path / "copy.keras"
    printed = run_for_json(capsys, command, saved, "--out", out)
    assert printed == {"out": str(out), "batch_norm_layers": layers}
    copy, model = keras.models.load_model(out), keras.models.load_model(saved)
    norms = batch_norm_layers(copy).values()
    assert [type(layer) for layer in norms] == [tfbn.BatchNormalization] * layers
    np.testing.assert_allclose(
        copy.predict(IMAGES, verbose=0), model.predict(IMAGES, verbose=0), rtol=1e-5, atol=1e-6
    )
    # The sweep of the statistics is still known.
    assert run(capsys, "inspect", out, "--check")[0] == 0


def test_describe_prints_layers_below_their_statistics(capsys, served):
    code, out, _ = run(capsys, "describe", served)
    lines = out.splitlines()
    assert code == 0 and len(lines[1]) == len("weights: ") + 12
    at = next(i for i, line in enumerate(lines) if line.startswith("batch norm statistics:"))
    assert [line[:2] for line in lines[at + 1 : at + 4]] == ["  ", "  ", "mo"]
