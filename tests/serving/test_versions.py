"""Tests of version numbers and atomic versions."""

import concurrent.futures
import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
import tensorflow as tf
from exported_models import dense_model, everything_under

from tfbn import export
from tfbn.serving import versions

fcntl = pytest.importorskip("fcntl")


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    model = dense_model()
    assert export(model, tmp_path / "m").path == tmp_path / "m" / "1"
    assert export(model, str(tmp_path / "m")).version == 2
    assert export(model, tmp_path / "m", version=9).version == 9
    # A server parses `012` as version 12, and ignores `notes` and `-1`.
    for name in ("012", "notes", "-1", "1.5"):
        (tmp_path / "m" / name).mkdir()
    assert export(model, tmp_path / "m").version == 13
    before = everything_under(tmp_path)
    for taken in (9, 12):
        with pytest.raises(FileExistsError, match=f"^Version {taken} of"):
            export(model, tmp_path / "m", version=taken)
    assert everything_under(tmp_path) == before


@pytest.mark.parametrize("version", [-1, 1.0, "1", True])
def test_a_version_is_a_whole_number(tmp_path, version):
    with pytest.raises(ValueError, match="an integer version"):
        export(dense_model(), tmp_path / "m", version=version)
    assert everything_under(tmp_path) == []


def test_a_server_of_another_user_may_read_it(tmp_path):
    (tmp_path / "plain").mkdir()
    version = export(dense_model(), tmp_path / "m").path
    assert os.stat(version).st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_poll_never_sees_a_part(tmp_path, monkeypatch):
    seen = []
    load = tf.saved_model.load

    def polled(*args, **kwargs):
        seen.append([name for name in os.listdir(tmp_path) if name.isdigit()])
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", polled)
    export(dense_model(), tmp_path)
    assert seen == [[]]
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("saving", KeyboardInterrupt()),
        ("saved", OSError("no space left")),
        ("verifying", KeyboardInterrupt()),
        ("renaming", OSError("no space left")),
    ],
)
def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch, when, error):
    model = dense_model()
    export(model, tmp_path / "once")  # After this, all modules of TensorFlow are imported.
    shutil.rmtree(tmp_path / "once")

    def fail(*args, **kwargs):
        if when == "saved":
            save(*args, **kwargs)
        raise error

    save = tf.saved_model.save
    module, name = {
        "saving": (tf.saved_model, "save"),
        "saved": (tf.saved_model, "save"),
        "verifying": (tf.saved_model, "load"),
        "renaming": (os, "rename"),
    }[when]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error), match=str(error)):
        export(model, tmp_path / "new" / "m")
    assert everything_under(tmp_path) == []
    monkeypatch.undo()
    (tmp_path / "old" / "1").mkdir(parents=True)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error)):
        export(model, tmp_path / "old")
    assert everything_under(tmp_path) == ["old", "old/1"]


def test_of_two_exporters_of_a_version_one_is_told(tmp_path, monkeypatch):
    load = tf.saved_model.load

    def other_exporter(*args, **kwargs):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "saved_model.pb").write_text("the other's")
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", other_exporter)
    with pytest.raises(FileExistsError):
        export(dense_model(), tmp_path, version=1)
    assert everything_under(tmp_path) == ["1", "1/saved_model.pb"]
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "the other's"


def test_an_exporter_without_a_version_takes_the_next_number(tmp_path, monkeypatch):
    load = tf.saved_model.load

    def other_exporter(*args, **kwargs):
        for number in ("1", "2"):
            (tmp_path / number).mkdir()
            (tmp_path / number / "saved_model.pb").write_text("the other's")
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", other_exporter)
    exported = export(dense_model(), tmp_path)
    assert exported.version == 3
    assert exported.path == tmp_path / "3"
    assert tf.saved_model.contains_saved_model(exported.path)


