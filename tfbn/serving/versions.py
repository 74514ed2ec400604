"""Create and list the numbered versions in a model's directory."""

import contextlib
import errno
import os
import pathlib
import re
import shlex
import urllib.parse
from collections.abc import Iterator

import numpy as np

from tfbn.files import atomic

# TensorFlow Serving parses the name of a version as a signed integer of 64 bits.
MAX_VERSION = 2**63 - 1


# The scheme of a URL: gs://, dbfs:/, file:///. A single letter is a drive.
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(?=/)")


def local(path: str | os.PathLike) -> pathlib.Path:
    """Return an absolute path in the local file system, where a directory is renamed in one step.

    Raises:
        ValueError: If the path is in an object store or on another host.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() == "file":
        text = urllib.parse.unquote(text[len("file:") :])
        if text.startswith("//"):
            host, _, text = text[2:].partition("/")
            if host not in ("", "localhost"):
                raise ValueError(f"Expected file:///path. Received: {text!r} on host {host!r}.")
            text = f"/{text}"
    elif scheme is not None:
        raise ValueError(
            f"Expected a local directory. Received: {text!r}. Export locally, and copy the version."
        )
    absolute = pathlib.Path(text).absolute()
    return absolute.resolve() if ".." in absolute.parts else absolute


def target(path: str | os.PathLike) -> pathlib.Path:
    """Return a model's directory, which need not exist, after a check that it can be written.

    Raises:
        ValueError: If it is a version or in one.
        OSError: If it cannot be written.
    """
    directory = local(path)
    for folder in (*_and_parents(directory), *_and_parents(directory.resolve())):
        if is_saved_model(folder):
            advice = f"Give {str(folder.parent)!r}."
            if _number(folder.name) is None:
                advice = f"Give another directory, or make it a version: {_moved(folder)}"
            raise ValueError(
                f"Expected a model's directory. Received: {str(folder)!r}, a SavedModel. {advice}"
            )
    siblings = newest(directory.parent)
    if _number(directory.name) is not None and any(map(is_saved_model, siblings)):
        raise ValueError(
            f"Expected a model's directory, not version '{directory}'. Give '{directory.parent}'."
        )
    require_writable(directory)
    return directory


def require_writable(directory: pathlib.Path) -> None:
    """Raise `OSError` unless files can be created in a directory, which need not exist."""
    at = next(folder for folder in _and_parents(directory) if os.path.lexists(folder))
    if not os.path.isdir(at):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(at))
    if not os.access(at, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "No permission to write here", str(at))


def require_readable(version: pathlib.Path) -> None:
    """Raise `OSError` unless every file of a version can be read."""
    for parent, folders, names in os.walk(version, followlinks=True):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            if not os.access(path, os.R_OK | (os.X_OK if name in folders else 0)):
                raise PermissionError(errno.EACCES, "No permission to read", path)


def existing(path: str | os.PathLike) -> pathlib.Path:
    """Return a version's directory, or the highest version of a model's directory.

    A symbolic link to a version (`current -> 1`) is followed to a numbered folder.

    Raises:
        ValueError: If the path is not a version and has none.
    """
    version = local(path)
    if not is_saved_model(version):
        for highest in filter(is_saved_model, newest(version)):
            return highest
        raise ValueError(
            f"Expected numbered versions in '{version}', not none. Give the path of tfbn.export."
        )
    while _number(version.name) is None and version.is_symlink():
        version = version.parent / os.readlink(version)
        version = version.resolve() if version.name in ("", "..") else version
    if _number(version.name) is None:
        raise ValueError(
            f"Expected a numbered folder, not '{version}'. Make it a version: {_moved(version)}"
        )
    return version


def is_saved_model(folder: pathlib.Path) -> bool:
    """Return whether a SavedModel is directly in a folder."""
    return os.path.exists(folder / "saved_model.pb")


def _moved(folder: pathlib.Path) -> str:
    """Return a command that moves a SavedModel into a subfolder `1`."""
    old, new = shlex.quote(str(folder)), shlex.quote(f"{folder}.versions")
    return f"mkdir {new} && mv {old} {new}/1 && mv {new} {old}"


def _and_parents(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    return (path, *path.parents)


def _number(name: str) -> int | None:
    """Return the number that a server parses from a name; `007` is 7."""
    # More than 19 digits without leading zeros are over MAX_VERSION.
    if name.isascii() and name.isdigit() and len(name.lstrip("0")) <= 19:
        return int(name) if int(name) <= MAX_VERSION else None
    return None


def numbered(directory: pathlib.Path) -> dict[int, str]:
    """Return the versions in a model's directory, number -> name."""
    names = os.listdir(directory) if directory.is_dir() else []
    return {number: name for name in names if (number := _number(name)) is not None}


def newest(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the directories of a model's versions in descending order."""
    for _, name in sorted(numbered(directory).items(), reverse=True):
        yield directory / name


def checked(directory: pathlib.Path, version: int | None) -> int | None:
    """Return the number of a version that can be written, or `None` for the next free number.

    Raises:
        FileExistsError: If the version exists.
        ValueError: If it is not an integer in the range, or if no number is free.
    """
    if version is None:
        _next(directory)
        return None
    integer = isinstance(version, (int, np.integer)) and not isinstance(version, bool)
    if not (integer and 0 <= version <= MAX_VERSION):
        raise ValueError(f"Expected an integer version from 0 to 2**63 - 1. Received: {version!r}.")
    if version in numbered(directory):
        raise _exists(directory, version)
    return int(version)


@contextlib.contextmanager
def unfinished(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a path for a version that is being written, which no server loads.

    It is in a hidden directory that is removed afterwards. After an error, parents that were
    created are removed too. Hidden directories of killed processes are removed.
    """
    with _created(directory), atomic.temporary_directory(directory, "export") as folder:
        yield folder / "version"


def put_in_place(written: pathlib.Path, directory: pathlib.Path, version: int | None) -> int:
    """Flush a version to the disk, and rename it to its number.

    Args:
        written: A directory in the file system of `directory`.
        directory: The model's directory.
        version: A number, or `None` for the next free number, also with concurrent processes.

    Returns:
        The number.

    Raises:
        FileExistsError: If another process has created this version.
    """
    atomic.flush(written)
    while True:
        number = _next(directory) if version is None else version
        try:
            os.rename(written, directory / str(number))
            break
        except OSError as error:
            if number not in numbered(directory):
                raise
            if version is not None:
                raise _exists(directory, version) from error
    atomic.flush_directory(directory)
    return number


def _next(directory: pathlib.Path) -> int:
    version = max(numbered(directory), default=0) + 1
    if version > MAX_VERSION:
        raise ValueError(
            f"Version {version - 1} of {str(directory)!r} is the highest possible. Give a free one."
        )
    return version


def damaged(file: pathlib.Path, why: Exception | str) -> ValueError:
    """Return an error for a damaged file in a version."""
    why = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return ValueError(f"Expected an intact file. Received: {str(file)!r} ({why}). Export again.")


def _exists(directory: pathlib.Path, version: int) -> FileExistsError:
    return FileExistsError(
        f"Version {version} of {str(directory)!r} exists. Leave version out for the next one."
    )


@contextlib.contextmanager
def _created(path: pathlib.Path) -> Iterator[None]:
    """Create a directory and its parents, and remove them again after an error."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
        for folder in missing:
            atomic.flush_directory(folder.parent)
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # Another export has written to it.
                folder.rmdir()
        raise
