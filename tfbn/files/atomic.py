"""Write files and folders atomically: readers see the old content or all of the new.

Content is written to a hidden folder in the target's folder, flushed to disk, and renamed in one
step. The name of the hidden folder has the process and the host, and a file in it is locked until
the process ends. The next writer to the same folder removes hidden folders without a lock.
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
except ImportError:  # Windows. Without locks no hidden folder is removed.
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner"


def read(path: str | os.PathLike) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: See `open`.
        ValueError: If it is not a regular file; others may be endless.
    """
    _require_regular(path, os.stat(path))
    with open(path, "rb") as file:
        return file.read()


def require_writable(path: str | os.PathLike) -> None:
    """Raise an error if `write` cannot write to `path`.

    Raises:
        OSError: If the folder does not exist, or it or the file is read-only.
        ValueError: If `path` exists and is not a regular file.
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
    """Write a file atomically.

    It gets the permissions of the old file, or of the umask. For a symbolic link, its target is
    written.

    Raises:
        OSError: See `open`, or if the disk is full. The old file is then unchanged.
        ValueError: If `path` exists and is not a regular file.
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
        # The error names `path` and not the hidden file.
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path, and rename it to `path` if the context ends without an error.

    Raises:
        FileExistsError: If `path` has been created in the meantime. It is not overwritten.
    """
    parent, name = os.path.split(os.fsdecode(path))
    with temporary_directory(parent or ".", "model") as folder:
        yield folder / name
        _flush(folder / name)
        _link(folder / name, path)
    flush_directory(parent or ".")


@contextlib.contextmanager
def temporary_directory(parent: str | os.PathLike, kind: str) -> Iterator[pathlib.Path]:
    """Create a hidden folder, and remove it after the context, or in a later one after a kill.

    Args:
        parent: The folder to create it in.
        kind: A word in its name. Only folders of this kind are removed.
    """
    parent = pathlib.Path(parent)
    _clear(parent, kind)
    prefix = f".tfbn-{kind}-{os.getpid()}-{socket.gethostname()}-"
    while True:
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=parent, ignore_cleanup_errors=True
        ) as name:
            folder = pathlib.Path(name)
            with _locked(folder) as locked:
                if locked:
                    yield folder
                    return


def flush(folder: str | os.PathLike[str]) -> None:
    """Flush every file and directory in a folder to disk."""
    for parent, _, names in os.walk(os.fspath(folder), topdown=False):
        for name in names:
            _flush(os.path.join(parent, name))
        flush_directory(parent)


def flush_directory(path: str | os.PathLike) -> None:
    """Flush a directory to disk, so that renames survive a crash of the machine."""
    with contextlib.suppress(OSError):  # Some file systems do not support it.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path, content, old):
    """Write and flush a file, with owner and permissions of the old file, if it exists."""
    with open(path, "wb") as file:
        if os.path.exists(old) and hasattr(os, "fchmod"):
            status = os.stat(old)
            with contextlib.suppress(OSError):  # Only root may change the owner.
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o777)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _link(source, path):
    """Rename a file, and raise `FileExistsError` if `path` exists."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without hard links: create `path` first.
        open(path, "x").close()
        try:
            os.replace(source, path)
        except BaseException:
            os.unlink(path)
            raise


@contextlib.contextmanager
def _locked(folder):
    """Lock a hidden folder; yield `False` if another process is removing it."""
    if fcntl is None:
        yield True
        return
    with contextlib.ExitStack() as files:
        try:
            owner = files.enter_context(open(folder / _OWNER, "a"))
        except FileNotFoundError:  # Another process removed the folder before it had a lock.
            yield False
            return
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # A file system without locks, where no hidden folder is removed.
            pass
        yield os.fstat(owner.fileno()).st_nlink > 0


def _clear(parent, kind):
    """Remove the hidden folders of this host that no process has locked.

    A process id would not do: containers with the same host name have separate ids. The host is
    compared, because locks of a network file system may be local to a host.
    """
    if fcntl is None:
        return
    host = re.escape(socket.gethostname())
    ours = re.compile(rf"\.tfbn-{re.escape(kind)}-\d+-{host}-\w+")
    for folder in parent.glob(f".tfbn-{kind}-*"):
        if not ours.fullmatch(folder.name):
            continue
        # A process may have been killed before it wrote the file, or while it removed the folder.
        with contextlib.suppress(OSError), open(folder / _OWNER, "a") as owner:
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
            f"Expected the name of a file. Received: {os.fsdecode(path)!r}, "
            f"{kinds.get(stat.S_IFMT(status.st_mode), 'of another kind')}."
        )