def test_of_many_exporters_at_once_each_gets_a_number(tmp_path, monkeypatch):
    count = 12
    barrier = threading.Barrier(count)
    rename = os.rename

    def together(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(5)  # All processes have chosen the same number.
        rename(*args)

    monkeypatch.setattr(os, "rename", together)

    def put(i):
        written = tmp_path / f".written-{i}"
        written.mkdir()
        (written / "content").write_text(str(i))
        number = versions.put_in_place(written, tmp_path, None)
        barrier.abort()  # After all attempts, no process waits.
        return number, i

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        numbers = dict(pool.map(put, range(count)))
    assert sorted(numbers) == list(range(1, count + 1))
    for number, i in numbers.items():
        assert (tmp_path / str(number) / "content").read_text() == str(i)
    assert not list(tmp_path.glob(".*"))


def test_numbers_that_no_server_can_read(tmp_path):
    with pytest.raises(ValueError, match=r"2\*\*63 - 1.*Received: 9223372036854775808"):
        export(dense_model(), tmp_path / "m", version=2**63)
    assert everything_under(tmp_path) == []
    # A server ignores it, so it does not count.
    (tmp_path / "m" / str(2**63)).mkdir(parents=True)
    (tmp_path / "m" / ("9" * 5000)[:200]).mkdir()
    assert versions.checked(tmp_path / "m", None) is None
    assert versions.numbered(tmp_path / "m") == {}
    (tmp_path / "m" / f"0{2**63 - 1}").mkdir()
    with pytest.raises(ValueError, match="is the highest possible"):
        export(dense_model(), tmp_path / "m")
    assert export(dense_model(), tmp_path / "m", version=5).version == 5


def test_everything_is_on_the_disk_before_a_version_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def flush(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def place(source, target):
        events.append(("rename", os.fspath(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", place)
    version = export(dense_model(), tmp_path / "new" / "m").path
    [(at, source)] = [(i, e[1]) for i, e in enumerate(events) if isinstance(e, tuple)]
    contents = [version, *version.rglob("*")]
    flushed = {source + event[len(source) :] for event in events[:at]}
    assert {source + str(p)[len(str(version)) :] for p in contents} <= flushed
    # The new name is flushed in its directory, and the created directories in their parents.
    after = events[at + 1 :]
    assert {str(tmp_path / "new" / "m"), str(tmp_path / "new"), str(tmp_path)} <= set(after)


WRITE_FOR_EVER = """
import pathlib, sys, time
from tfbn.serving import versions
with versions.unfinished(pathlib.Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "saved_model.pb").write_text("half of it")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Run a process that writes a version and does not end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_an_export_clears_what_a_killed_one_left(tmp_path, writer):
    [left] = tmp_path.iterdir()
    assert left.name.startswith(f".tfbn-export-{writer.pid}-{socket.gethostname()}-")
    with versions.unfinished(tmp_path):
        assert (left / "version" / "saved_model.pb").exists()  # The process is alive.
    assert list(tmp_path.iterdir()) == [left]
    os.kill(writer.pid, signal.SIGSTOP)  # A suspended process is alive.
    with versions.unfinished(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [left]
    writer.kill()
    writer.wait()
    export(dense_model(), tmp_path)
    assert os.listdir(tmp_path) == ["1"]


def test_only_hidden_directories_of_exports_of_this_host_are_cleared(tmp_path):
    host = socket.gethostname()
    kept = [
        ".tfbn-export-1-elsewhere-abcdefgh",
        f".tfbn-export-1-x{host}-abcdefgh",
        f".tfbn-export-{host}-abcdefgh",
        f".tfbn-model-1-{host}-abcdefgh",
        ".git",
        "notes",
    ]
    for name in (*kept, f".tfbn-export-1-{host}-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text("")
    with versions.unfinished(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_two_exports_of_one_process_leave_each_other_alone(tmp_path):
    with versions.unfinished(tmp_path) as first:
        first.mkdir()
        with versions.unfinished(tmp_path) as second:
            second.mkdir()
            assert first.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_being_cleared_is_nobodys(tmp_path, monkeypatch):
    make = tempfile.TemporaryDirectory
    locks = []

    def made_and_locked(*args, **kwargs):
        directory = make(*args, **kwargs)
        if not locks:
            locks.append(open(os.path.join(directory.name, "owner"), "w"))  # noqa: SIM115
            fcntl.flock(locks[0], fcntl.LOCK_EX)
        return directory

    monkeypatch.setattr(tempfile, "TemporaryDirectory", made_and_locked)
    with versions.unfinished(tmp_path):
        assert not os.path.exists(locks[0].name)
        assert len(os.listdir(tmp_path)) == 1
    locks[0].close()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_served_and_not_cleared(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / f".tfbn-export-1-{socket.gethostname()}-abcdefgh"
    left.mkdir()
    (left / "owner").write_text("")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with versions.unfinished(tmp_path) as partial:
        partial.mkdir()
    assert list(tmp_path.iterdir()) == [left]


def test_object_stores_are_refused():
    with pytest.raises(ValueError, match="local directory"):
        export(dense_model(), "gs://bucket/model")


@pytest.mark.parametrize("path", ["dbfs:/models/digits", "models:/digits/1", "s3://b/m"])
def test_schemes_of_stores_are_refused(path):
    with pytest.raises(ValueError, match="Export locally"):
        versions.target(path)


@pytest.mark.parametrize("prefix", ["", "file:", "file://", "file://localhost", "FILE://"])
def test_a_file_url_is_a_local_path(tmp_path, prefix):
    path = f"{prefix}{tmp_path}/a b".replace(" ", "%20" if prefix else " ")
    assert versions.local(path) == tmp_path / "a b"


def test_a_file_url_of_another_host_is_refused():
    with pytest.raises(ValueError, match=r"file:///path.*host 'models'"):
        versions.local("file://models/digits")


def saved_model(folder):
    """Create a folder that a server loads as a SavedModel."""
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"")
    return folder


@pytest.mark.parametrize("path", ["m/1", "m/1/assets", "m/1/x/y", "m/2", "link", "link/x"])
def test_a_path_of_a_version_or_in_one_is_refused_with_the_right_one(tmp_path, path):
    saved_model(tmp_path / "m" / "1")
    (tmp_path / "link").symlink_to(tmp_path / "m" / "1")
    before = everything_under(tmp_path)
    with pytest.raises(ValueError, match="Expected a model's directory") as refused:
        export(dense_model(), tmp_path / path)
    assert everything_under(tmp_path) == before
    advice = re.search(r"Give '(.*)'", str(refused.value))
    if path.startswith("m"):
        assert advice[1] == str(tmp_path / "m")
        assert versions.target(advice[1]) == tmp_path / "m"


@pytest.mark.parametrize("read", [versions.target, versions.existing])
def test_the_command_makes_a_saved_model_a_version(tmp_path, read):
    folder = saved_model(tmp_path / "my resnet")
    with pytest.raises(ValueError, match="a version: mkdir ") as refused:
        read(folder)
    command = str(refused.value).partition("a version: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert everything_under(tmp_path / "my resnet") == ["1", "1/saved_model.pb"]
    assert os.listdir(tmp_path) == ["my resnet"]
    assert versions.existing(folder) == folder / "1"
    assert versions.target(folder) == folder


def test_every_way_to_a_version(tmp_path, monkeypatch):
    version = saved_model(tmp_path / "m" / "1")
    (tmp_path / "m" / "current").symlink_to("1")
    (tmp_path / "newest").symlink_to("m/current")
    monkeypatch.chdir(version)
    for path in (".", "../1", "..", "../current", tmp_path / "newest", tmp_path / "m"):
        assert versions.existing(path) == version, path
    store = saved_model(tmp_path / "store")
    (tmp_path / "m" / "2").symlink_to(store)
    (tmp_path / "m" / "stable").symlink_to("2")
    for path in (tmp_path / "m", tmp_path / "m" / "2", tmp_path / "m" / "stable"):
        assert versions.existing(path) == tmp_path / "m" / "2"


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_that_cannot_be_written_to_is_refused_first(tmp_path, monkeypatch, made):
    directory = tmp_path / "m"
    directory.mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: not (mode & os.W_OK and p == directory) and access(p, mode)
    )
    with pytest.raises(PermissionError, match=str(directory)):
        export(None, directory if made else directory / "new" / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        export(None, tmp_path / "file" / "m")
