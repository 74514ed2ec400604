"""A header and named arrays as bytes with a checksum.

The bytes are a safetensors file. Its tensor `header` holds JSON in UTF-8; every other tensor is an
array. Its metadata has `sha256`, the SHA-256 of all bytes with zeros in place of the digest, so
damage anywhere in the file is noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = b"0" * 64
# JSON takes up to 25 times its bytes when it is read.
_LIMIT = 4 << 20


def pack(header: dict, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file with a header and arrays, for `unpack`.

    Args:
        header: Of values that `json.dumps` takes, at most 4 MiB of JSON.
        arrays: By name; of booleans, integers or floating-point numbers of at most 64 bits.

    Raises:
        ValueError: If the header is too long, or an array is of another dtype.
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
        # `ascontiguousarray` makes a scalar an array of one element.
        tensors[name] = np.ascontiguousarray(little).reshape(array.shape)
    content = safetensors.numpy.save(tensors, {"sha256": _ZEROS.decode()})
    start, digest = _sealed(content)
    return b"".join([content[:start], digest, memoryview(content)[start + 64 :]])


def unpack(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays that `pack` was given.

    Nothing in the file is executed, and no more memory is taken than twice the bytes of the file,
    and at most 100 MiB for the header.

    Raises:
        ValueError: If it is damaged anywhere, or is nothing that `pack` gave.
    """
    start, digest = _sealed(content)
    if content[start : start + 64] != digest:
        raise ValueError("its checksum is another")
    try:
        arrays = safetensors.numpy.load(content)
        header = _header(arrays.pop("header"))
    except MemoryError:
        raise
    except Exception as error:  # Those of a hostile file are not documented.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return header, arrays


def _sealed(content: bytes) -> tuple[int, bytes]:
    """The place of the digest in a file, and the digest that it must have there."""
    length = int.from_bytes(content[:8], "little")
    if length > min(_LIMIT, len(content) - 8):
        raise ValueError("not a safetensors file, or too many arrays")
    found = _DIGEST.search(content, 8, 8 + length)
    if found is None:
        raise ValueError("it has no checksum")
    whole = memoryview(content)
    digest = hashlib.sha256(whole[: found.start(1)])
    digest.update(_ZEROS)
    digest.update(whole[found.end(1) :])
    return found.start(1), digest.hexdigest().encode()


def _header(encoded: np.ndarray) -> dict:
    if encoded.nbytes > _LIMIT:
        raise ValueError("too long a header")
    header = json.loads(encoded.tobytes())
    if not isinstance(header, dict):
        raise ValueError("another kind of header")
    return header
