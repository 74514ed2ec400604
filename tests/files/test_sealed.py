"""Tests of `tfbn.files.sealed`."""

import hashlib
import json
import re
import time
import tracemalloc
from random import Random

import numpy as np
import pytest
import safetensors.numpy
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tfbn.files import sealed

DTYPES = st.sampled_from(["bool", "int8", "uint8", "int64", ">i4", "float16", "float32", "float64"])


def same(a, b):
    """Compare the contents of two files to the bit."""
    return (
        a[0] == b[0]
        and a[1].keys() == b[1].keys()
        and all(
            (x.dtype.newbyteorder("="), x.shape) == (y.dtype.newbyteorder("="), y.shape)
            and x.astype(x.dtype.newbyteorder("<")).tobytes()
            == y.astype(y.dtype.newbyteorder("<")).tobytes()
            for x, y in ((a[1][name], b[1][name]) for name in a[1])
        )
    )


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none() | st.booleans()),
    st.dictionaries(
        st.text("abc_0", min_size=1, max_size=4),
        DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0))),
        max_size=4,
    ),
)
@settings(max_examples=60)
def test_pack_and_unpack(header, arrays):
    content = sealed.pack(header, arrays)
    assert same(sealed.unpack(content), (header, arrays))
    assert sealed.pack(header, arrays) == content
    assert set(safetensors.numpy.load(content)) == {"header", *arrays}
    assert seal(content) == content


def test_array_in_fortran_order_is_unpacked():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    _, arrays = sealed.unpack(sealed.pack({}, {"a": array}))
    np.testing.assert_array_equal(arrays["a"], array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}]),
        np.array(["a"]),
        np.zeros(2, "V3"),
        np.zeros(2, "c8, i4"),
        1j,
        None,
        np.longdouble(1),
    ],
)
def test_only_numbers_can_be_packed(array):
    with pytest.raises(ValueError, match=r"Expected arrays of numbers\. Received: 'x' of dtype"):
        sealed.pack({}, {"x": array})


def test_too_long_header_is_refused():
    limit = 4 << 20
    with pytest.raises(ValueError, match=rf"at most {limit} bytes\. Received: {limit + 13} bytes"):
        sealed.pack({"names": "x" * limit}, {})


def seal(content):
    """Correct the checksum of a file."""
    match = re.search(rb'"sha256":"(.{64})"', content)
    if match is None:
        return content
    start, end = match.span(1)
    digest = hashlib.sha256(content[:start] + b"0" * 64 + content[end:]).hexdigest()
    return content[:start] + digest.encode() + content[end:]


def made(tensors, data=b"{}"):
    """Build a file with a valid checksum without `pack`."""
    text = json.dumps({"__metadata__": {"sha256": "0" * 64}, **tensors}, separators=(",", ":"))
    return seal(len(text).to_bytes(8, "little") + text.encode() + data)


def tensor(begin, end, shape=None, dtype="U8"):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADER = {"header": tensor(0, 2)}
HUGE = 1 << 40


def test_file_of_another_writer_is_read():
    assert sealed.unpack(made(HEADER)) == ({}, {})  # The cases below are refused for their content.


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({}, b""),
        ({"x": tensor(0, 2)}, b"{}"),
        ({"header": tensor(0, 0)}, b""),
        (HEADER, b"[]"),
        (HEADER, b"{]"),
        (HEADER, b"\xff\xff"),
        (HEADER, b"{"),
        (HEADER, b"{}}"),
        ({"header": tensor(0, 2, [3])}, b"{}"),
        ({"header": tensor(0, 2, [-1, -2])}, b"{}"),
        ({"header": tensor(0, 2, [HUGE])}, b"{}"),
        ({"header": tensor(0, 2, [HUGE, HUGE])}, b"{}"),
        ({"header": tensor(0, HUGE)}, b"{}"),
        ({"header": tensor(0, 2, dtype="O")}, b"{}"),
        ({"header": tensor(2, 0, [2])}, b"{}"),
        ({**HEADER, "x": tensor(0, 2)}, b"{}"),
        ({**HEADER, "x": tensor(3, 5)}, b"{}   "),
        ({"header": tensor(0, 50_000)}, b"[" * 50_000),
        ({"header": 3}, b"{}"),
    ],
)
def test_files_with_other_contents_are_refused(tensors, data):
    with pytest.raises(ValueError):
        sealed.unpack(made(tensors, data))


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4", b"\xff" * 100, bytes(8), (2).to_bytes(8, "little") + b"{}", b"x" * 200],
)
def test_other_bytes_are_refused(content):
    with pytest.raises(ValueError):
        sealed.unpack(content)


