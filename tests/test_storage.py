"""Tests of `tfbn.storage`: the bytes of a file, and files that are whole or not there."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
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

from tfbn import storage

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


# The bytes.


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
    content = storage.pack(header, held)
    assert same(storage.unpack(content), (header, held))
    assert storage.pack(header, held) == content
    with np.load(io.BytesIO(content)) as archive:
        assert set(archive.files) == {"header", *held}
    digest = hashlib.sha256(content[:-64]).hexdigest().encode()
    assert content.endswith(b"SHA-256 of all bytes before: " + digest)


def test_an_array_in_another_order_is_unpacked():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    _, found = storage.unpack(storage.pack({}, {"a": array}))
    np.testing.assert_array_equal(found["a"], array)


@pytest.mark.parametrize(
    "array", [np.array([{}]), np.array(["a"]), np.zeros(2, "V3"), np.zeros(2, "c8, i4"), 1j, None]
)
def test_only_numbers_are_packed(array):
    with pytest.raises(ValueError, match=r"Expected arrays of numbers\. Received: 'x' of dtype"):
        storage.pack({}, {"x": array})


def test_a_header_without_end_is_refused():
    limit = 4 << 20
    with pytest.raises(ValueError, match=rf"at most {limit} bytes\. Received: {limit + 13} bytes"):
        storage.pack({"names": "x" * limit}, {})


def archive(members, compression=zipfile.ZIP_STORED):
    """An archive that `pack` did not write, with a right checksum."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, member in members.items():
            file.writestr(name, member)
        file.comment = b"SHA-256 of all bytes before: " + bytes(64)
    return sealed(content.getvalue())


def sealed(content):
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
        storage.unpack(archive(members))


def test_an_archive_of_another_maker_is_read():
    # The cases above are refused for what is in them.
    assert storage.unpack(archive({"header.npy": HEADER})) == ({}, {})


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
    most, error = peak(lambda: storage.unpack(content))
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
    bomb = sealed(
        content[:first] + entries + content[end : end + 8] + numbers + content[end + 16 :]
    )
    with zipfile.ZipFile(io.BytesIO(bomb)) as file:
        assert sum(member.file_size for member in file.infolist()) > 1000 << 20
    most, error = peak(lambda: storage.unpack(bomb))
    assert isinstance(error, ValueError)
    assert most < len(bomb) + 3 * SLACK


def test_a_directory_of_many_members_is_refused_unread():
    many = archive({"header.npy": HEADER, **{f"{i:0500}": b"" for i in range(8000)}})
    most, error = peak(lambda: storage.unpack(many))
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
    content = sealed(many[:end] + record + locator + short)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert len(file.infolist()) == 8001
    most, error = peak(lambda: storage.unpack(content))
    assert isinstance(error, ValueError) and "too many members" in str(error)
    assert most < SLACK


@pytest.mark.slow
def test_the_costliest_header_takes_25_times_its_bytes():
    # Brackets cost most: JSON of 3 bytes becomes an object of 56, and 8 in the list.
    text = b'{"a":[' + b"[]," * 50_000 + b"[]]}"
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(text)},), }}"
    content = archive({"header.npy": npy(shape, text)})
    most, found = peak(lambda: storage.unpack(content))
    assert len(found[0]["a"]) == 50_001
    assert most < 25 * len(text) + SLACK
    assert 25 * storage._LIMIT <= 100 << 20


def test_unpacking_takes_the_bytes_of_the_file_once():
    content = storage.pack({}, {f"a{i}": np.zeros(1 << 16) for i in range(16)})
    most, found = peak(lambda: storage.unpack(content))
    assert len(found[1]) == 16
    assert most < len(content) + SLACK
    most, packed = peak(lambda: storage.pack(*found))
    assert packed == content


def check_damage(content, random):
    """A damaged file is refused with a ValueError, or it was not changed."""
    bad = damaged(content, random)
    start = time.monotonic()
    try:
        found = storage.unpack(bad)
    except ValueError:
        pass
    else:
        assert same(found, storage.unpack(content))
        assert bad == content
    assert time.monotonic() - start < 5


