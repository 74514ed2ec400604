"""Tests of `tfbn.files.atomic`."""

import contextlib
import errno
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

from tfbn.files import atomic


def names(folder):
    """Return the contents of a folder, including hidden files."""
    return sorted(os.listdir(folder))


def mode(path):
    """Return the permissions of a file."""
    return stat.S_IMODE(os.stat(path).st_mode)


@contextlib.contextmanager
def umask(mask):
    """Set the umask within the context."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_write_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["file", "with space", "ünïcødé", "-", "'\"", "new\nline", "." * 3, "x" * 255, b"bytes"]
    for i, name in enumerate(odd):
        for path in (name, os.path.join(os.fsencode(tmp_path), os.fsencode(name))):
            atomic.write(path, b"%d" % i)
            assert atomic.read(path) == b"%d" % i
    assert names(tmp_path) == sorted(map(os.fsdecode, odd))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_new_file_has_the_permissions_of_the_umask(tmp_path, mask):
    with umask(mask):
        atomic.write(tmp_path / "a", b"1")
        (tmp_path / "b").write_bytes(b"1")
        assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~mask


@pytest.mark.parametrize("old", [0o600, 0o644, 0o664, 0o640, 0o777])
def test_file_keeps_its_permissions(tmp_path, old):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    path.chmod(old)
    for mask in (0o022, 0o077):
        with umask(mask):
            atomic.write(path, b"2")
        assert mode(path) == old and path.read_bytes() == b"2"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root gives files away")
def test_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.chown(path, 12345, 54321)
    atomic.write(path, b"2")
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (12345, 54321)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_target_of_a_symbolic_link_is_written(tmp_path, exists, absolute):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real"
    if exists:
        target.write_bytes(b"1")
    (tmp_path / "middle").symlink_to(target if absolute else "elsewhere/real")
    (tmp_path / "link").symlink_to("middle")
    atomic.write(tmp_path / "link", b"2")
    assert target.read_bytes() == b"2" and not target.is_symlink()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert atomic.read(tmp_path / "link") == b"2"
    assert names(tmp_path / "elsewhere") == ["real"]
    assert names(tmp_path) == ["elsewhere", "link", "middle"]


def test_dangling_link_is_an_error_with_the_given_name(tmp_path):
    (tmp_path / "link").symlink_to("no/such/file")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "loop", "no/such/file"):
        with pytest.raises(OSError) as error:
            atomic.write(tmp_path / name, b"1")
        assert error.value.filename == str(tmp_path / name)
    assert names(tmp_path) == ["link", "loop"]


@contextlib.contextmanager
def special(path, kind):
    """Create something that is not a regular file."""
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
def test_other_kinds_of_files_are_refused_and_unchanged(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # The name of a socket has to be short.
    path = tmp_path / "a"

    def look():
        return os.lstat(path).st_ino, os.stat(path).st_ino, os.stat(path).st_mode, names(tmp_path)

    with special(path, kind):
        if linked:
            (tmp_path / "link").symlink_to("a")
            path = tmp_path / "link"
        before = look()
        says = rf"^Expected .* Received: '{path}', {kind}\."
        for f in (atomic.read, lambda p: atomic.write(p, b"1")):
            with pytest.raises(ValueError, match=says):
                f(path)
        assert look() == before


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="only root can be another")
def test_read_only_targets_are_refused(tmp_path):
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
                    atomic.write(path, b"2")
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
def test_errors_change_nothing(tmp_path, monkeypatch, step, error, exists):
    path = tmp_path / "a"
    if exists:
        path.write_bytes(b"1")

    def fail(*args, **options):
        raise error

    if step == "open":
        monkeypatch.setattr(atomic, "open", fail, raising=False)
    else:
        monkeypatch.setattr(os, step, fail)
    if step == "fchmod" and not exists:
        atomic.write(path, b"2")
        return
    with pytest.raises(type(error)) as raised:
        atomic.write(path, b"2")
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert names(tmp_path) == (["a"] if exists else [])
    assert not exists or path.read_bytes() == b"1"


FULL = """
import resource, signal, sys
import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    atomic.write(sys.argv[1], bytes(200_000))
except OSError as error:
    print(error.filename == sys.argv[1])
"""


def run(code, *arguments, **options):
    """Start a process that runs Python code with this module, without TensorFlow."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(atomic.__file__).parent,
        **options,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    with run(FULL, path) as process:
        assert process.communicate()[0] == "True\n"
    assert path.read_bytes() == b"1" and names(tmp_path) == ["a"]


