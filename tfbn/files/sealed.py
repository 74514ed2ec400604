"""A header and named arrays as bytes with a checksum.

The bytes are a NumPy `.npz` archive whose members are stored and never compressed, so `numpy.load`
reads it too. Its member `header` is JSON; every other one is an array. The archive's comment, its
last bytes, is the SHA-256 of all bytes before, so damage anywhere in the file is noticed.
"""

import hashlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Container, Mapping

import numpy as np

_SEAL = b"SHA-256 of all bytes before: "
_DIGITS = 64
_END = struct.Struct("<4s8xI6x")  # Of a ZIP archive: a signature, the length of its directory.
# JSON and a ZIP directory take up to 25 times their bytes when they are read.
_LIMIT = 4 << 20


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