CONTENT = storage.pack(
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
    assert same(storage.unpack(content, unsealed=(7,)), storage.unpack(CONTENT))
    start = content.index(b"\x93NUMPY", content.index(b"a.npy"))
    for bit in range(8 * 128):
        bad = bytearray(content)
        bad[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            storage.unpack(bytes(bad), unsealed=(7,))


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
            storage.unpack(bytes(bad))


# Files on disk.


def names(folder):
    """All that is in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def mode(path):
    """The permissions of a file."""
    return stat.S_IMODE(os.stat(path).st_mode)


@contextlib.contextmanager
def umask(mask):
    """A umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_what_is_written_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["file", "with space", "ünïcødé", "-", "'\"", "new\nline", "." * 3, "x" * 255, b"bytes"]
    for i, name in enumerate(odd):
        for path in (name, os.path.join(os.fsencode(tmp_path), os.fsencode(name))):
            storage.write(path, b"%d" % i)
            assert storage.read(path) == b"%d" % i
    assert names(tmp_path) == sorted(map(os.fsdecode, odd))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, mask):
    with umask(mask):
        storage.write(tmp_path / "a", b"1")
        (tmp_path / "b").write_bytes(b"1")
        assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~mask


@pytest.mark.parametrize("old", [0o600, 0o644, 0o664, 0o640, 0o777])
def test_a_file_keeps_its_permissions(tmp_path, old):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    path.chmod(old)
    for mask in (0o022, 0o077):
        with umask(mask):
            storage.write(path, b"2")
        assert mode(path) == old and path.read_bytes() == b"2"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.chown(path, 12345, 54321)
    storage.write(path, b"2")
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (12345, 54321)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_symbolic_link_is_written_through(tmp_path, exists, absolute):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real"
    if exists:
        target.write_bytes(b"1")
    (tmp_path / "middle").symlink_to(target if absolute else "elsewhere/real")
    (tmp_path / "link").symlink_to("middle")
    storage.write(tmp_path / "link", b"2")
    assert target.read_bytes() == b"2" and not target.is_symlink()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert storage.read(tmp_path / "link") == b"2"
    assert names(tmp_path / "elsewhere") == ["real"]
    assert names(tmp_path) == ["elsewhere", "link", "middle"]


def test_a_link_to_nowhere_says_so_with_the_name_given(tmp_path):
    (tmp_path / "link").symlink_to("no/such/file")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "loop", "no/such/file"):
        with pytest.raises(OSError) as error:
            storage.write(tmp_path / name, b"1")
        assert error.value.filename == str(tmp_path / name)
    assert names(tmp_path) == ["link", "loop"]


@contextlib.contextmanager
def special(path, kind):
    """Something under a name that is no file, and a device that cannot come to harm."""
    ends = os.openpty()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    else:
        path.symlink_to(os.ttyname(ends[1]))
    signal.setitimer(signal.ITIMER_REAL, 20)  # Reading one of them may never end.
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # The name of a socket has to be short.
    path = tmp_path / "a"

    def look():
        return os.lstat(path).st_ino, os.stat(path).st_ino, os.stat(path).st_mode, names(tmp_path)

    with special(path, kind):
        if linked:
            (tmp_path / "link").symlink_to("a")
            path = tmp_path / "link"
        before = look()
        says = rf"^Expected .* Received: '{path}', which is {kind}\. Give another name"
        for f in (storage.read, lambda p: storage.write(p, b"1")):
            with pytest.raises(ValueError, match=says):
                f(path)
        assert look() == before


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="only root can be another")
def test_what_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    read_only = tmp_path / "a"
    read_only.write_bytes(b"1")
    read_only.chmod(0o444)
    (tmp_path / "folder").mkdir(0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgid(54321)
            os.setuid(12345)
            for path in (read_only, tmp_path / "folder" / "b"):
                try:
                    storage.write(path, b"2")
                except PermissionError as error:
                    code = 0 if error.filename == str(path) else 2
                else:
                    code = 3
                if code:
                    break
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_only.read_bytes() == b"1" and mode(read_only) == 0o444
    assert names(tmp_path) == ["a", "folder"] and names(tmp_path / "folder") == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["open", "fsync", "replace", "fchmod"])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_leaves_all_as_it_was(tmp_path, monkeypatch, step, error, exists):
    path = tmp_path / "a"
    if exists:
        path.write_bytes(b"1")

    def fail(*args, **options):
        raise error

    if step == "open":
        monkeypatch.setattr(storage, "open", fail, raising=False)
    else:
        monkeypatch.setattr(os, step, fail)
    if step == "fchmod" and not exists:
        storage.write(path, b"2")
        return
    with pytest.raises(type(error)) as raised:
        storage.write(path, b"2")
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert names(tmp_path) == (["a"] if exists else [])
    assert not exists or path.read_bytes() == b"1"


