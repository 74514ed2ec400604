"""Validate a command's files and options before TensorFlow is imported, which takes seconds."""

import argparse
import os
import pathlib
import re
from collections.abc import Callable

from tfbn.cli.errors import FileError, naming
from tfbn.serving import versions

HDF5 = (".h5", ".hdf5")
MODEL_FILE = "a .keras file (or .h5, .hdf5), as model.save writes it"

_FUNCTION = re.compile(r"(?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*")

# Suffix of a data file -> kind. Folders contain images.
_DATA_KINDS = {
    ".npy": "array",
    ".npz": "archive",
}


def check(args: argparse.Namespace) -> None:
    """Validate the files and options of a command.

    Raises:
        FileError: If a file is missing or of another kind, if options exclude each other, or if a
            new file cannot be written.
    """
    _CHECKS[args.command](args)


def suffix(path: str) -> str:
    """Return the suffix of a path in lower case."""
    return pathlib.Path(path).suffix.lower()


def is_model(path: str) -> bool:
    """Return whether a path has the suffix of a model file."""
    return suffix(path) in (".keras", *HDF5)


def require_model(path: str) -> None:
    """Raise `FileError` unless a path is a file with the suffix of a model file."""
    if os.path.isfile(path) and is_model(path):
        return
    folder = pathlib.Path(path)
    if not os.path.exists(path):
        received = "no such file"
    elif any(next(folder.glob(name), None) for name in ("saved_model.pb", "*/saved_model.pb")):
        received = "a SavedModel. Give the model file that it was exported from"
    else:  # A pipe or device would block the process forever.
        received = "a directory" if folder.is_dir() else "another kind of file"
    raise FileError(f"Expected {MODEL_FILE}. Received: {path}, {received}.")


def require_free(path: str) -> None:
    """Raise `FileError` unless a new model file of this name can be written."""
    folder = os.path.dirname(path) or "."
    if suffix(path) != ".keras":
        raise FileError(f"Expected a name for --out that ends in .keras. Received: {path}.")
    if os.path.lexists(path):
        raise FileError(f"Expected a new file. Received: {path}, which exists. Give another name.")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        why = "is read-only" if os.path.isdir(folder) else "does not exist"
        raise FileError(f"Expected a writable folder. Received: --out {path}, and {folder} {why}.")


def data_kind(path: str, scale: float | None) -> str:
    """Return the kind of data: `"array"`, `"archive"`, `"images"` for a folder, or `"function"`.

    Args:
        path: The file or folder, or `package.module:function`.
        scale: The option `--scale`, for images.

    Raises:
        FileError: If the file is missing or of another kind, or if an option is for other kinds.
    """
    kind: str | None
    if os.path.isdir(path):
        kind = "images"
    elif os.path.isfile(path):
        kind = _DATA_KINDS.get(suffix(path))
    elif not os.path.exists(path) and _FUNCTION.fullmatch(path):
        kind = "function"
    else:  # A pipe can be read only once, and a device may be endless.
        received = "neither a file nor a folder" if os.path.exists(path) else "no such file"
        raise FileError(
            f"Expected a file, a folder or package.module:function. Received: {path}, {received}."
        )
    if kind is None:
        raise FileError(
            f"Expected a .npy or .npz file, images or package.module:function. Received: {path}."
        )
    if scale is not None and kind != "images":
        raise FileError(f"Expected --scale only for images. Received: {path}. Scale its data.")
    return kind


def require_inputs(path: str | None) -> None:
    """Raise `FileError` unless an optional file of inputs is a .npy or .npz file."""
    _require(path, (".npy", ".npz"), "a .npy or .npz file with inputs")


def _require(path: str | None, suffixes: tuple[str, ...] | None, kind: str) -> None:
    """Raise `FileError` unless an optional path is a file with an allowed suffix."""
    if path is None or (os.path.isfile(path) and (not suffixes or suffix(path) in suffixes)):
        return
    received = "another kind of file" if os.path.exists(path) else "no such file"
    raise FileError(f"Expected {kind}. Received: {path}, {received}.")


def _check_recalibrate(args: argparse.Namespace) -> None:
    served = os.path.isdir(args.model)
    if served and (args.out or args.include_frozen or args.unsafe or args.validation):
        raise FileError(
            f"Give directory {args.model} without --out, --include-frozen, --unsafe, --validation."
        )
    if not served:
        require_model(args.model)
        if not args.out:
            raise FileError(f"Expected --out NEW.keras for {args.model}. Received: none.")
        require_free(args.out)
    data_kind(args.data, args.scale)
    _require(args.validation, (".npz",), "a .npz file with inputs and targets y")


def _check_export(args: argparse.Namespace) -> None:
    require_model(args.model)
    require_inputs(args.sample)
    require_inputs(args.warmup)
    with naming(args.path):
        versions.target(args.path)


def _check_compare(args: argparse.Namespace) -> None:
    require_model(args.model)
    for path in (args.a, args.b):
        _require(path, None, "a model file, or one that PopulationStats.save wrote")


def _check_copy(args: argparse.Namespace) -> None:
    require_model(args.model)
    require_free(args.out)


def _check_drift(args: argparse.Namespace) -> None:
    with naming(args.model):
        versions.local(args.model)
    _require(args.answers, None, "a file of answers of the monitor")


# Command -> function that validates its arguments.
_CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": lambda args: require_model(args.model),
    "recalibrate": _check_recalibrate,
    "compare": _check_compare,
    "convert": _check_copy,
    "fold": _check_copy,
    "export": _check_export,
    "describe": lambda args: None,
    "drift": _check_drift,
}
