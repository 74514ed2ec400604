"""The data of a sweep from files, for the command line."""

import json
import pathlib

import keras
import numpy as np
import tensorflow as tf

_IMAGE = "image"  # A feature that holds an encoded image.
_COLORS = {1: "grayscale", 3: "rgb", 4: "rgba"}


def read(path, model, batch_size=None, features=None, scale=None):
    """What `tfbn.collect` takes as `x` and `batch_size`, from a file or folder.

    Args:
        path: A `.npy` or `.npz` file, a folder of images, or with `features` a TFRecord file
            of `tf.train.Example`s.
        model: The Keras model that it is for. Its inputs say which arrays or features are
            wanted, and the size of images.
        batch_size: In samples; 32 by default.
        features: A JSON file with the features to read, by name: `{"x": {"shape": [28, 28, 1],
            "dtype": "float32"}}`. `"dtype": "image"` is for encoded images (JPEG, PNG, GIF, BMP),
            which have no `shape`: they are resized to the model's input.
        scale: What the pixels of images, 0 to 255, are multiplied by.

    Raises:
        ValueError: If it is nothing of these, or if what a model's input needs is not in it.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"Expected a file or folder with data. Received: {str(path)!r}, no such.")
    images = path.is_dir()
    if features is not None:
        spec = _feature_spec(features)
        images = any(feature["dtype"] == _IMAGE for feature in spec.values())
    if scale is not None and not images:
        raise ValueError(
            f"Expected a scale only for images. Received: {str(path)!r}. Scale the data in it."
        )
    scale = 1.0 if scale is None else float(scale)
    if features is not None:
        return _records(path, spec, model, batch_size or 32, scale), None
    if path.is_dir():
        return _folder(path, model, batch_size or 32, scale), None
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False), batch_size
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            # Read only what is wanted: the targets may be in there too.
            return _for_inputs(model, archive, path), batch_size
    raise ValueError(
        "Expected a .npy or .npz file, a folder of images, or a TFRecord file together with its "
        f"features. Received: {str(path)!r}."
    )


def _for_inputs(model, held, where):
    """What the model's inputs need of a mapping, in the structure of these inputs."""
    names = list(held)
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) <= 1:
        wanted = [tensor.name for tensor in inputs] + ["x", "x_train"]
        chosen = [name for name in wanted if name in names] or (names if len(names) == 1 else [])
        if not chosen:
            raise ValueError(
                f"Expected one array, or one that is named {' or '.join(map(repr, wanted))}. "
                f"Received: {names} in {str(where)!r}."
            )
        return held[chosen[0]]
    missing = [tensor.name for tensor in inputs if tensor.name not in names]
    if missing:
        raise ValueError(
            f"Expected something named {missing[0]!r}, an input of model {model.name!r}. "
            f"Received: {names} in {str(where)!r}."
        )
    return keras.tree.map_structure(lambda tensor: held[tensor.name], model.input)


def _folder(path, model, batch_size, scale):
    height, width, channels = _image_shape(model.inputs[0] if model.inputs else None)
    images = keras.utils.image_dataset_from_directory(
        str(path),
        labels=None,
        label_mode=None,
        color_mode=_COLORS[channels],
        batch_size=batch_size,
        image_size=(height, width),
        shuffle=False,
        verbose=False,
    )
    return images.map(lambda batch: batch * scale)


def _image_shape(tensor):
    shape = () if tensor is None else tuple(tensor.shape)
    if len(shape) != 4 or None in shape[1:] or shape[3] not in _COLORS:
        raise ValueError(
            "Expected a model that takes images of a known size, of shape (batch, height, width, "
            f"channels) with 1, 3 or 4 channels. Received: an input of shape {shape}. Put the data "
            "into a .npz file."
        )
    return shape[1:]


def _feature_spec(path):
    try:
        spec = json.loads(pathlib.Path(path).read_text())
        for feature in spec.values():
            if feature["dtype"] != _IMAGE:
                tf.io.FixedLenFeature(feature["shape"], tf.as_dtype(feature["dtype"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            'Expected features as {"name": {"shape": [28, 28, 1], "dtype": "float32"}} in JSON, '
            f'dtype one of "float32", "int64", "image". Received: {str(path)!r} '
            f"({type(error).__name__}: {error})."
        ) from error
    return spec


def _records(path, spec, model, batch_size, scale):
    parsed = {
        name: tf.io.FixedLenFeature([], tf.string)
        if feature["dtype"] == _IMAGE
        else tf.io.FixedLenFeature(feature["shape"], tf.as_dtype(feature["dtype"]))
        for name, feature in spec.items()
    }
    by_name = {tensor.name: tensor for tensor in model.inputs or []}
    only = model.inputs[0] if len(by_name) == 1 else None
    shapes = {
        name: _image_shape(by_name.get(name, only))
        for name, feature in spec.items()
        if feature["dtype"] == _IMAGE
    }

    def decode(encoded, shape):
        image = tf.io.decode_image(encoded, channels=shape[2], expand_animations=False)
        return tf.ensure_shape(tf.image.resize(image, shape[:2]) * scale, shape)

    def parse(record):
        example = tf.io.parse_single_example(record, parsed)
        for name, shape in shapes.items():
            example[name] = decode(example[name], shape)
        return _for_inputs(model, example, path)

    return tf.data.TFRecordDataset(str(path)).map(parse).batch(batch_size)
