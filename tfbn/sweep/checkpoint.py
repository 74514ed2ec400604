"""Store the state of a long sweep in a file, to resume it after a crash."""

import os
import pathlib
import time

import numpy as np

from tfbn.files import atomic, sealed
from tfbn.sweep import state_bytes
from tfbn.sweep.batches import Batches
from tfbn.sweep.state import SweepState

_KIND = "tfbn checkpoint 1"


class Checkpoint:
    """The file of one sweep.

    It stores the state, and a digest of the batches of its level, which detects other data or
    another order when the sweep resumes.

    Args:
        path: File name.
        batches: The `tfbn.sweep.batches.Batches` of the sweep.

    Attributes:
        share: Largest share of the time to spend on saving.
        due: Whether it is time to save.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the folder does not exist, or if the batches cannot be read again in the
            same order.
    """

    share = 0.02

    def __init__(self, path: str | os.PathLike, batches: Batches):
        self._name = str(path)
        self._path = pathlib.Path(path).absolute()  # The working directory may change.
        self._saved = time.monotonic()
        self._cost = 0.0
        if not self._path.parent.is_dir():
            raise ValueError(
                f"Expected `checkpoint` in a folder that exists. Received: {self._name!r}. Create "
                "the folder."
            )
        atomic.require_writable(self._path)
        if not batches.repeatable:
            raise _not_repeatable("a generator, which can be read only once")
        if _first_key(batches) != _first_key(batches):
            raise _not_repeatable("data whose first batch is another every time")

    def read(self, begin: SweepState) -> tuple[SweepState, bytes] | None:
        """Load the last saved state and the digest of its batches; `None` without a file.

        Args:
            begin: The state at the beginning of the sweep to resume.

        Raises:
            ValueError: If the file is damaged, or belongs to another sweep.
        """
        if not self._path.exists():
            return None
        try:
            header, arrays = sealed.unpack(atomic.read(self._path))
            if header.get("kind") != _KIND:
                raise ValueError("it is no checkpoint")
            state = state_bytes.unpack(arrays["state"].tobytes())
            digest = bytes.fromhex(header["digest"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._unfit(f"is damaged or another kind of file ({error})") from error
        for name in ("method", "fingerprint", "paths"):
            ours, theirs = getattr(begin, name), getattr(state, name)
            if ours != theirs:
                raise self._unfit(f"has {name} {theirs!r} and not {ours!r}")
        return state, digest

    @property
    def due(self) -> bool:
        return time.monotonic() - self._saved >= self._cost / self.share

    def save(self, state: SweepState, digest: bytes) -> None:
        """Write the file atomically, for `read`."""
        start = time.monotonic()
        content = np.frombuffer(state_bytes.pack(state), np.uint8)
        header = {"kind": _KIND, "digest": digest.hex()}
        atomic.write(self._path, sealed.pack(header, {"state": content}))
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def remove(self) -> None:
        """Delete the file of a complete sweep."""
        self._path.unlink(missing_ok=True)

    def other_data(self, batches: int) -> ValueError:
        """Create the error for a digest, of that many batches, that differs from the saved one."""
        return self._unfit(
            f"is of other data, or of the same in another order, up to its end after {batches} "
            "batches"
        )

    def _unfit(self, how: str) -> ValueError:
        return ValueError(
            f"Expected the checkpoint of this sweep. Received: {self._name!r}, which {how}. Delete "
            "it."
        )


def _first_key(batches: Batches) -> int | None:
    return next((batch.key for batch in batches), None)


def _not_repeatable(kind: str) -> ValueError:
    return ValueError(
        f"Expected data in the same order every time, for `checkpoint`. Received: {kind}. Pass "
        "arrays, or a dataset without shuffling."
    )
