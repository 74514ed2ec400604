"""Damaged and wrong files for every argument of every command, and command lines of any kind.

For any input, a command either succeeds with the right result, or fails fast with one line that
names the user's path, and leaves no files.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn.cli import main

# Words from advice of other libraries that do not apply to a command line, and names that the user
# did not choose.
FORBIDDEN = (
    "allow_pickle",
    "safe_mode",
    "custom_object",
    "Traceback",
    "/tmp",
    ".tfbn-",
    "to_bytes",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Create a folder with a valid file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    x = np.random.default_rng(0).uniform(0, 255, (12, 4, 4, 1)).astype("float32")
    model = keras.Sequential([keras.Input((4, 4, 1), name="x"), tfbn.BatchNormalization()])
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    np.save(folder / "x.npy", x)
    np.savez(folder / "x.npz", x=x, y=np.zeros(12))
    (folder / "images").mkdir()
    for number, image in enumerate(x):
        png = tf.io.encode_png(image.astype("uint8")).numpy()
        (folder / "images" / f"{number}.png").write_bytes(png)
    given = [folder / "model.keras", "--data", folder / "x.npy", "--out", folder / "swept.keras"]
    assert main(["recalibrate", *map(str, given), "--json"]) == 0
    tfbn.PopulationStats.read(model).save(folder / "stats.npz")
    assert main(["export", str(folder / "swept.keras"), str(folder / "exported")]) == 0
    return folder


# Argument -> command with `{}` for the file, valid file, and whether all damage is either detected
# or harmless.
ARGUMENTS = {
    "inspect MODEL": ("inspect {} --json", "swept.keras", True),
    "inspect HDF5": ("inspect {} --json", "model.h5", False),
    "recalibrate MODEL": (
        "recalibrate {} --data x.npy --out new.keras --json",
        "model.keras",
        True,
    ),
    "recalibrate .npy": (
        "recalibrate model.keras --data {} --out new.keras --json",
        "x.npy",
        False,
    ),
    "recalibrate .npz": ("recalibrate model.keras --data {} --out new.keras --json", "x.npz", True),
    "compare A": ("compare model.keras {} model.keras --json", "stats.npz", True),
    "compare B": ("compare model.keras model.keras {} --json", "swept.keras", True),
    "export MODEL": ("export {} new --json", "swept.keras", False),
}


def nothing(content, rng):
    """Return an empty file."""
    return b""


def text(content, rng):
    """Return another kind of file."""
    return b"This is a letter and no file of numbers.\n" * 9


def cut(content, rng):
    """Remove the end of a file."""
    return content[: rng.integers(1, len(content))]


def flipped(content, rng):
    """Flip one bit."""
    content = bytearray(content)
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(content)


def overwritten(content, rng):
    """Overwrite some bytes."""
    start, length = rng.integers(len(content)), rng.integers(1, 200)
    return content[:start] + rng.bytes(length) + content[start + length :]


def noise(content, rng):
    """Return random bytes."""
    return rng.bytes(len(content))


def twice(content, rng):
    """Append the file to its content."""
    return content + content


DAMAGES = (nothing, text, cut, flipped, overwritten, noise, twice)


def run(capsys, command, *given):
    """Return exit code, stdout and the lines on stderr of a command; `{}` is a file."""
    capsys.readouterr()
    code = main([given[0] if word == "{}" else word for word in command.split()])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def check(capsys, folder, command, given):
    """Return the output of a command, or `None` if it failed with a valid error."""
    before = snapshot(folder)
    started = time.process_time()
    code, out, lines = run(capsys, command, given)
    assert time.process_time() - started < 60
    *warnings, last = lines or [""]
    assert all(line.startswith("tfbn: warning: ") for line in warnings)
    if code == 0:
        assert not last or last.startswith("tfbn: warning: ")
        clean(folder)
        return json.loads(out)
    assert code == 2 and out == ""
    assert last.startswith("tfbn: ") and len(last) < 1200
    assert given in last, f"{last!r} does not name {given!r}"
    ours = last.replace(str(folder.resolve()), "")  # A served model is named by its real path
    assert not [word for word in FORBIDDEN if word in ours], last
    assert snapshot(folder) == before
    return None


def snapshot(folder):
    """Return all files in a folder with their sizes."""
    return {(str(file), file.lstat().st_size) for file in sorted(folder.rglob("*"))}


def clean(folder):
    """Remove the output of a command."""
    (folder / "new.keras").unlink(missing_ok=True)
    shutil.rmtree(folder / "new", ignore_errors=True)


def fuzz(capsys, files, argument, seeds):
    """Damage an argument's file in every way, with these seeds."""
    command, good, noticed = ARGUMENTS[argument]
    content = (files / good).read_bytes()
    right = check(capsys, files, command, good)
    assert right is not None
    with another_place(files, good) as given:
        for damage in DAMAGES:
            for seed in seeds:
                pathlib.Path(given).write_bytes(damage(content, np.random.default_rng(seed)))
                actual = check(capsys, files, command, given)
                if noticed and actual is not None:
                    assert actual == right, (damage, seed)


