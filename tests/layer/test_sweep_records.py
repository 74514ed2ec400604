"""Records of sweeps, in memory and in the files of models."""

import io
import os
import pathlib
import subprocess
import sys
import zipfile
from random import Random

import keras
import numpy as np
import pytest
from damage import damaged
from keras import layers

import tfbn
from tfbn.layer import sweep_records
from tfbn.serving import sweeps
from tfbn.serving.sweeps import Sweep, sweep_of

rng = np.random.default_rng(0)
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* is called . times")
X = rng.normal(2, 3, (24, 2, 4)).astype("float32")


def network(bn=tfbn.BatchNormalization):
    """Build batch norm in a model, in a nested model and in a wrapper; one layer is shared."""
    keras.utils.set_random_seed(0)
    block = keras.Sequential([keras.Input((2, 3)), bn(name="bn"), layers.Dense(3)], name="block")
    x = inputs = keras.Input((2, 4), name="x")
    x = layers.Dense(3, name="first")(bn(name="bn")(x))
    x = block(layers.Activation("tanh")(block(x)))
    x = layers.TimeDistributed(bn(name="inner"), name="each")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x), name="network")
    model.compile("sgd", "mse")
    return model


def swept(bn=tfbn.BatchNormalization):
    """Build the network and sweep it."""
    model = network(bn)
    tfbn.update_population_stats(model, X, verbose=0)
    assert sweep_of(model).stale is None
    return model


def through_a_file(model, path="model.keras", **options):
    """Save and load a model."""
    model.save(path, **options)
    return keras.models.load_model(path)


def assets(path="model.keras"):
    """Return the assets of tfbn in a file."""
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if name.endswith(sweep_records.ASSET)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Change to an empty working directory."""
    monkeypatch.chdir(tmp_path)


def assert_same_sweep(a, b):
    """Require equal records of two models."""
    a, b = sweep_of(a).stats, sweep_of(b).stats
    assert a.to_bytes() == b.to_bytes()


def test_files_store_records_of_our_layers():
    model = swept()
    loaded = through_a_file(model)
    assert len(assets()) == 3
    assert sweep_of(loaded).stale is None and len(sweep_of(loaded).stats) == 3
    assert_same_sweep(model, loaded)
    again = through_a_file(loaded, "again.keras")  # The stored bytes are copied unchanged.
    assert sweep_of(again).stale is None
    assert_same_sweep(model, again)


@pytest.mark.quick(2)
@pytest.mark.parametrize("where", ["first", "head", "block", "bn"])
def test_training_after_loading_is_detected(where):
    loaded = through_a_file(swept())
    layer = loaded.get_layer(where)
    layer = layer.layers[-1] if where == "block" else layer
    variable = layer.moving_mean if where == "bn" else layer.bias
    variable.assign_add(np.ones(variable.shape))
    stale = sweep_of(loaded).stale
    assert (stale is None) == (where == "head")  # No statistics depend on the head.
    assert stale is None or "changed since the sweep" in stale
    assert sweep_of(through_a_file(loaded)).stale == stale


@pytest.mark.slow
def test_fit_after_loading_is_detected():
    loaded = through_a_file(swept())
    loaded.fit(X, np.zeros((24, 2, 2)), verbose=0)
    assert "changed since the sweep" in sweep_of(loaded).stale
    assert "changed since the sweep" in sweep_of(through_a_file(loaded)).stale


def test_part_of_a_loaded_model_has_its_record():
    loaded = through_a_file(swept())
    x = keras.Input((2, 4), name="x")
    part = keras.Model(x, layers.Dense(7)(loaded.get_layer("bn")(x)))
    assert sweep_of(part).stale is None
    part = through_a_file(part, "part.keras")
    assert sweep_of(part).stale is None and list(sweep_of(part).stats) == ["bn"]


def test_files_store_no_records_of_stock_layers():
    model = swept(layers.BatchNormalization)
    loaded = through_a_file(model)
    assert assets() == []
    assert sweep_of(loaded) == Sweep(None, "no sweep of them is known")


def test_stock_layers_next_to_ours_are_checked_by_values():
    ours, theirs = tfbn.BatchNormalization(name="ours"), layers.BatchNormalization(name="theirs")
    model = keras.Sequential([keras.Input((4,)), theirs, layers.Dense(3), ours])
    tfbn.update_population_stats(model, X[:, 0], verbose=0)
    loaded = through_a_file(model)
    assert sweep_of(loaded).stale is None
    loaded.get_layer("theirs").moving_mean.assign(np.ones(4))
    assert "'theirs'" in sweep_of(loaded).stale


def test_keras_writes_no_assets_into_folders():
    loaded = through_a_file(swept(), "folder", zipped=False)
    assert sweep_of(loaded) == Sweep(None, "no sweep of them is known")


def test_unswept_layers_have_no_asset():
    loaded = through_a_file(network())
    assert assets() == []
    with zipfile.ZipFile("model.keras") as archive:
        assert len(archive.namelist()) == 3  # The three files that Keras writes.
    assert sweep_of(loaded).stats is None


def test_undone_sweeps_have_no_asset():
    model = swept()
    sweep_of(model).stats.previous.assign(model)
    assert sweep_of(through_a_file(model)).stats is None and assets() == []


def test_loading_weights_creates_no_record_and_no_stale_one():
    model, other = swept(), network()
    model.save_weights("model.weights.h5")
    other.load_weights("model.weights.h5")
    model.save("model.keras")
    other.load_weights("model.keras")  # Keras loads only the weights of a .keras file here.
    assert sweep_of(other).stats is None
    network().save_weights("new.weights.h5")
    model.load_weights("new.weights.h5")
    assert "changed since the sweep" in sweep_of(model).stale
    model.load_weights("model.weights.h5")
    assert sweep_of(model).stale is None


def test_clones_have_no_record():
    clone = keras.models.clone_model(swept())
    assert sweep_of(clone).stats is None


@pytest.mark.slow
def test_callback_and_checkpoints_store_records():
    model = network()
    checkpoint = keras.callbacks.ModelCheckpoint("epoch.keras")
    training = keras.callbacks.ModelCheckpoint("training.keras")
    callback = tfbn.PopulationStatsCallback(X, every_epoch=True)
    y = np.zeros((24, 2, 2))
    model.fit(X, y, verbose=0, callbacks=[training, callback, checkpoint])
    for path, known in (("epoch.keras", True), ("training.keras", False)):
        assert (sweep_of(keras.models.load_model(path)).stats is not None) == known
    assert sweep_of(keras.models.load_model("epoch.keras")).stale is None
    assert sweep_of(through_a_file(model)).stale is None


WITHOUT_TFBN = """
import keras, numpy as np
class BatchNormalization(keras.layers.BatchNormalization):
    "As the layer of tfbn was before it had assets. Weights go by the name of the class."
for cls in (BatchNormalization, keras.layers.BatchNormalization):
    model = keras.models.load_model("model.keras", custom_objects={"tfbn>BatchNormalization": cls})
    assert {type(layer) for layer in model._flatten_layers()} > {cls}
    np.testing.assert_allclose(model(np.load("x.npy")), np.load("y.npy"), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_files_load_without_tfbn():
    model = swept()
    model.save("model.keras")
    np.save("x.npy", X)
    np.save("y.npy", model(X))
    done = subprocess.run([sys.executable, "-c", WITHOUT_TFBN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("directory", [True, False])
def test_files_without_assets_load(directory):
    """The directory is saved with zipped=False and contains another file."""
    model = network()
    if directory:
        model.save("model", zipped=False)
        pathlib.Path("model/README").touch()
    else:
        model.save("model.keras")
        with zipfile.ZipFile("model.keras", "a") as archive:
            archive.writestr("other", b"")
    loaded = keras.models.load_model("model" if directory else "model.keras")
    assert sweep_of(loaded).stats is None


def with_asset(content, source, target):
    """Copy a file and replace the content of its assets; `None` makes them folders."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            ours = name.endswith(sweep_records.ASSET)
            if ours and content is None:
                new.mkdir(name)
            else:
                new.writestr(name, content if ours else old.read(name))


@pytest.mark.slow
def test_damaged_record_is_an_error_only_on_use():
    model = swept()
    model.save("model.keras")
    [name, *_] = assets()
    with zipfile.ZipFile("model.keras") as archive:
        whole = archive.read(name)
    for content in (b"", b"nothing", whole[:-1], whole + b"\0", zip_of(b"{}"), whole * 2):
        with_asset(content, "model.keras", "bad.keras")
        loaded = keras.models.load_model("bad.keras")
        np.testing.assert_array_equal(loaded(X), model(X))
        stats, stale = sweep_of(loaded)
        assert stats is None and "record of their sweep in the model's file is damaged" in stale
    with pytest.raises(ValueError, match="is damaged"):
        tfbn.export(loaded, "served", require_population=True)
    assert not os.path.exists("served")
    tfbn.update_population_stats(loaded, X, verbose=0)  # A new sweep repairs the record.
    assert sweep_of(through_a_file(loaded)).stale is None


def zip_of(header):
    """Return an archive with a given header."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("header.npy", header)
    return content.getvalue()


def test_folder_in_place_of_the_asset_is_ignored():
    swept().save("model.keras")
    with_asset(None, "model.keras", "bad.keras")
    assert sweep_of(keras.models.load_model("bad.keras")).stats is None


def test_record_of_another_model_is_stale():
    other = keras.Sequential([keras.Input((4,)), tfbn.BatchNormalization(name="bn")])
    tfbn.update_population_stats(other, X[:, 0], verbose=0)
    content = sweeps.origin_of(other.layers[0]).to_bytes()
    swept().save("model.keras")
    with_asset(content, "model.keras", "bad.keras")
    assert "has changed since the sweep" in sweep_of(keras.models.load_model("bad.keras")).stale


@pytest.mark.parametrize("count", [300, pytest.param(30_000, marks=pytest.mark.slow)])
def test_damage_is_an_error_or_harmless(count):
    model = swept()
    whole = sweeps.origin_of(model.get_layer("bn"))
    content = whole.to_bytes()
    assert sweeps.origin_from_bytes(content).to_bytes() == content
    random = Random(1)
    for _ in range(count):
        try:
            actual = sweeps.origin_from_bytes(damaged(content, random))
        except ValueError:
            continue
        assert actual.to_bytes() == content


def test_loading_without_a_record_deletes_the_old_one():
    layer = swept().get_layer("bn")
    layer.save_assets(".")
    layer.load_assets(".")
    assert sweeps.origin_of(layer).path == "bn"
    os.unlink(sweep_records.ASSET)
    layer.load_assets(".")
    assert sweeps.origin_of(layer) is None
    layer.load_assets(None)
