"""Tests of provenance: fresh or stale, written, read and printed."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import dense_model, everything_under
from keras import layers

import tfbn
from tfbn import describe, export
from tfbn.serving import provenance


def test_no_known_sweep_is_a_warning_or_an_error(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="no sweep of them is known"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="no sweep of them is known") as caught:
        export(model, tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("what", ["kernel", "moving_mean"])
def test_changed_since_the_sweep_is_a_warning_or_an_error(tmp_path, what):
    model = dense_model()
    layer = model.layers[0] if what == "kernel" else model.get_layer("bn")
    variable = getattr(layer, what)
    variable.assign(variable + 1e-3)
    with pytest.raises(ValueError, match="changed since the sweep"):
        export(model, tmp_path, require_population=True)
    assert everything_under(tmp_path) == []
    with pytest.warns(UserWarning, match="changed since the sweep"):
        export(model, tmp_path)
    assert "changed since the sweep" in describe(tmp_path)["stale"]


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.filterwarnings("error:The batch norm statistics")
def test_a_fresh_sweep_and_no_batch_norm_are_silent(tmp_path):
    model = dense_model()
    model.trainable = False  # After Algorithm 2.
    export(model, tmp_path, require_population=True)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    export(plain, tmp_path, require_population=True)


def test_provenance_travels_with_the_model(tmp_path, capsys):
    model = dense_model()
    exported = export(model, tmp_path)
    model.layers[0].bias.assign([1.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match="changed"):
        export(model, tmp_path)
    written = json.loads((exported.path / "assets.extra" / "tfbn.json").read_text())
    capsys.readouterr()
    description = describe(exported.path)
    assert description == written and capsys.readouterr() == ("", "")
    # Also what the last line of a notebook's cell shows.
    printed = repr(description)
    assert printed.startswith(f"{exported.path}: exported by tfbn ") and str(description) == printed
    assert "method='pooled' over 20 samples in 2 batches of at most 10" in printed
    assert "bn: 3 channels, 320 values each" in printed
    assert "changed" not in printed
    assert describe(str(tmp_path))["stale"] is not None  # The highest version.
    assert written["stale"] is None
    assert written["statistics"]["fingerprint"] == written["fingerprint"]
    assert written["fingerprint"] != describe(tmp_path)["fingerprint"]
    assert (written["tfbn"], written["keras"]) == (tfbn.__version__, keras.__version__)
    assert written["tensorflow"] == tf.__version__
    # The moving averages before the sweep were 0 and 1.
    bn = model.get_layer("bn")
    shift = bn.moving_mean.numpy() / np.sqrt(bn.moving_variance.numpy())
    layer = written["statistics"]["layers"]["bn"]
    np.testing.assert_allclose(layer["mean_shift"], np.sqrt(np.mean(shift**2)), rtol=1e-5)
    assert (layer["channels"], layer["count"]) == (3, 320)


def test_describe_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"tfbn\.export wrote"):
        describe(tmp_path / "nothing")
    dense_model().export(tmp_path / "1", verbose=False)
    with pytest.raises(ValueError, match=r"1/assets\.extra"):
        describe(tmp_path)


# Damage.


def file_of(tmp_path):
    return tmp_path / "1" / "assets.extra" / "tfbn.json"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Return the provenance of a swept model as bytes."""
    directory = tmp_path_factory.mktemp("whole")
    export(dense_model(), directory)
    return file_of(directory).read_bytes()


def read_back(directory, content):
    """Return the result of `read` for other content, `None` for an error that names the file."""
    file = file_of(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    try:
        return provenance.read(directory).entries()
    except ValueError as error:
        assert str(file) in str(error)
        assert str(error).startswith("Expected ")
        return None


DAMAGED = [
    b"",
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"text"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"1" * 10_000,
    b'{"tfbn": 1}',
    b'{"checksum": "0"}',
]


def test_a_damaged_file_is_one_error_that_names_it(tmp_path, capsys):
    for damaged in DAMAGED:
        assert read_back(tmp_path, damaged) is None
        with pytest.raises(ValueError, match=r"an intact file.*tfbn\.json.*Export again"):
            describe(tmp_path)
        assert capsys.readouterr().out == ""
    # A server ignores it, and the next export still keeps the names of that version.
    assert export(dense_model(), tmp_path).version == 2


def test_entries_are_the_fields(tmp_path, content):
    whole = json.loads(content)
    fields = {field.name for field in dataclasses.fields(provenance.Provenance)}
    assert set(whole) == fields | {"checksum"}
    assert read_back(tmp_path, content) == whole
    for name in whole:
        changed = {**whole, name: [3]}
        assert read_back(tmp_path, json.dumps(changed).encode()) is None
        del changed[name]
        assert read_back(tmp_path, json.dumps(changed).encode()) is None
    assert read_back(tmp_path, json.dumps({**whole, "more": 1}).encode()) is None


def damage(content, rng):
    """Return a copy with a flipped bit, a removed, doubled or overwritten part, or no end."""
    content = bytearray(content)
    at, to = sorted(rng.integers(0, len(content), 2))
    kind = rng.integers(0, 5)
    if kind == 0:
        content[at] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        del content[at:to]
    elif kind == 2:
        content[at:at] = content[at:to]
    elif kind == 3:
        content[at : at + 8] = rng.bytes(8)
    else:
        del content[at:]
    return bytes(content)


def test_damage_is_seen_or_harmless(tmp_path, content):
    count = 300
    whole = json.loads(content)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(count):
        actual = read_back(tmp_path, damage(content, rng))
        assert actual is None or actual == whole
        seen += actual is None
    assert seen > 0.8 * count  # Blanks between entries may be removed.


def test_standard_errors_go_with_the_model(tmp_path):
    model = keras.Sequential([keras.Input((4,), name="x"), layers.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(2000, 4)).astype("float32")
    stats = tfbn.update_population_stats(model, x, batch_size=10, tolerance=0.05, verbose=0)
    export(model, tmp_path)
    swept = provenance.read(tmp_path).statistics
    [layer] = swept["layers"].values()
    assert swept["tolerance"] == 0.05 and swept["population_size"] == 2000
    assert swept["relative_error"] == layer["relative_error"] == stats.relative_error
    described = str(tfbn.describe(tmp_path))
    assert f"standard errors up to {stats.relative_error:.2g} std" in described
