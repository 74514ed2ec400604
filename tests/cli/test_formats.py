"""Tests of the readers of data: their results and errors."""

import os
import pathlib
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfbn.cli import formats
from tfbn.cli.errors import FileError, naming
from tfbn.cli.formats import Options

X = np.random.default_rng(0).normal(size=(7, 4, 5, 1)).astype("float32")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Create an empty working directory for every test."""
    monkeypatch.chdir(tmp_path)


def network(shape=(4, 5, 1)):
    """Build a model with one input."""
    return keras.Sequential([keras.Input(shape, name="image"), layers.Flatten()])


def read(path, options=None, model=None):
    """Return the arguments of the sweep."""
    options = options or Options()
    return formats.find_reader(path, options)(path, model or network(), options)


def refused(path, options=None, model=None):
    """Return the text of the error for data."""
    with pytest.raises(FileError) as error:
        read(path, options, model)
    text = str(error.value)
    assert text[0].isupper() and text.endswith(".")
    assert path in text and "allow_pickle" not in text
    return text


def test_arrays_stay_on_disk():
    np.save("x.npy", X)
    x, batch_size = read("x.npy", Options(batch_size=3))
    assert isinstance(x, np.memmap) and batch_size == 3
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_chosen_by_the_name_of_the_input(save):
    save("x.npz", x=np.zeros(3), y=np.zeros(3), image=X)
    np.testing.assert_array_equal(read("x.npz")[0], X)
    save("x.npz", y=np.zeros(3), x_train=X)
    np.testing.assert_array_equal(read("x.npz")[0], X)
    save("x.npz", pictures=X)
    np.testing.assert_array_equal(read("x.npz")[0], X)
    save("x.npz", a=X, b=X)
    assert "named 'image' or 'x' or 'x_train'" in refused("x.npz")


def test_only_the_arrays_that_are_needed_are_read():
    np.savez("x.npz", image=X, y=np.array([{}], object))
    np.testing.assert_array_equal(read("x.npz")[0], X)


def test_several_inputs_have_their_structure():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, [b]], layers.Concatenate()([a, b]))
    np.savez("x.npz", a=np.ones((5, 2)), b=np.ones((5, 3)))
    x, _ = read("x.npz", model=model)
    assert keras.tree.map_structure(np.shape, x) == [(5, 2), [(5, 3)]]
    np.savez("x.npz", a=np.ones((5, 2)))
    assert "array 'b'" in refused("x.npz", model=model)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "datetime64[s]", "f4,f4", "O"])
@pytest.mark.parametrize("save", ["npy", "npz"])
def test_arrays_of_anything_but_real_numbers_are_refused(dtype, save):
    """Complex numbers must not silently lose their imaginary part."""
    x = np.zeros((4, 5), dtype)
    if save == "npy":
        np.save("x.npy", x)
    else:
        np.savez("x.npz", x=x)
    text = refused(f"x.{save}")
    assert dtype in text or "Python objects" in text or "float32" in text or "f4" in text


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float64", "U3"])
def test_arrays_of_numbers_and_of_strings_are_taken(dtype):
    np.save("x.npy", np.zeros((4, 5), dtype))
    assert read("x.npy")[0].dtype == np.dtype(dtype)


def test_a_damaged_header_is_noticed_in_an_archive():
    """NumPy stops at the end from the header, before zipfile validates the checksum."""
    np.savez("x.npz", x=np.arange(100000.0).reshape(1000, 100))
    content = pathlib.Path("x.npz").read_bytes()
    assert content.count(b"(1000, 100)") == 1
    pathlib.Path("x.npz").write_bytes(content.replace(b"(1000, 100)", b"(1000, 10) "))
    with np.load("x.npz") as archive:
        assert archive["x"].shape == (1000, 10)  # Wrong numbers without an error.
    refused("x.npz")


def test_a_member_with_bytes_left_over_is_refused():
    np.save("x.npy", X)
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("x.npy", pathlib.Path("x.npy").read_bytes() + b"more")
    assert "more bytes" in refused("x.npz")


def test_images_are_resized_and_scaled():
    for number in range(3):
        pixels = np.full((8, 10, 3), 50 * number, "uint8")
        folder = pathlib.Path("images", str(number))
        folder.mkdir(parents=True)
        (folder / "image.png").write_bytes(tf.io.encode_png(pixels).numpy())
    x, batch_size = read("images", Options(batch_size=2, scale=0.5), network((4, 5, 3)))
    assert batch_size is None
    first, second = list(x)
    assert first.shape == (2, 4, 5, 3) and second.shape == (1, 4, 5, 3)
    np.testing.assert_allclose(np.concatenate([first, second])[:, 0, 0, 0], [0, 25, 50])
    assert "images in images for an input of shape (None, 9)" in refused(
        "images", model=network((9,))
    )


def test_a_batch_of_images_is_no_larger_than_there_are_images(monkeypatch):
    """TensorFlow loops over all elements of a batch, which would take years."""
    pathlib.Path("images").mkdir()
    png = tf.io.encode_png(np.zeros((4, 5, 1), "uint8")).numpy()
    for number in range(3):
        pathlib.Path("images", f"{number}.png").write_bytes(png)
    sizes = []
    monkeypatch.setattr(tf.data.Dataset, "batch", lambda self, size: sizes.append(size))
    read("images", Options(batch_size=10**18))
    assert sizes == [3]


def test_the_image_that_is_damaged_is_named():
    pathlib.Path("images").mkdir()
    png = tf.io.encode_png(np.zeros((4, 4, 1), "uint8")).numpy()
    for name in ("a.png", "b.jpg", "c.PNG"):
        pathlib.Path("images", name).write_bytes(png)
    pathlib.Path("images", "notes.txt").write_text("text")
    assert formats.damaged_image("images") is None
    pathlib.Path("images", "b.jpg").write_bytes(png[:40])
    assert formats.damaged_image("images") == "images/b.jpg"
    pathlib.Path("empty").mkdir()
    assert "empty with no files" in refused("empty")


def test_files_that_are_not_read_are_counted(recwarn):
    png = tf.io.encode_png(np.zeros((4, 5, 1), "uint8")).numpy()
    names = ("a.png", "b.JPG", "c.webp", "d.webp", "e.txt", "f", ".g.png", ".h/i.png", "j/k.gif")
    for name in names:
        file = pathlib.Path("images", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
    pathlib.Path("elsewhere").mkdir()
    pathlib.Path("images", "link").symlink_to("../elsewhere")
    x, _ = read("images")
    assert x.number == 3 and sum(len(batch) for batch in x) == 3
    [warning] = recwarn
    assert str(warning.message).startswith(
        "3 images in images are read, others are not: 1 .txt, 2 .webp, 1 hidden files, 1 hidden "
        "folders, 1 links to folders, 1 without a suffix."
    )
    assert formats.damaged_image("images") is None and len(recwarn) == 1
    for name in ("a.png", "b.JPG", "j/k.gif"):
        pathlib.Path("images", name).unlink()
    assert "images with 1 .txt, 2 .webp" in refused("images")


FUNCTIONS = """
import numpy as np
import tensorflow as tf
x = np.arange(20.0).reshape(10, 2)
def arrays():
    return x
