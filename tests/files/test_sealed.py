"""Tests of `tfbn.files.sealed`: a header and arrays as bytes."""

import hashlib
import io
import struct
import time
import tracemalloc
import zipfile
from random import Random

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tfbn.files import sealed

DTYPES = st.sampled_from(["bool", "int8", "uint8", "int64", ">i4", "float16", "float32", "float64"])


def same(a, b):
    """Whether two files hold the same, to the bit."""
    return (
        a[0] == b[0]
        and a[1].keys() == b[1].keys()
        and all(
            (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
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
def test_what_is_packed_is_unpacked(header, held):
    content = sealed.pack(header, held)
    assert same(sealed.unpack(content), (header, held))
    assert sealed.pack(header, held) == content
    with np.load(io.BytesIO(content)) as archive:
        assert set(archive.files) == {"header", *held}
    digest = hashlib.sha256(content[:-64]).hexdigest().encode()
    assert content.endswith(b"SHA-256 of all bytes before: " + digest)


def test_an_array_in_another_order_is_unpacked():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    _, found = sealed.unpack(sealed.pack({}, {"a": array}))
    np.testing.assert_array_equal(found["a"], array)


@pytest.mark.parametrize(
    "array", [np.array([{}]), np.array(["a"]), np.zeros(2, "V3"), np.zeros(2, "c8, i4"), 1j, None]
)
def test_only_numbers_are_packed(array):
    with pytest.raises(ValueError, match=r"Expected arrays of numbers\. Received: 'x' of dtype"):
        sealed.pack({}, {"x": array})


def test_a_header_without_end_is_refused():
    limit = 4 << 20
    with pytest.raises(ValueError, match=rf"at most {limit} bytes\. Received: {limit + 13} bytes"):
        sealed.pack({"names": "x" * limit}, {})


def archive(members, compression=zipfile.ZIP_STORED):
    """An archive that `pack` did not write, with a right checksum."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, member in members.items():
            file.writestr(name, member)
        file.comment = b"SHA-256 of all bytes before: " + bytes(64)
    return seal(content.getvalue())


def seal(content):
    """Content whose last bytes are the checksum of the rest."""
    return content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode()


def npy(header, data=b"", version=b"\1\0"):
    """A NumPy array file of any header, which need not be true."""
    header = header.encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


HEADER = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", b"{}")
HUGE = 1 << 40


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"x.npy": HEADER},
        {"header.npy": b""},
        {"header.npy": b"PK"},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", b"[]")},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", b"{]")},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }", b"\xff")},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }", b"{}")},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }", b"{}")},
        {"header.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -2), }", b"{}")},
        {"header.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b"{}")},
        {"header.npy": npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({HUGE},), }}")},
        {"header.npy": npy(f"{{'descr': '|V0', 'fortran_order': False, 'shape': ({HUGE},), }}")},
        {"header.npy": npy("(" * 9000)},
        {"header.npy": npy("__import__('os').getpid()")},
        {"header.npy": HEADER[:6] + b"\2\0\0\0" + HEADER[8:]},
        {"header.npy": HEADER, "header": HEADER, "x.npy": HEADER[:-1]},
        {
            "header.npy": npy(
                "{'descr': '|u1', 'fortran_order': False, 'shape': (50000,), }", b"[" * 50000
            )
        },
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_archives_of_other_things_are_refused(members):
    with pytest.raises(ValueError):
        sealed.unpack(archive(members))


def test_an_archive_of_another_maker_is_read():
    # The cases above are refused for what is in them.
    assert sealed.unpack(archive({"header.npy": HEADER})) == ({}, {})


def peak(function):
    """The most bytes that were held at once while a function ran, and what it gave or raised."""
    tracemalloc.start()
    try:
        found = function()
    except ValueError as error:
        found = error
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most, found


SLACK = 1 << 20  # Bytes.


def zeros(megabytes):
    """A member that compresses to a thousandth."""
    size = megabytes << 20
    return npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}") + bytes(size)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused_unread(compression):
    content = archive({"header.npy": HEADER, "x.npy": zeros(16)}, compression)
    assert len(content) < 1 << 15
    most, error = peak(lambda: sealed.unpack(content))
    assert isinstance(error, ValueError) and "compressed" in str(error)
    assert most < len(content) + SLACK


@pytest.mark.parametrize("name", [b"%05d", b"x.npy"])
def test_members_that_share_their_bytes_are_refused(name):
    # A directory with 1,000 entries for the one member of 1 MiB.
    content = archive({"header.npy": HEADER, "x.npy": zeros(1)})
    end = len(content) - 22 - 29 - 64
    first, at = content.index(b"PK\1\2"), content.rindex(b"PK\1\2", 0, end)
    entry = content[at:end]
    entries = content[first:at] + b"".join(
        entry.replace(b"x.npy", name % i if b"%" in name else name) for i in range(1000)
    )
    numbers = (1001).to_bytes(2, "little") * 2 + len(entries).to_bytes(4, "little")
    bomb = seal(content[:first] + entries + content[end : end + 8] + numbers + content[end + 16 :])
    with zipfile.ZipFile(io.BytesIO(bomb)) as file:
        assert sum(member.file_size for member in file.infolist()) > 1000 << 20
    most, error = peak(lambda: sealed.unpack(bomb))
    assert isinstance(error, ValueError)
    assert most < len(bomb) + 3 * SLACK


def test_a_directory_of_many_members_is_refused_unread():
    many = archive({"header.npy": HEADER, **{f"{i:0500}": b"" for i in range(8000)}})
    most, error = peak(lambda: sealed.unpack(many))
    assert isinstance(error, ValueError) and "too many members" in str(error)
    assert most < SLACK


def test_a_second_directory_is_refused_unread():
    # The last record of the archive says that the directory is short, one before it says more.
    many = archive({"header.npy": HEADER, **{f"{i:0500}": b"" for i in range(8000)}})
    end, start = len(many) - 22 - 29 - 64, many.index(b"PK\1\2")
    numbers = (44, 45, 45, 0, 0, 8001, 8001, end - start, start)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", *numbers)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    short = many[end : end + 12] + (100).to_bytes(4, "little") + many[end + 16 :]
    content = seal(many[:end] + record + locator + short)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert len(file.infolist()) == 8001
    most, error = peak(lambda: sealed.unpack(content))
    assert isinstance(error, ValueError) and "too many members" in str(error)
    assert most < SLACK


@pytest.mark.slow
def test_the_costliest_header_takes_25_times_its_bytes():
    # Brackets cost most: JSON of 3 bytes becomes an object of 56, and 8 in the list.
    text = b'{"a":[' + b"[]," * 50_000 + b"[]]}"
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(text)},), }}"
    content = archive({"header.npy": npy(shape, text)})
    most, found = peak(lambda: sealed.unpack(content))
    assert len(found[0]["a"]) == 50_001
    assert most < 25 * len(text) + SLACK
    assert 25 * sealed._LIMIT <= 100 << 20


def test_unpacking_takes_the_bytes_of_the_file_once():
    content = sealed.pack({}, {f"a{i}": np.zeros(1 << 16) for i in range(16)})
    most, found = peak(lambda: sealed.unpack(content))
    assert len(found[1]) == 16
    assert most < len(content) + SLACK
    most, packed = peak(lambda: sealed.pack(*found))
    assert packed == content


def check_damage(content, random):
    """A damaged file is refused with a ValueError, or it was not changed."""
    bad = damaged(content, random)
    start = time.thread_time()
    try:
        found = sealed.unpack(bad)
    except ValueError:
        pass
    else:
        assert same(found, sealed.unpack(content))
        assert bad == content
    assert time.thread_time() - start < 5


CONTENT = sealed.pack(
    {"format": 7, "names": ["a", "b"]},
    {"a": np.arange(600.0), "b": np.arange(3), "c": np.float32(1.5)},
)


def test_damage_is_noticed():
    for seed in range(1000):
        check_damage(CONTENT, Random(seed))


@pytest.mark.parametrize("seal", [True, False])
def test_every_bit_of_the_header_of_a_large_array_counts(seal):
    # NumPy stops reading where this header says, and may never come to the member's checksum.
    content = CONTENT
    if not seal:
        content = content[: -64 - 29 - 2] + bytes(2)
    assert same(sealed.unpack(content, unsealed=(7,)), sealed.unpack(CONTENT))
    start = content.index(b"\x93NUMPY", content.index(b"a.npy"))
    for bit in range(8 * 128):
        bad = bytearray(content)
        bad[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            sealed.unpack(bytes(bad), unsealed=(7,))


@pytest.mark.slow
def test_damage_is_noticed_at_length():
    for seed in range(100_000, 200_000):
        check_damage(CONTENT, Random(seed))


@pytest.mark.slow
def test_every_single_bit_counts():
    for at in range(8 * len(CONTENT)):
        bad = bytearray(CONTENT)
        bad[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError):
            sealed.unpack(bytes(bad))


def test_what_is_too_large_to_be_a_header_is_refused():
    with pytest.raises(ValueError, match="at most 4194304 bytes"):
        sealed.pack({"a": "x" * (4 << 20)}, {})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        header = io.BytesIO()
        np.save(header, np.zeros((4 << 20) + 1, np.uint8))
        archive.writestr("header.npy", header.getvalue())
    with pytest.raises(ValueError, match="too long a header"):
        sealed.unpack(content.getvalue())


def test_memory_that_ends_is_no_damage(monkeypatch):
    def full(*args):
        raise MemoryError

    content = sealed.pack({}, {"a": np.ones(3)})
    monkeypatch.setattr(sealed, "_arrays", full)
    with pytest.raises(MemoryError):
        sealed.unpack(content)