FULL = """
import resource, signal, sys
import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write(sys.argv[1], bytes(200_000))
except OSError as error:
    print(error.filename == sys.argv[1])
"""


def run(code, *arguments, **options):
    """A process that runs some Python. It imports the module alone, without TensorFlow."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(storage.__file__).parent,
        **options,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_disk_that_is_full_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    with run(FULL, path) as process:
        assert process.communicate()[0] == "True\n"
    assert path.read_bytes() == b"1" and names(tmp_path) == ["a"]


KILLED = """
import os, sys
import storage
path, stop = sys.argv[1:]
i = 0
replace = os.replace
def stopping(*args):
    if i == 3:
        print("half", flush=True)
        sys.stdin.read()
    replace(*args)
os.replace = stopping if stop == "yes" else replace
while True:
    i += 1
    storage.write(path, b"%d;" % i * 1_000_000)
    print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_killed_processes_leave_is_removed_by_the_next_call(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    with (
        run(KILLED, path, "yes", stdin=subprocess.PIPE) as killed,
        run(KILLED, other, "yes", stdin=subprocess.PIPE) as alive,
    ):
        for process in (killed, alive):
            assert [process.stdout.readline() for _ in range(3)][-1] == "half\n"
        before = names(tmp_path)
        assert len(before) == 4 and before[2:] == ["a", "b"]
        storage.write(tmp_path / "c", b"1")
        assert names(tmp_path) == [*before, "c"]  # Both are at work.
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert names(tmp_path) == [*before, "c"]
        (tmp_path / ".tfbn-of-another-host-0123456789abcdef.partial").touch()
        (tmp_path / ".hidden.partial").touch()
        storage.write(tmp_path / "c", b"2")
        left = set(names(tmp_path)) - {"a", "b", "c"}
        assert ".hidden.partial" in left
        left -= {".hidden.partial", ".tfbn-of-another-host-0123456789abcdef.partial"}
        assert len(left) == 1 and left < set(before)
        alive.stdin.close()  # Goes on, and finds its file where it was.
        assert alive.stdout.readline() == "saved\n"
        alive.send_signal(signal.SIGKILL)
    assert path.read_bytes()[:2] == b"2;"
    assert path.read_bytes() == b"2;" * 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_processes_killed_at_any_moment(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    for _ in range(30):
        with run(KILLED, path, "no") as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content == content[: content.index(b";") + 1] * 1_000_000
        assert len(names(tmp_path)) <= 2
    storage.write(path, b"1")
    assert names(tmp_path) == ["a"]


def test_many_threads_write_one_file(tmp_path):
    path = tmp_path / "a"
    errors = []

    def work(i):
        try:
            for _ in range(20):
                storage.write(path, b"%d" % i * 10_000)
                content = storage.read(path)
                assert len(content) == 10_000 and len(set(content)) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["a"]


def test_where_there_are_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    abandoned = "x".join(storage._PARTIAL)
    (tmp_path / abandoned).touch()
    storage.write(tmp_path / "a", b"1")
    assert names(tmp_path) == [abandoned, "a"]
    monkeypatch.undo()
    storage.remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a"]


def test_the_name_of_a_hidden_file_is_short(tmp_path):
    assert len("".join(storage._PARTIAL)) + 16 <= 100
    assert json.dumps("".join(storage._PARTIAL)).isascii()


def test_what_is_too_large_to_be_a_header_is_refused():
    with pytest.raises(ValueError, match="at most 4194304 bytes"):
        storage.pack({"a": "x" * (4 << 20)}, {})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        header = io.BytesIO()
        np.save(header, np.zeros((4 << 20) + 1, np.uint8))
        archive.writestr("header.npy", header.getvalue())
    with pytest.raises(ValueError, match="too long a header"):
        storage.unpack(content.getvalue())


def test_memory_that_ends_is_no_damage(monkeypatch):
    def full(*args):
        raise MemoryError

    content = storage.pack({}, {"a": np.ones(3)})
    monkeypatch.setattr(storage, "_arrays", full)
    with pytest.raises(MemoryError):
        storage.unpack(content)


def test_a_file_that_may_not_be_written_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write(path, b"old")
    monkeypatch.setattr(os, "access", lambda name, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match=re.escape(str(path))):
        storage.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_error_without_a_number_is_raised_as_it_is(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError("a disk of its own kind")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="a disk of its own kind"):
        storage.write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []
