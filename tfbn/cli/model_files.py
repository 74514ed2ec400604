"""Model files: read with the sweep that is recorded in them, written whole or not at all."""

import json
import os
import re
import shlex
import warnings
import zipfile

import h5py
import keras

import tfbn
from tfbn.cli import checks
from tfbn.cli.errors import FileError, describe, naming, reading
from tfbn.files import atomic
from tfbn.serving import sweeps

# The member of a .keras file in which `recalibrate` writes down its sweep, also of Keras's layers.
# Keras ignores it, and leaves it out when it saves the model again after more training.
RECORD = "tfbn_population_stats.safetensors"

# How Keras names a class that it does not know, in both formats.
_UNKNOWN = re.compile(r"(?:Could not locate \w+|Unknown \w+:) '([^']+)'")


def load(path: str, unsafe: bool = False, compiled: bool = False) -> keras.Model:
    """The model in a file.

    Args:
        path: A .keras, .h5 or .hdf5 file.
        unsafe: Whether code in the file may run, as Lambda layers hold it.
        compiled: Whether the optimizer and its state are wanted too.

    Raises:
        FileError: It is no such file, is damaged, or holds code or classes that Keras does not
            know.
    """
    checks.require_model(path)
    with reading(path, checks.MODEL_FILE, "Save the model again."):
        if checks.suffix(path) == ".keras":
            _check_archive(path)
            return _load(path, compiled, unsafe)
        _check_hdf5(path, unsafe)
        model = _load(path, False, unsafe)
        return _compiled(model, path, unsafe) if compiled else model


def _written_by(path):
    """The version of the Keras that wrote a file, `""` if it is not recorded."""
    if checks.suffix(path) == ".keras":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("metadata.json")).get("keras_version", "")
    with h5py.File(path) as file:
        version = file.attrs.get("keras_version", "")
        return version.decode() if isinstance(version, bytes) else str(version)


def recorded_sweep(path: str) -> tfbn.PopulationStats | None:
    """The sweep that `save` recorded in a file, or `None` where none is recorded."""
    if checks.suffix(path) in checks.HDF5:
        return None
    with zipfile.ZipFile(path) as archive:
        if RECORD not in archive.namelist():
            return None
        content = archive.read(RECORD)
    return unpack(content, path, "a .keras file with the sweep that `tfbn recalibrate` recorded")


def sweep_of(model: keras.Model, path: str) -> sweeps.Sweep:
    """The sweep that a file records, as `recalibrate` does or in the layers of tfbn.

    Its layers, those of Keras too, then hold the record of it.
    """
    recorded = recorded_sweep(path)
    why = None if recorded is None else recorded.mismatch(model)
    if why is not None:
        return sweeps.Sweep(recorded, why)
    if recorded is not None:
        recorded.assign(model)  # Its own values.
    return sweeps.sweep_of(model)


def unpack(content: bytes, path: str, kind: str) -> tfbn.PopulationStats:
    """`PopulationStats.from_bytes`, whose error names the file that the bytes are from."""
    try:
        return tfbn.PopulationStats.from_bytes(content)
    except ValueError as error:
        raise FileError(
            f"Expected {kind}. Received: {path}, whose statistics are damaged, or which is another "
            "kind of file. Make the sweep again."
        ) from error


def save(model: keras.Model, stats: tfbn.PopulationStats | None, path: str) -> None:
    """Write a .keras file with the sweep that it had, if any, whole or not at all.

    The name appears once the content is on disk. A file that has come to it in the meantime
    stays, and is an error.
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


def _load(path, compiled, unsafe):
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
                f"and run `tfbn recalibrate {shlex.quote(folder)} "
                "--data DATA`."
            ) from error
        unknown = _UNKNOWN.search(str(error))
        if unknown:
            raise FileError(
                f"Expected a model of classes that Keras knows. Received: {path}, with "
                f"{unknown[1]!r}. Load it in Python, where its code is, and call "
                "tfbn.update_population_stats or tfbn.export there."
            ) from error
        raise


def _compiled(model, path, unsafe):
    """The model of an HDF5 file with its optimizer, if Keras can read that: not with loss="mse"."""
    try:
        return _load(path, True, unsafe)
    except Exception as error:
        warnings.warn(
            f"The loss or optimizer in {path} cannot be read ({describe(error)}). The new file "
            "is without them: compile the model before it is trained again.",
            stacklevel=2,
        )
        return model


def _check_archive(path):
    """Compare checksums. A reader that jumps about, as that of weights does, may miss them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def _check_hdf5(path, unsafe):
    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise FileError(
            f"Expected {checks.MODEL_FILE}. Received: {path}, with weights alone. Build the model "
            "in Python, load them into it with model.load_weights, and save it with model.save."
        )
    # Keras before 3.11.3 runs such code whatever `safe_mode` says.
    if not unsafe and _has_lambda(json.loads(config)):
        raise _code_inside(path)


def _has_lambda(config):
    if isinstance(config, dict):
        return config.get("class_name") == "Lambda" or any(map(_has_lambda, config.values()))
    return isinstance(config, list) and any(map(_has_lambda, config))


def _code_inside(path):
    return FileError(
        f"Expected a model without code in it. Received: {path}, with a Lambda layer or another "
        "function that would run whatever its author wrote. If you trust the file, give --unsafe."
    )
