"""A header and named arrays in one file with a checksum, there whole or not at all.

The file is a NumPy `.npz` archive whose members are stored and never compressed, so `numpy.load`
reads it too. Its member `header` is JSON; every other one is an array. The archive's comment, its
last bytes, is the SHA-256 of all bytes before, so damage anywhere in the file is noticed.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import socket
import stat
import struct
import zipfile
from collections.abc import Container, Iterator, Mapping

import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where no file can be deleted that another process has open.
    fcntl = None  # type: ignore[assignment]

_SEAL = b"SHA-256 of all bytes before: "
_DIGITS = 64
_END = struct.Struct("<4s8xI6x")  # Of a ZIP archive: a signature, the length of its directory.
# JSON and a ZIP directory take up to 25 times their bytes when they are read.
_LIMIT = 4 << 20
_HOST = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:64]
_PARTIAL = f".tfbn-{_HOST}-", ".partial"


def pack(header: dict, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file with a header and arrays, for `unpack`.

    Args:
        header: Of values that `json.dumps` takes, at most 4 MiB of JSON.
        arrays: By name; of booleans, integers or floating-point numbers that NumPy knows.

    Raises:
        ValueError: If the header is too long, or an array is of another dtype.
    """
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    if len(encoded) > _LIMIT:
        raise ValueError(
            f"Expected a header of at most {_LIMIT} bytes. Received: {len(encoded)} bytes."
        )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, array in {"header": encoded, **arrays}.items():
            array = np.asarray(array)
            if array.dtype.kind not in "biuf":
                raise ValueError(
                    f"Expected arrays of numbers. Received: {name!r} of dtype {array.dtype}."
                )
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            # Of fixed date, so that equal data makes equal bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getbuffer())
        archive.comment = _SEAL + bytes(_DIGITS)
    sealed = memoryview(content.getbuffer())[:-_DIGITS]
    return b"".join([sealed, hashlib.sha256(sealed).hexdigest().encode()])


def unpack(content: bytes, unsealed: Container[int] = ()) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays that `pack` was given.

    Nothing in the file is executed, and no more memory is taken than the file has bytes, and at
    most 100 MiB for the header.

    Args:
        content: The bytes of the file.
        unsealed: The values of `header["format"]` that need no checksum, because they were
            written when there was none.

    Raises:
        ValueError: If it is damaged anywhere, or is nothing that `pack` gave.
    """
    sealed = content[-_DIGITS - len(_SEAL) : -_DIGITS] == _SEAL
    if sealed:
        digest = hashlib.sha256(memoryview(content)[:-_DIGITS]).hexdigest()
        if content[-_DIGITS:] != digest.encode():
            raise ValueError("its checksum is another")
    try:
        arrays = _arrays(content, len(_SEAL) + _DIGITS if sealed else 0)
        header = _header(arrays.pop("header"))
    except MemoryError:
        raise
    except Exception as error:  # The errors of a damaged archive are not documented.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not sealed and header.get("format") not in unsealed:
        raise ValueError("it has no checksum")
    return header, arrays


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


def _arrays(content: bytes, comment: int) -> dict[str, np.ndarray]:
    """The members of an archive whose comment has that many bytes."""
    end = len(content) - comment - _END.size
    signature, length = _END.unpack_from(content, end)
    if signature != b"PK\5\6":
        raise ValueError("not the end of a ZIP archive")
    # The directory is read as a whole. A ZIP64 archive would have its length in another place.
    if length > _LIMIT or content[end - 20 : end - 16] == b"PK\6\7":
        raise ValueError("too many members")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        # A name stands beside the bytes of a member too, so no two can share their bytes.
        if len({m.filename for m in members}) < len(members):
            raise ValueError("two members of one name")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed members")
        # Each is read to its end, for only there its own checksum is compared.
        return {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}


def _array(member: bytes) -> np.ndarray:
    """The array in a member, without a copy; all of the member must be it."""
    file = io.BytesIO(member)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    if dtype.kind not in "biuf" or math.prod(shape) * dtype.itemsize != len(member) - start:
        raise ValueError("an array of another shape or dtype")
    return np.ndarray(shape, dtype, member, start, order="F" if fortran else "C")


def _header(encoded: np.ndarray) -> dict:
    if encoded.nbytes > _LIMIT:
        raise ValueError("too long a header")
    header = json.loads(encoded.tobytes())
    if not isinstance(header, dict):
        raise ValueError("another kind of header")
    return header


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
