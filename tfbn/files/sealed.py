"""Convert a header and named arrays to bytes with a checksum, and back.

The bytes are a safetensors file. Its tensor `header` stores JSON in UTF-8; every other tensor is an
array. Its metadata has `sha256`, the SHA-256 of all bytes with zeros in place of the digest, which
detects damage anywhere in the file.
"""

import hashlib
import json
import re
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = b"0" * 64
# Parsed JSON takes up to 25 times the memory of its bytes.
_LIMIT = 4 << 20


def pack(header: dict, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a file with a header and arrays, for `unpack`.

    Args:
        header: Values that `json.dumps` supports, at most 4 MiB of JSON.
        arrays: Name -> array of booleans, integers or floating-point numbers of at most 64 bits.

    Raises:
        ValueError: If the header is too long, or an array has another dtype.
    """
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    if len(encoded) > _LIMIT:
        raise ValueError(
            f"Expected a header of at most {_LIMIT} bytes. Received: {len(encoded)} bytes."
        )
    tensors = {"header": encoded}
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise ValueError(
                f"Expected arrays of numbers. Received: {name!r} of dtype {array.dtype}."
            )
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        # `ascontiguousarray` converts a scalar to an array of one element.
        tensors[name] = np.ascontiguousarray(little).reshape(array.shape)
    content = safetensors.numpy.save(tensors, {"sha256": _ZEROS.decode()})
    start, digest = _sealed(content)
    return b"".join([content[:start], digest, memoryview(content)[start + 64 :]])


def unpack(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the header and the arrays of a file.

    Executes nothing in the file, and requires at most twice the memory of its bytes, and 100 MiB
    for the header.

    Raises:
        ValueError: If the file is damaged or was not created by `pack`.
    """
    start, digest = _sealed(content)
    if content[start : start + 64] != digest:
        raise ValueError("its checksum differs")
    try:
        arrays = safetensors.numpy.load(content)
        header = _header(arrays.pop("header"))
    except MemoryError:
        raise
    except Exception as error:  # safetensors does not document its errors.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return header, arrays


def _sealed(content: bytes) -> tuple[int, bytes]:
    """Return the index of the digest in a file, and the correct digest."""
    length = int.from_bytes(content[:8], "little")
    if length > min(_LIMIT, len(content) - 8):
        raise ValueError("not a safetensors file, or too many arrays")
    match = _DIGEST.search(content, 8, 8 + length)
    if match is None:
        raise ValueError("it has no checksum")
    view = memoryview(content)
    digest = hashlib.sha256(view[: match.start(1)])
    digest.update(_ZEROS)
    digest.update(view[match.end(1) :])
    return match.start(1), digest.hexdigest().encode()


def _header(encoded: np.ndarray) -> dict:
    if encoded.nbytes > _LIMIT:
        raise ValueError("too long a header")
    header = json.loads(encoded.tobytes())
    if not isinstance(header, dict):
        raise ValueError("another kind of header")
    return header
