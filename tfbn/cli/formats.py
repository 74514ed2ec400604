"""Read data for the command line from files, folders or a function, with one reader each."""

import collections
import importlib
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn.cli import checks
from tfbn.cli.errors import FileError, naming, reading
from tfbn.sweep.adapters import NumberedSamples

_BATCH_SIZE = 32
_COLORS = {1: "grayscale", 3: "rgb", 4: "rgba"}
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_TARGETS = ("y", "y_val", "y_test", "y_train")


class Options(NamedTuple):
    """The options of the command line for data.

    Attributes:
        batch_size: The number of samples in a batch, 32 by default.
        scale: The factor for the pixels of images, which are 0 to 255.
    """

    batch_size: int | None = None
    scale: float | None = None


# (path, model, options) -> `x` and `batch_size` of `tfbn.collect`
Reader = Callable[[str, keras.Model, Options], tuple[Any, int | None]]


def find_reader(path: str, options: Options) -> Reader:
    """Return the reader for a file (by its suffix), a folder or a function. No data is read.

    Raises:
        FileError: See `checks.data_kind`.
    """
    kind = checks.data_kind(path, options.scale)
    return function_reader(path) if kind == "function" else READERS[kind]


def read_array(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """Open a .npy file with one array, which stays on disk."""
    with reading(path, "a .npy file with one array", "Write it with numpy.save."):
        # Unlike numpy.load, it never loads a pickle.
        return _real(np.lib.format.open_memmap(path, mode="r"), path), options.batch_size


def read_archive(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """Read the model's inputs from the arrays of a .npz file."""
    with (
        reading(path, "a .npz file with arrays", "Write it with numpy.savez."),
        zipfile.ZipFile(path) as archive,
    ):
        return _for_inputs(model, _Arrays(archive, path), path), options.batch_size


def read_images(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """Read a folder of images and its subfolders, resized to the model's input."""
    height, width, channels = _image_shape(model.inputs[0] if model.inputs else None, path)
    paths = np.array(image_files(path))
    scale = 1.0 if options.scale is None else options.scale

    @tf.autograph.experimental.do_not_convert  # AutoGraph changes the text of errors.
    def read(path: tf.Tensor) -> tf.Tensor:
        content = tf.io.read_file(path)
        image = tf.io.decode_image(content, channels=channels, expand_animations=False)
        image = tf.image.resize(image, (height, width)) * scale
        return tf.ensure_shape(image, (height, width, channels))

    take = tf.function(
        lambda paths: tf.map_fn(read, paths, fn_output_signature=tf.float32),
        input_signature=[tf.TensorSpec([None], tf.string)],
        autograph=False,
    )
    # TensorFlow allocates memory for a complete batch, also for few images.
    batch_size = min(options.batch_size or _BATCH_SIZE, len(paths))
    images = tf.data.Dataset.from_tensor_slices(paths).map(read, tf.data.AUTOTUNE)
    batches = images.batch(batch_size)
    return NumberedSamples(batches, lambda which: take(paths[which]), len(paths), batch_size), None


def image_files(folder: str) -> list[str]:
    """Return the images in a folder and its subfolders, sorted. Other files cause a warning.

    Raises:
        FileError: If the folder has no images.
    """
    with reading(folder, "a folder of images", "Put JPEG, PNG, GIF or BMP files into it."):
        images, others = _listed(folder)
    why = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not images:
        raise FileError(
            f"Expected JPEG, PNG, GIF or BMP. Received: {folder} with {why or 'no files'}."
        )
    if why:
        warnings.warn(
            f"{len(images)} images in {folder} are read, others are not: {why}. Convert them, or "
            "give --data a function.",
            stacklevel=2,
        )
    return images


def _listed(folder: str) -> tuple[list[str], collections.Counter[str]]:
    """Return the images in a folder, and kind -> number of other entries."""
    images: list[str] = []
    others: collections.Counter[str] = collections.Counter()

    def cannot_be_read(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=cannot_be_read):
        folders.sort()
        for name in list(folders):
            if name.startswith("."):
                others["hidden folders"] += 1
                folders.remove(name)
            elif os.path.islink(os.path.join(directory, name)):
                others["links to folders"] += 1
        for name in sorted(names):
            if name.startswith("."):
                others["hidden files"] += 1
            elif checks.suffix(name) in _IMAGES:
                images.append(os.path.join(directory, name))
            else:
                others[checks.suffix(name) or "without a suffix"] += 1
    return images, others


def function_reader(path: str) -> Reader:
    """Return a reader for the data that a function `package.module:function` returns.

    Raises:
        FileError: If the function does not exist.
    """
    module, _, name = path.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # As in `python -m`.
    try:
        with naming(path):
            function = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise FileError(f"Expected a function {name!r} in module {module!r} for --data {path}.")

    def read(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
        with naming(path):
            return function(), options.batch_size

    return read


# Kind of data -> reader.
READERS: dict[str, Reader] = {
    "array": read_array,
    "archive": read_archive,
    "images": read_images,
}


def read_inputs(path: str, model: keras.Model, count: int) -> Any:
    """Return the first inputs of a .npy or .npz file as one batch.

    Raises:
        FileError: If the file is missing, of another kind or damaged, or lacks an array for an
            input of the model.
    """
    checks.require_inputs(path)
    arrays, _ = find_reader(path, Options())(path, model, Options())
    with reading(path, "arrays with an axis of samples", "Give inputs as the model takes them."):
        return keras.tree.map_structure(lambda array: np.array(array[:count]), arrays)


def read_labelled(path: str, model: keras.Model) -> tuple[Any, Any]:
    """Return the inputs of a .npz file, as for `--data`, and its targets.

    Targets are named `y`, `y_val`, `y_test` or `y_train`.

    Raises:
        FileError: If the file is missing, of another kind or damaged, or lacks an input or targets.
    """
    with (
        reading(path, "a .npz file with arrays", "Write it with numpy.savez."),
        zipfile.ZipFile(path) as archive,
    ):
        arrays = _Arrays(archive, path)
        targets = next((name for name in _TARGETS if name in arrays), None)
        if targets is None:
            raise FileError(f"Expected targets, array 'y'. Received: {list(arrays)} in {path}.")
        inputs = {name: name for name in arrays if name not in _TARGETS}
        chosen = _for_inputs(model, inputs, path)
        return keras.tree.map_structure(arrays.__getitem__, chosen), arrays[targets]


def damaged_image(folder: str) -> str | None:
    """Return the first image of a folder that cannot be decoded, which TensorFlow does not name."""
    for file in _listed(folder)[0] if os.path.isdir(folder) else ():
        try:
            tf.io.decode_image(tf.io.read_file(file))
        except tf.errors.OpError:
            return file
    return None


class _Arrays(Mapping):
    """Name -> array of a .npz file. Each access reads an array and validates its checksum."""

    def __init__(self, archive: zipfile.ZipFile, path: str):
        self._archive = archive
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".npy") for name in self._archive.namelist())

    def __len__(self) -> int:
        return len(self._archive.namelist())

    def __getitem__(self, name: str) -> np.ndarray:
        member = f"{name}.npy"
        with self._archive.open(member) as file:
            try:
                array = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                if "pickle" not in str(error):
                    raise
                raise ValueError(f"{member} has Python objects, which may run code") from error
            # zipfile validates the checksum at the end of a member, which a wrong header hides.
            if file.read():
                raise ValueError(f"{member} has more bytes than its header says")
        return _real(array, f"{self._path}, whose array {name!r}")


def _for_inputs(model: keras.Model, arrays: Mapping[str, Any], path: str) -> Any:
    """Return the arrays of the model's inputs, by name, in the structure of these inputs."""
    names = list(arrays)
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) <= 1:
        wanted = list(dict.fromkeys([*(tensor.name for tensor in inputs), "x", "x_train"]))
        chosen = [name for name in wanted if name in names] or (names if len(names) == 1 else [])
        if not chosen:
            choice = " or ".join(map(repr, wanted))
            raise FileError(f"Expected an array named {choice}. Received: {names} in {path}.")
        return arrays[chosen[0]]
    missing = [tensor.name for tensor in inputs if tensor.name not in names]
    if missing:
        raise FileError(f"Expected an array {missing[0]!r}. Received: {names} in {path}.")
    return keras.tree.map_structure(lambda tensor: arrays[tensor.name], model.input)


def _real(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "biufSU":
        raise FileError(
            f"Expected real numbers. Received: {where} of dtype {array.dtype}. Convert the array."
        )
    return array


def _image_shape(tensor: keras.KerasTensor | None, path: str) -> tuple[int, int, int]:
    shape = () if tensor is None else tuple(tensor.shape)
    if len(shape) != 4 or None in shape[1:] or shape[3] not in _COLORS:
        raise FileError(
            "Expected an input of shape (batch, height, width, 1, 3 or 4). Received: images in "
            f"{path} for an input of shape {shape}. Use a .npz file."
        )
    return shape[1:]
