"""The directory of a model: its versions, and how a new one gets there, whole and at once."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from tfbn.files.hidden_folders import hidden

# TensorFlow Serving reads the name of a version as a signed integer of 64 bits.
MAX_VERSION = 2**63 - 1


def local(path: str | os.PathLike) -> pathlib.Path:
    """A path in the local file system, where a directory is renamed in one step."""
    if "://" in os.fspath(path):
        raise ValueError(
            f"Expected a local directory. Received: {os.fspath(path)!r}. Object stores cannot "
            "rename a directory in one step: export locally, then copy the version."
        )
    return pathlib.Path(path)


def numbered(directory: pathlib.Path) -> dict[int, str]:
    """Names of the versions in a model's directory, by number; `007` is 7 to a server."""
    names = os.listdir(directory) if directory.is_dir() else []
    # More than 19 digits without leading zeros are over MAX_VERSION: no need to read them.
    digits = [name for name in names if name.isascii() and name.isdigit()]
    short = [name for name in digits if len(name.lstrip("0")) <= 19]
    return {int(name): name for name in short if int(name) <= MAX_VERSION}


def newest(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The directories of a model's versions, from the highest to the lowest."""
    for _, name in sorted(numbered(directory).items(), reverse=True):
        yield directory / name


def checked(directory: pathlib.Path, version: int | None) -> int | None:
    """The number of a version that can be written, or `None` for the next free one."""
    if version is None:
        _next(directory)
        return None
    integer = isinstance(version, (int, np.integer)) and not isinstance(version, bool)
    if not (integer and 0 <= version <= MAX_VERSION):
        raise ValueError(
            "Expected a version that is a whole number from 0 to 2**63 - 1, as TensorFlow "
            f"Serving reads them. Received: {version!r}. Leave it out for the next free one."
        )
    if version in numbered(directory):
        raise _exists(directory, version)
    return int(version)


@contextlib.contextmanager
def unfinished(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place for a version that is being written, where no server looks for one.

    It lies in a hidden directory that is gone afterwards, and if an error is raised so are the
    parents that had to be made. The hidden directories of processes that were killed are removed.
    """
    with _made(directory), hidden(directory, "export") as folder:
        yield folder / "version"


def put_in_place(written: pathlib.Path, directory: pathlib.Path, version: int | None) -> int:
    """Give a written version its number, once all of it is on the disk.

    Args:
        written: A directory in the file system of `directory`.
        directory: The model's directory.
        version: A number, or `None` for the next free one, whatever other processes take.

    Returns:
        The number.

    Raises:
        FileExistsError: If another process was faster with this number.
    """
    _flush_all(written)
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
    _flush_directory(directory)
    return number


def _next(directory: pathlib.Path) -> int:
    version = max(numbered(directory), default=0) + 1
    if version > MAX_VERSION:
        raise ValueError(
            "Expected a model's directory with a number left after its highest version. Received: "
            f"{str(directory)!r} with version {MAX_VERSION}, the last that TensorFlow Serving can "
            "read. Give a version that is free."
        )
    return version


def _exists(directory: pathlib.Path, version: int) -> FileExistsError:
    return FileExistsError(
        f"Expected a version that does not exist yet. Received: {version}, and "
        f"{str(directory / str(version))!r} is there. Leave the version out for the next free one."
    )


@contextlib.contextmanager
def _made(path: pathlib.Path) -> Iterator[None]:
    """A directory that exists; if an error follows, the directories that had to be made go."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
        for made in missing:
            _flush_directory(made.parent)
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # Another export has put something there.
                made.rmdir()
        raise


def _flush_all(directory: pathlib.Path) -> None:
    """Write every file in a directory, and every list of files, from memory to the disk."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_directory(parent)


def _flush_directory(path: str | os.PathLike) -> None:
    with contextlib.suppress(OSError):  # Not every file system can.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
