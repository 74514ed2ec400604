"""A file that is written whole or not at all."""

import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows, where no file can be deleted that another process has open.
    fcntl = None  # type: ignore[assignment]

_HOST = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:64]
_PARTIAL = f".tfbn-{_HOST}-", ".partial"


def read(path: str | os.PathLike) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: As `open`.
        ValueError: If it is not a regular file: another kind may have no end.
    """
    _require_regular(path, os.stat(path))
    with open(path, "rb") as file:
        return file.read()


def write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that under its name there is ever the old content or all of the new.

    The content goes into a hidden file in the same folder, is flushed to disk, and takes the name
    in one step. Permissions are those of the old file, or as the umask has it. A symbolic link
    stays, and the file that it points to is written. Hidden files of processes that were killed
    while they wrote into this folder are removed.

    Raises:
        OSError: As `open`, or if the disk is full. The old file is then as it was.
        ValueError: If there is something under the name that is not a regular file.
    """
    try:
        _write(path, os.path.realpath(os.fsdecode(path)), content)
    except OSError as error:
        if error.errno is None:
            raise
        # Nobody but this module knows the name of the hidden file.
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Remove the hidden files in a folder that killed processes of this host have left.

    A process holds a lock on the file that it writes, and the lock ends with the process: no
    number that another process may have by now, or that is another in a container.
    """
    names = os.listdir(folder)
    prefix, suffix = _PARTIAL
    for name in names:
        if name.startswith(prefix) and name.endswith(suffix):
            # One that is still written, that is another user's, or that is gone by now.
            with contextlib.suppress(OSError), _locked(os.path.join(folder, name), os.O_RDWR):
                os.unlink(os.path.join(folder, name))


def _write(path: str | os.PathLike, target: str, content: bytes) -> None:
    folder = os.path.dirname(target)
    before = None
    with contextlib.suppress(FileNotFoundError):
        before = os.stat(target)
    if before is not None:
        _require_regular(path, before)
        if not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied", target)
    remove_abandoned(folder)
    with _partial(folder) as (name, descriptor):
        if before is not None and hasattr(os, "fchmod"):
            with contextlib.suppress(OSError):  # Only root may give a file to others.
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o777)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        os.replace(name, target)
    # Without it a crash of the machine may bring the old file back, whole as well.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _partial(folder: str) -> Iterator[tuple[str, int]]:
    """The name and descriptor of a new hidden file that does not outlive an error."""
    prefix, suffix = _PARTIAL
    while True:
        name = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}{suffix}")
        with _locked(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, wait=True) as descriptor:
            # Another process may have removed it between its making and its locking.
            if fcntl is None or os.fstat(descriptor).st_nlink:
                try:
                    yield name, descriptor
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(name)
                    raise
                return


@contextlib.contextmanager
def _locked(name: str, flags: int, wait: bool = False) -> Iterator[int]:
    """The descriptor of a file that no other process has locked."""
    descriptor = os.open(name, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                # Some file systems have no locks. Files on them are never removed.
                if not wait:
                    raise
        yield descriptor
    finally:
        os.close(descriptor)


def _require_regular(path: str | os.PathLike, status: os.stat_result) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"Expected the name of a file. Received: {os.fsdecode(path)!r}, which is "
            f"{kinds.get(stat.S_IFMT(status.st_mode), 'of another kind')}. Give another name."
        )
