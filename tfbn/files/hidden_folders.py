"""Hidden folders in which something is written before it gets its name.

The name of one tells the process and the host, and it is locked for as long as the process lives,
however that ends. Whoever makes another in the same place removes those that no process owns.
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is cleared there.
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner"


@contextlib.contextmanager
def hidden(parent: str | os.PathLike, kind: str) -> Iterator[pathlib.Path]:
    """A new hidden folder, which goes with the context, or with a later one after a kill.

    Args:
        parent: The folder that it is made in.
        kind: A word in its name. Those of other kinds are left alone.
    """
    parent = pathlib.Path(parent)
    _clear(parent, kind)
    prefix = f".tfbn-{kind}-{os.getpid()}-{socket.gethostname()}-"
    while True:
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=parent, ignore_cleanup_errors=True
        ) as name:
            folder = pathlib.Path(name)
            with _owned(folder) as is_ours:
                if is_ours:
                    yield folder
                    return


@contextlib.contextmanager
def _owned(folder):
    """Hold the lock of a hidden folder; `False` if another process is just clearing it."""
    if fcntl is None:
        yield True
        return
    with open(folder / _OWNER, "w") as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # A file system without locks, where nothing is ever cleared.
            pass
        yield True


def _clear(parent, kind):
    """Remove the hidden folders of this host that no process owns any more.

    The lock tells, not the process's number: a container has numbers of its own, and may have
    the name of its host. The host's name counts because a network's file system may keep
    locks to itself on each host.
    """
    if fcntl is None:
        return
    host = re.escape(socket.gethostname())
    ours = re.compile(rf"\.tfbn-{re.escape(kind)}-\d+-{host}-\w+")
    for folder in parent.glob(f".tfbn-{kind}-*"):
        if not ours.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError), open(folder / _OWNER, "r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