@contextlib.contextmanager
def another_place(files, good):
    """Yield a path of a new file, whose form the output must repeat."""
    (files / "a  folder").mkdir()
    try:
        yield f"./a  folder//other{pathlib.Path(good).suffix}"
    finally:
        shutil.rmtree(files / "a  folder")


@pytest.mark.quick(2)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_damaged_files(capsys, monkeypatch, files, argument):
    monkeypatch.chdir(files)
    fuzz(capsys, files, argument, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_many_damaged_files(capsys, monkeypatch, files, argument):
    monkeypatch.chdir(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(capsys, files, argument, range(2, 60))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, "more than 1 GiB"


def missing(path):
    """Remove the file."""


def link_to_nowhere(path):
    """Create a dangling link."""
    os.symlink("nowhere", path)


def link_to_itself(path):
    """Create a circular link."""
    os.symlink(os.path.basename(path), path)


@pytest.mark.parametrize("make", [missing, link_to_nowhere, link_to_itself, os.mkdir, os.mkfifo])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_is_no_file(capsys, monkeypatch, files, argument, make):
    monkeypatch.chdir(files)
    command, good, _ = ARGUMENTS[argument]
    with another_place(files, good) as given:
        make(given)
        assert check(capsys, files, command, given) is None


@pytest.mark.quick(2)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_good_files_of_another_kind(capsys, monkeypatch, files, argument):
    monkeypatch.chdir(files)
    command, good, _ = ARGUMENTS[argument]
    for other in {name for _, name, _ in ARGUMENTS.values()} - {good, "model.keras", "swept.keras"}:
        if command.startswith("compare") or pathlib.Path(other).suffix != pathlib.Path(good).suffix:
            check(capsys, files, command, other)
        with another_place(files, good) as given:
            shutil.copy(other, given)
            assert check(capsys, files, command, given) is None, other


def test_damaged_descriptions(capsys, monkeypatch, files):
    monkeypatch.chdir(files)
    command = "describe {} --json"
    assert check(capsys, files, command, "exported")["statistics"]["samples"] == 12
    with another_place(files, "exported") as given:
        shutil.copytree("exported", given)
        [file] = pathlib.Path(given).glob("*/assets.extra/tfbn.json")
        content = file.read_bytes()
        for damage in DAMAGES:
            file.write_bytes(damage(content, np.random.default_rng(0)))
            check(capsys, files, command, given)
        for wrong in ("[]", "3", "{}", '{"tfbn": 1}', "null", '{"statistics": 3}'):
            file.write_text(wrong)
            assert check(capsys, files, command, given) is None


def test_an_image_that_is_damaged(capsys, monkeypatch, files):
    monkeypatch.chdir(files)
    command = "recalibrate model.keras --data {} --out new.keras --json"
    assert check(capsys, files, command, "images") is not None
    with another_place(files, "images") as given:
        shutil.copytree("images", given)
        image = pathlib.Path(given, "7.png")
        content = image.read_bytes()
        for damage in DAMAGES:
            image.write_bytes(damage(content, np.random.default_rng(0)))
            check(capsys, files, command, given)
        image.write_text("text")
        code, _, [line] = run(capsys, command, given)
        assert code == 2 and f"{given}/7.png" in line