def records():
    records = tf.data.TFRecordDataset("x.gz", "GZIP")
    return records.map(lambda record: tf.io.parse_tensor(record, "double")).batch(4)
def broken():
    raise ValueError("no connection")
"""


def test_a_function_returns_what_fit_takes(tmp_path, monkeypatch):
    name = f"package_{tmp_path.name}".replace("-", "_")
    pathlib.Path(name).mkdir()
    pathlib.Path(name, "data.py").write_text(FUNCTIONS)
    with tf.io.TFRecordWriter("x.gz", "GZIP") as file:
        for row in np.arange(20.0).reshape(10, 2):
            file.write(tf.io.serialize_tensor(row).numpy())
    before = list(sys.path)
    x, batch_size = read(f"{name}.data:arrays", Options(batch_size=3))
    assert batch_size == 3
    rows, batch_size = read(f"{name}.data:records")
    assert batch_size is None
    np.testing.assert_array_equal(np.concatenate(list(rows)), x)
    for path, says in {
        f"{name}.data:broken": "ValueError: no connection",
        f"{name}.data:y": "function 'y' in module",
        f"{name}.data:x": "function 'x' in module",
        "nowhere:train": "No module named 'nowhere'.*nowhere:train",
    }.items():
        with pytest.raises(FileError, match=says):
            read(path)
    assert "only for images" in refused(f"{name}.data:arrays", Options(scale=2.0))
    assert sys.path == before


def test_other_things_are_refused():
    np.save("x.npy", X)
    os.mkfifo("pipe.npy")
    pathlib.Path("x.csv").touch()
    pathlib.Path("folder").mkdir()
    assert "no such file" in refused("missing.npy")
    assert "neither a file nor a folder" in refused("pipe.npy")
    assert ".npy or .npz file" in refused("x.csv")
    assert "only for images" in refused("x.npy", Options(scale=2.0))
    pathlib.Path("x.tfrecord").touch()
    assert "package.module:function" in refused("x.tfrecord")


def test_an_error_of_the_system_without_a_reason_names_the_files():
    error = pytest.raises(FileError, match=r"OSError: a device of its own.*Files: a\.npy")
    with error, naming("a.npy"):
        raise OSError("a device of its own")


def test_images_that_are_drawn_by_number_are_those_of_the_batches():
    rng = np.random.default_rng(0)
    for number in range(5):
        folder = pathlib.Path("images", str(number % 2))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 10, 3)).astype("uint8")
        (folder / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    x, _ = read("images", Options(batch_size=2, scale=0.5), network((4, 5, 3)))
    everything = np.concatenate(list(x))
    np.testing.assert_allclose(x.take(np.array([1, 4, 2])), everything[[1, 4, 2]], rtol=1e-6)
    assert (x.number, x.batch_size) == (5, 2)