KILLED = """
import os, sys
import atomic
path = sys.argv[1]
i = 0
replace = os.replace
def stopping(*args):
    if i == 3:
        print("half", flush=True)
        sys.stdin.read()
    replace(*args)
os.replace = stopping
while True:
    i += 1
    atomic.write(path, b"%d;" % i * 1_000_000)
    print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_folders_of_killed_processes_are_removed(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    with (
        run(KILLED, path, stdin=subprocess.PIPE) as killed,
        run(KILLED, other, stdin=subprocess.PIPE) as alive,
    ):
        for process in (killed, alive):
            assert [process.stdout.readline() for _ in range(3)][-1] == "half\n"
        before = names(tmp_path)
        assert len(before) == 4 and before[2:] == ["a", "b"]
        atomic.write(tmp_path / "c", b"1")
        assert names(tmp_path) == [*before, "c"]  # Both are at work.
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert names(tmp_path) == [*before, "c"]
        atomic.write(tmp_path / "c", b"2")
        [left] = set(names(tmp_path)) - {"a", "b", "c"}
        assert left in before
        alive.stdin.close()  # Goes on, and finds its file where it was.
        assert alive.stdout.readline() == "saved\n"
        alive.send_signal(signal.SIGKILL)
    assert path.read_bytes()[:2] == b"2;"
    assert path.read_bytes() == b"2;" * 1_000_000


KILLED_AT_LINES = """
import os, shutil, signal, sys, tempfile
import atomic
path = sys.argv[1]
traced = {module.__file__ for module in (atomic, shutil, tempfile)}

def killed_at(line):
    def trace(frame, event, _):
        nonlocal line
        if frame.f_code.co_filename in traced and event == "line":
            line -= 1
            if line < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    child = os.fork()
    if not child:
        sys.settrace(trace)
        atomic.write(path, b"new")
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

atomic.write(path, b"old")
line = 0
while killed_at(line):
    assert atomic.read(path) in (b"old", b"new"), line
    atomic.write(path, b"old")
    assert os.listdir(os.path.dirname(path)) == ["a"], line
    line += 1
print(line)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of a process")
def test_process_killed_at_any_line_leaves_nothing(tmp_path):
    with run(KILLED_AT_LINES, tmp_path / "a") as process:
        assert int(process.communicate()[0]) > 100
    assert process.returncode == 0


def test_folder_removed_before_its_lock_is_created_again(tmp_path, monkeypatch):
    removed = []
    make = tempfile.mkdtemp

    def make_and_lose(*args):
        folder = make(*args)
        if not removed:
            removed.append(folder)
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    atomic.write(tmp_path / "a", b"1")
    assert removed and names(tmp_path) == ["a"] and atomic.read(tmp_path / "a") == b"1"


def test_many_threads_write_one_file(tmp_path):
    path = tmp_path / "a"
    errors = []

    def work(i):
        try:
            for _ in range(20):
                atomic.write(path, b"%d" % i * 10_000)
                content = atomic.read(path)
                assert len(content) == 10_000 and len(set(content)) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["file", "no/such/folder/file", "read-only/file"])
def test_require_writable_detects_unwritable_paths(tmp_path, monkeypatch, name):
    (tmp_path / "read-only").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    atomic.require_writable(tmp_path / "file")
    atomic.require_writable(tmp_path / "new")
    no = (str(tmp_path / "file"), str(tmp_path / "read-only"))
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and path in no))
    with pytest.raises(OSError, match=re.escape(name.split("/")[0])):
        atomic.require_writable(tmp_path / name)
    assert names(tmp_path) == ["file", "read-only"] and names(tmp_path / "read-only") == []


def test_new_file_is_flushed_before_the_rename_and_replaces_nothing(tmp_path, monkeypatch):
    flushed = []
    flush = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(names(tmp_path)), flush(descriptor))
    )
    with atomic.new_file(tmp_path / "a") as partial:
        partial.write_bytes(b"1")
        assert not (tmp_path / "a").exists()
    assert "a" not in flushed[0] and flushed[-1] == names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError), atomic.new_file(tmp_path / "a") as partial:
        partial.write_bytes(b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and names(tmp_path) == ["a"]


def test_read_only_file_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write(path, b"old")
    monkeypatch.setattr(os, "access", lambda name, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match=re.escape(str(path))):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_errors_without_errno_are_raised_unchanged(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError("a disk of its own kind")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="a disk of its own kind"):
        atomic.write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []
