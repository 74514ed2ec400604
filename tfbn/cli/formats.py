"""The data of a sweep from files: one reader for each format, in a table by suffix."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn.cli import checks
from tfbn.cli.errors import FileError, reading
from tfbn.files import atomic
from tfbn.sweep.adapters import NumberedSamples

_BATCH_SIZE = 32
_COLORS = {1: "grayscale", 3: "rgb", 4: "rgba"}
_ENCODED_IMAGE = "image"  # The dtype of a feature that holds one.
_TARGETS = ("y", "y_val", "y_test", "y_train")
_FEATURE_DTYPES = ("float32", "int64", _ENCODED_IMAGE)


class Options(NamedTuple):
    """The options of the command line for data.

    Attributes:
        batch_size: In samples; 32 by default.
        features: A JSON file with the features to read of TFRecords, by name: `{"x": {"shape":
            [28, 28, 1], "dtype": "float32"}}`. `"dtype": "image"` is for encoded images (JPEG,
            PNG, GIF, BMP), which have no `shape`: they are resized to the model's input.
        scale: The factor on the pixels of images, which are 0 to 255.
    """

    batch_size: int | None = None
    features: str | None = None
    scale: float | None = None


# Takes the path, the model and the options, and returns `x` and `batch_size` of `tfbn.collect`.
Reader = Callable[[str, keras.Model, Options], tuple[Any, int | None]]


def find_reader(path: str, options: Options) -> Reader:
    """The reader of a file by its suffix, or that of folders. It reads nothing yet.

    Raises:
        FileError: See `checks.data_kind`.
    """
    return READERS[checks.data_kind(path, options.features, options.scale)]


def read_array(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """A .npy file with one array, which stays on disk."""
    with reading(path, "a .npy file with one array", "Write it with numpy.save."):
        # Unlike numpy.load it takes no file for a pickle.
        return _real(np.lib.format.open_memmap(path, mode="r"), path), options.batch_size


def read_archive(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """A .npz file with an array for each of the model's inputs, and perhaps others."""
    with (
        reading(path, "a .npz file with arrays", "Write it with numpy.savez."),
        zipfile.ZipFile(path) as archive,
    ):
        return _for_inputs(model, _Arrays(archive, path), path), options.batch_size


def read_images(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """A folder of images, also in folders in it, resized to the model's input."""
    height, width, channels = _image_shape(model.inputs[0] if model.inputs else None, path)
    with reading(path, "a folder of images", "Put JPEG, PNG, GIF or BMP files into it."):
        images = keras.utils.image_dataset_from_directory(
            path,
            labels=None,
            label_mode=None,
            color_mode=_COLORS[channels],
            batch_size=None,
            image_size=(height, width),
            shuffle=False,
            verbose=False,
        )
    scale = 1.0 if options.scale is None else options.scale
    # TensorFlow prepares places for a whole batch, however few images there are.
    batch_size = min(options.batch_size or _BATCH_SIZE, len(images.file_paths))
    batches = images.map(lambda image: image * scale).batch(batch_size)
    paths = np.asarray(images.file_paths)
    take = _image_reader((height, width, channels), scale)
    return NumberedSamples(batches, lambda which: take(paths[which]), len(paths), batch_size), None


def _image_reader(
    shape: tuple[int, int, int], scale: float
) -> Callable[[Sequence[str]], tf.Tensor]:
    """A function from the names of files to a batch of their images."""

    @tf.autograph.experimental.do_not_convert  # It rewrites the text of errors.
    def read(path: tf.Tensor) -> tf.Tensor:
        content = tf.io.read_file(path)
        image = tf.io.decode_image(content, channels=shape[2], expand_animations=False)
        return tf.ensure_shape(tf.image.resize(image, shape[:2]) * scale, shape)

    return tf.function(
        lambda paths: tf.map_fn(read, paths, fn_output_signature=tf.float32),
        input_signature=[tf.TensorSpec([None], tf.string)],
        autograph=False,
    )


def read_records(path: str, model: keras.Model, options: Options) -> tuple[Any, int | None]:
    """A TFRecord file of `tf.train.Example`s with the features that `options.features` names."""
    features = _features(options.features)
    images = [name for name, feature in features.items() if feature.dtype == tf.string]
    if options.scale is not None and not images:
        raise checks.scale_without_images(path)
    scale = 1.0 if options.scale is None else options.scale
    inputs = {tensor.name: tensor for tensor in model.inputs or []}
    only = model.inputs[0] if len(inputs) == 1 else None
    shapes = {name: _image_shape(inputs.get(name, only), path) for name in images}

    def decode(encoded, shape):
        image = tf.io.decode_image(encoded, channels=shape[2], expand_animations=False)
        return tf.ensure_shape(tf.image.resize(image, shape[:2]) * scale, shape)

    @tf.autograph.experimental.do_not_convert  # It rewrites the text of errors.
    def parse(record):
        example = tf.io.parse_single_example(record, features)
        for name, shape in shapes.items():
            example[name] = decode(example[name], shape)
        return _for_inputs(model, example, path)

    records = tf.data.TFRecordDataset(path).map(parse)
    return records.batch(options.batch_size or _BATCH_SIZE), None


# Kind of data -> its reader.
READERS: dict[str, Reader] = {
    "array": read_array,
    "archive": read_archive,
    "images": read_images,
    "records": read_records,
}


def read_inputs(path: str, model: keras.Model, count: int) -> Any:
    """The first inputs of a .npy or .npz file as one batch.

    Raises:
        FileError: It is no such file, is damaged, or has no array for an input of the model.
    """
    checks.require_inputs(path)
    arrays, _ = find_reader(path, Options())(path, model, Options())
    with reading(path, "arrays with an axis of samples", "Give inputs as the model takes them."):
        return keras.tree.map_structure(lambda array: np.array(array[:count]), arrays)


def read_labelled(path: str, model: keras.Model) -> tuple[Any, Any]:
    """The inputs of a .npz file, as `--data` has them, and its targets.

    Targets are named `y`, `y_val`, `y_test` or `y_train`.

    Raises:
        FileError: It is no such file, is damaged, or lacks an input or targets.
    """
    with (
        reading(path, "a .npz file with arrays", "Write it with numpy.savez."),
        zipfile.ZipFile(path) as archive,
    ):
        arrays = _Arrays(archive, path)
        targets = next((name for name in _TARGETS if name in arrays), None)
        if targets is None:
            raise FileError(
                f"Expected targets in an array named 'y'. Received: {list(arrays)} in {path}."
            )
        inputs = {name: name for name in arrays if name not in _TARGETS}
        chosen = _for_inputs(model, inputs, path)
        return keras.tree.map_structure(arrays.__getitem__, chosen), arrays[targets]


def damaged_image(folder: str) -> str | None:
    """The first image of a folder that cannot be decoded. TensorFlow's own error names none."""
    for directory, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(directory, name)
            if not name.lower().endswith((".bmp", ".gif", ".jpeg", ".jpg", ".png")):
                continue
            try:
                tf.io.decode_image(tf.io.read_file(file))
            except tf.errors.OpError:
                return file
    return None


class _Arrays(Mapping):
    """The arrays of a .npz file by name. Each is read when it is asked for, with its checksum."""

    def __init__(self, archive, path):
        self._archive = archive
        self._path = path

    def __iter__(self):
        return (name.removesuffix(".npy") for name in self._archive.namelist())

    def __len__(self):
        return len(self._archive.namelist())

    def __getitem__(self, name):
        member = f"{name}.npy"
        with self._archive.open(member) as file:
            try:
                array = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                if "pickle" not in str(error):
                    raise
                raise ValueError(f"{member} has Python objects, which may run code") from error
            # zipfile compares the checksum at the end of a member, which a damaged header hides.
            if file.read():
                raise ValueError(f"{member} has more bytes than its header says")
        return _real(array, f"{self._path}, whose array {name!r}")


def _for_inputs(model, arrays, path):
    """The arrays of the model's inputs, by name, in the structure of these inputs."""
    names = list(arrays)
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) <= 1:
        wanted = list(dict.fromkeys([*(tensor.name for tensor in inputs), "x", "x_train"]))
        chosen = [name for name in wanted if name in names] or (names if len(names) == 1 else [])
        if not chosen:
            raise FileError(
                f"Expected one array, or one that is named {' or '.join(map(repr, wanted))}. "
                f"Received: {names} in {path}."
            )
        return arrays[chosen[0]]
    missing = [tensor.name for tensor in inputs if tensor.name not in names]
    if missing:
        raise FileError(
            f"Expected something named {missing[0]!r}, an input of model {model.name!r}. "
            f"Received: {names} in {path}."
        )
    return keras.tree.map_structure(lambda tensor: arrays[tensor.name], model.input)


def _real(array, where):
    if array.dtype.kind not in "biufSU":
        raise FileError(
            f"Expected real numbers. Received: {where} of dtype {array.dtype}. Write complex "
            "numbers as two channels, and anything else as numbers."
        )
    return array


def _image_shape(tensor, path):
    shape = () if tensor is None else tuple(tensor.shape)
    if len(shape) != 4 or None in shape[1:] or shape[3] not in _COLORS:
        raise FileError(
            "Expected a model that takes images of a known size, of shape (batch, height, width, "
            f"channels) with 1, 3 or 4 channels. Received: images in {path} for an input of shape "
            f"{shape}. Put the data into a .npz file."
        )
    return shape[1:]


def _features(path):
    """The features that TensorFlow reads of an Example, by name. Encoded images are strings."""
    with reading(
        path,
        'features as {"name": {"shape": [28, 28, 1], "dtype": "float32"}} in JSON',
        f"A dtype is one of {_FEATURE_DTYPES}, and images have no shape.",
    ):
        features = {}
        described = json.loads(atomic.read(path))
        if not isinstance(described, dict) or not described:
            raise ValueError("no features by name")
        for name, feature in described.items():
            dtype = feature["dtype"]
            if dtype not in _FEATURE_DTYPES:
                raise ValueError(f"dtype {dtype!r} of {name!r}")
            encoded = dtype == _ENCODED_IMAGE
            shape = tf.TensorShape([] if encoded else feature["shape"])
            if not shape.is_fully_defined():
                raise ValueError(f"shape {feature['shape']} of {name!r}")
            features[name] = tf.io.FixedLenFeature(shape, tf.string if encoded else dtype)
        return features
