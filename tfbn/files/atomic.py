"""Files and folders that are whole or not there: the one writer.

Something is written in a hidden folder beside its place, flushed to disk, and renamed in one step.
The folder's name holds the process and the host, and a file in it is locked for as long as the
process lives, however that ends. The next writer in the same place removes those without an owner.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is cleared there.
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner"


def read(path: str | os.PathLike) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: As `open`.
        ValueError: If it is not a regular file: another kind may have no end.
    """
    _require_regular(path, os.stat(path))
    with open(path, "rb") as file:
        return file.read()


def require_writable(path: str | os.PathLike) -> None:
    """Raise an error if `write` could not write a file of this name.

    Raises:
        OSError: If the folder does not exist, or it or the file is read-only.
        ValueError: If there is something under the name that is not a regular file.
    """
    target = os.path.realpath(os.fsdecode(path))
    with contextlib.suppress(FileNotFoundError):
        _require_regular(path, os.stat(target))
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "No such folder", folder)
    for name, access in ((folder, os.W_OK | os.X_OK), (target, os.W_OK)):
        if os.path.exists(name) and not os.access(name, access):
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))


def write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that under its name there is ever the old content or all of the new.

    Permissions are those of the old file, or as the umask has it. A symbolic link stays, and the
    file that it points to is written.

    Raises:
        OSError: As `open`, or if the disk is full. The old file is then as it was.
        ValueError: If there is something under the name that is not a regular file.
    """
    target = os.path.realpath(os.fsdecode(path))
    try:
        require_writable(path)
        with temporary_directory(os.path.dirname(target), "file") as folder:
            _write(folder / "content", content, target)
            os.replace(folder / "content", target)
        flush_directory(os.path.dirname(target))
    except OSError as error:
        if error.errno is None:
            raise
        # Nobody but this module knows the name of the hidden file.
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A place to write a file that gets its name when the context ends without an error.

    Raises:
        FileExistsError: If another file has come to the name in the meantime. That one stays.
    """
    parent, name = os.path.split(os.fsdecode(path))
    with temporary_directory(parent or ".", "model") as folder:
        yield folder / name
        _flush(folder / name)
        _link(folder / name, path)
    flush_directory(parent or ".")


@contextlib.contextmanager
def temporary_directory(parent: str | os.PathLike, kind: str) -> Iterator[pathlib.Path]:
    """A new hidden folder, which goes with the context, or with a later one after a kill.

    Args:
        parent: The folder that it is made in.
        kind: A word in its name. Those of other kinds are left alone.
    """
    parent = pathlib.Path(parent)
    _clear(parent, kind)
    prefix = f".tfbn-{kind}-{os.getpid()}-{socket.gethostname()}-"
    while True:
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=parent, ignore_cleanup_errors=True
        ) as name:
            folder = pathlib.Path(name)
            with _owned(folder) as is_ours:
                if is_ours:
                    yield folder
                    return


def flush(folder: str | os.PathLike) -> None:
    """Write every file in a folder, and every list of files, from memory to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(os.path.join(parent, name))
        flush_directory(parent)


def flush_directory(path: str | os.PathLike) -> None:
    """Write the list of files of a folder to the disk.

    Without it a crash of the machine may bring old names back.
    """
    with contextlib.suppress(OSError):  # Not every file system can.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path, content, before):
    """Write a file to the disk, with the owner and the permissions of one that may exist."""
    with open(path, "wb") as file:
        if os.path.exists(before) and hasattr(os, "fchmod"):
            status = os.stat(before)
            with contextlib.suppress(OSError):  # Only root may give a file to others.
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o777)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _link(finished, path):
    """Give a finished file its name, which another process's file may have taken."""
    try:
        os.link(finished, path)
    except FileExistsError:
        raise
    except OSError:  # File systems without hard links: the name has to be taken first.
        open(path, "x").close()
        try:
            os.replace(finished, path)
        except BaseException:
            os.unlink(path)
            raise


@contextlib.contextmanager
def _owned(folder):
    """Hold the lock of a hidden folder; `False` if another process is just clearing it."""
    if fcntl is None:
        yield True
        return
    with open(folder / _OWNER, "w") as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # A file system without locks, where nothing is ever cleared.
            pass
        # Another process may have removed it before it was locked.
        yield os.fstat(owner.fileno()).st_nlink > 0


def _clear(parent, kind):
    """Remove the hidden folders of this host that no process owns any more.

    The lock shows it, not the process's number: a container has numbers of its own, and may have
    the name of its host. The host's name counts because a network's file system may keep
    locks to itself on each host.
    """
    if fcntl is None:
        return
    host = re.escape(socket.gethostname())
    ours = re.compile(rf"\.tfbn-{re.escape(kind)}-\d+-{host}-\w+")
    for folder in parent.glob(f".tfbn-{kind}-*"):
        if not ours.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError), open(folder / _OWNER, "r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


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