def peak(function):
    """Return the peak memory of a function in bytes, and its result or exception."""
    tracemalloc.start()
    try:
        result = function()
    except ValueError as error:
        result = error
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most, result


SLACK = 1 << 20  # Bytes.


def test_too_many_arrays_are_refused_early():
    many = made(HEADER | {f"{i:0500}": tensor(2, 2) for i in range(8000)})
    most, error = peak(lambda: sealed.unpack(many))
    assert isinstance(error, ValueError) and "too many arrays" in str(error)
    assert most < SLACK


@pytest.mark.slow
def test_largest_header_takes_25_times_its_bytes():
    # Brackets are the worst case: 3 bytes of JSON become an object of 56, and 8 in the list.
    text = b'{"a":[' + b"[]," * 50_000 + b"[]]}"
    content = made({"header": tensor(0, len(text))}, text)
    most, contents = peak(lambda: sealed.unpack(content))
    assert len(contents[0]["a"]) == 50_001
    assert most < 25 * len(text) + SLACK
    assert 25 * sealed._LIMIT <= 100 << 20


def test_memory_of_unpacking_is_bounded_by_the_file():
    content = sealed.pack({}, {f"a{i}": np.zeros(1 << 16) for i in range(16)})
    most, contents = peak(lambda: sealed.unpack(content))
    assert len(contents[1]) == 16
    assert most < len(content) + SLACK
    most, packed = peak(lambda: sealed.pack(*contents))
    assert packed == content


def check_damage(content, random):
    """Require a ValueError for a damaged file, or unchanged contents."""
    bad = damaged(content, random)
    start = time.thread_time()
    try:
        contents = sealed.unpack(bad)
    except ValueError:
        pass
    else:
        assert same(contents, sealed.unpack(content))
        assert bad == content
    assert time.thread_time() - start < 5


CONTENT = sealed.pack(
    {"format": 7, "names": ["a", "b"]},
    {"a": np.arange(600.0), "b": np.arange(3), "c": np.float32(1.5)},
)


def test_damage_is_detected():
    for seed in range(1000):
        check_damage(CONTENT, Random(seed))


@pytest.mark.slow
def test_damage_is_detected_in_many_files():
    for seed in range(1000, 11_000):
        check_damage(CONTENT, Random(seed))


@pytest.mark.slow
def test_every_flipped_bit_is_detected():
    for at in range(8 * len(CONTENT)):
        bad = bytearray(CONTENT)
        bad[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError):
            sealed.unpack(bytes(bad))


def test_too_large_header_is_refused_by_unpack():
    with pytest.raises(ValueError, match="at most 4194304 bytes"):
        sealed.pack({"a": "x" * (4 << 20)}, {})
    long = made({"header": tensor(0, (4 << 20) + 1)}, bytes((4 << 20) + 1))
    with pytest.raises(ValueError, match="too long a header"):
        sealed.unpack(long)


def test_memory_error_is_not_damage(monkeypatch):
    def full(*args):
        raise MemoryError

    content = sealed.pack({}, {"a": np.ones(3)})
    monkeypatch.setattr(safetensors.numpy, "load", full)
    with pytest.raises(MemoryError):
        sealed.unpack(content)
