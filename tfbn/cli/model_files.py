"""Load model files with the sweep that they record, and save them atomically."""

import json
import os
import re
import shlex
import warnings
import zipfile
from typing import Any

import h5py
import keras

import tfbn
from tfbn.cli import checks
from tfbn.cli.errors import FileError, naming, one_line, reading
from tfbn.files import atomic
from tfbn.serving import sweeps

# The member of a .keras file in which `recalibrate` stores its sweep, also of Keras's layers. Keras
# ignores it, and drops it when the model is saved again after more training.
RECORD = "tfbn_population_stats.safetensors"

# Keras's errors for unknown classes, in both formats.
_UNKNOWN = re.compile(r"(?:Could not locate \w+|Unknown \w+:) '([^']+)'")


def load(path: str, unsafe: bool = False, compiled: bool = False) -> keras.Model:
    """Load a model.

    Args:
        path: A .keras, .h5 or .hdf5 file.
        unsafe: Whether to run code in the file (Lambda layers).
        compiled: Whether to load the optimizer and its state.

    Raises:
        FileError: If the file is missing, of another kind or damaged, or contains code or unknown
            classes.
    """
    checks.require_model(path)
    with reading(path, checks.MODEL_FILE, "Save the model again."):
        if checks.suffix(path) == ".keras":
            _check_archive(path)
            return _load(path, compiled, unsafe)
        _check_hdf5(path, unsafe)
        model = _load(path, False, unsafe)
        return _compiled(model, path, unsafe) if compiled else model


def _written_by(path: str) -> str:
    """Return the version of Keras that wrote a file, `""` if it is not stored."""
    if checks.suffix(path) == ".keras":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("metadata.json")).get("keras_version", "")
    with h5py.File(path) as file:
        version = file.attrs.get("keras_version", "")
        return version.decode() if isinstance(version, bytes) else str(version)


def recorded_sweep(path: str) -> tfbn.PopulationStats | None:
    """Return the sweep that `save` stored in a file, or `None` without one."""
    if checks.suffix(path) in checks.HDF5:
        return None
    with zipfile.ZipFile(path) as archive:
        if RECORD not in archive.namelist():
            return None
        content = archive.read(RECORD)
    return unpack(content, path, "a .keras file with the sweep that `tfbn recalibrate` recorded")


def sweep_of(model: keras.Model, path: str) -> sweeps.Sweep:
    """Return the sweep of a file, stored by `recalibrate` or by `tfbn.BatchNormalization`.

    Also stores the sweep record in the model's layers, including Keras's layers.
    """
    recorded = recorded_sweep(path)
    why = None if recorded is None else recorded.mismatch(model)
    if why is not None:
        return sweeps.Sweep(recorded, why)
    if recorded is not None:
        recorded.assign(model)  # The values do not change.
    return sweeps.sweep_of(model)


def unpack(content: bytes, path: str, kind: str) -> tfbn.PopulationStats:
    """Convert bytes to statistics, with errors that name the file.

    Raises:
        FileError: If the bytes are damaged or of another kind.
    """
    try:
        return tfbn.PopulationStats.from_bytes(content)
    except ValueError as error:
        raise FileError(
            f"Expected {kind}. Received: {path}, whose statistics are damaged. Sweep again."
        ) from error


def save(model: keras.Model, stats: tfbn.PopulationStats | None, path: str) -> None:
    """Write a .keras file with an optional sweep, atomically.

    The file gets its name when the content is on disk. An existing file is an error and is not
    changed.

    Raises:
        FileError: If the file exists or cannot be written.
    """
    try:
        with naming(path), atomic.new_file(path) as partial:
            model.save(partial)
            if stats is not None:
                with zipfile.ZipFile(partial, "a") as archive:
                    archive.writestr(RECORD, stats.to_bytes())
    except FileError as error:
        if isinstance(error.__cause__, FileExistsError):
            checks.require_free(path)
        raise


def _load(path: str, compiled: bool, unsafe: bool) -> keras.Model:
    try:
        return keras.models.load_model(path, compile=compiled, safe_mode=not unsafe)
    except Exception as error:
        if not unsafe and "safe_mode" in str(error):
            raise _code_inside(path) from error
        version = _written_by(path)
        if version[:2] in ("1.", "2."):
            folder = os.path.splitext(path)[0]
            raise FileError(
                f"Cannot load {path}, which Keras {version} wrote. With that Keras make it a "
                f"SavedModel, `tf_keras.models.load_model({path!r}).save({f'{folder}/1'!r})`, "
                f"and run `tfbn recalibrate {shlex.quote(folder)} --data DATA`."
            ) from error
        unknown = _UNKNOWN.search(str(error))
        if unknown:
            raise FileError(
                f"Expected a model of Keras's classes. Received: {path}, with {unknown[1]!r}. Load "
                "it in Python, and call tfbn.update_population_stats or tfbn.export."
            ) from error
        raise


def _compiled(model: keras.Model, path: str, unsafe: bool) -> keras.Model:
    """Return the model of an HDF5 file with its optimizer. Keras cannot load it with loss="mse"."""
    try:
        return _load(path, True, unsafe)
    except Exception as error:
        warnings.warn(
            f"The loss or optimizer in {path} cannot be read ({one_line(error)}). The new file "
            "is without them: compile the model before it is trained again.",
            stacklevel=2,
        )
        return model


def _check_archive(path: str) -> None:
    """Validate the checksums, which a reader with random access (h5py) does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def _check_hdf5(path: str, unsafe: bool) -> None:
    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise FileError(
            f"Expected {checks.MODEL_FILE}. Received: {path}, with weights alone. Load them in "
            "Python with model.load_weights, and call model.save."
        )
    # Keras before 3.11.3 ignores `safe_mode` for HDF5.
    if not unsafe and _has_lambda(json.loads(config)):
        raise _code_inside(path)


def _has_lambda(config: Any) -> bool:
    if isinstance(config, dict):
        return config.get("class_name") == "Lambda" or any(map(_has_lambda, config.values()))
    return isinstance(config, list) and any(map(_has_lambda, config))


def _code_inside(path: str) -> FileError:
    return FileError(
        f"Expected a model without code in it. Received: {path}, with a Lambda layer or another "
        "function. If you trust the file, give --unsafe."
    )
