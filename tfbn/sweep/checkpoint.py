"""Where a long sweep has come to, in a file, so that it can go on after a crash."""

import hashlib
import io
import pathlib
import time
import zipfile

import numpy as np
import tensorflow as tf

from tfbn.population import PopulationStats, write_whole

_SHARE = 0.02  # Of the time goes into saving, at most.


class Checkpoint:
    """The file of one sweep.

    It holds the statistics so far and a digest of the batches that they are from, by which
    data that comes in another order is told when the sweep goes on.

    Args:
        path: File name.
        batches: The `tfbn.sweep.batches.Batches` of the sweep.

    Attributes:
        due: Whether it is time to save.

    Raises:
        ValueError: If there is no such folder, or if the batches cannot be read again in the
            same order.
    """

    def __init__(self, path, batches):
        self._path = pathlib.Path(path)
        self._saved = time.monotonic()
        self._cost = 0.0
        if not self._path.parent.is_dir():
            raise ValueError(
                "Expected the name of a file in a folder that exists. Received: "
                f"checkpoint={str(path)!r}. Make the folder first."
            )
        if not batches.repeatable:
            raise _not_repeatable("a generator, which can be read only once")
        if _first(batches) != _first(batches):
            raise _not_repeatable("data whose first batch is another every time")

    def read(self, start):
        """What was saved last.

        Args:
            start: The statistics of no level, for the sweep that is to go on.

        Returns:
            The statistics below the level that was being swept, those of this level, and the
            digest of its batches. `None` if there is no file.

        Raises:
            ValueError: If the file is damaged, or is of another sweep.
        """
        if not self._path.exists():
            return None
        try:
            with zipfile.ZipFile(self._path) as archive:
                below, part = (
                    PopulationStats.from_bytes(archive.read(name)) for name in ("below", "part")
                )
                digest = archive.read("digest")
        except Exception as error:  # What a damaged archive raises is not documented.
            raise self._unfit(f"is damaged or another kind of file ({error})") from error
        for name in ("method", "fingerprint"):
            if getattr(part, name) != getattr(start, name):
                raise self._unfit(
                    f"has {name} {getattr(part, name)!r} and not {getattr(start, name)!r}"
                )
        if list(below.previous) != list(start.previous):
            raise self._unfit("is of other layers")
        return below, part, digest

    @property
    def due(self):
        return time.monotonic() - self._saved >= self._cost / _SHARE

    def save(self, below, part, digest):
        """Write the file, whole or not at all, for `read`."""
        start = time.monotonic()
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("below", below.to_bytes())
            archive.writestr("part", part.replace(previous=None).to_bytes())
            archive.writestr("digest", digest)
        write_whole(self._path, content.getvalue())
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def remove(self):
        """Delete the file of a sweep that is done."""
        self._path.unlink(missing_ok=True)

    def other_data(self, batches):
        """The error to raise where the digest of that many batches is not the one saved."""
        return self._unfit(
            f"is of other data, or of the same in another order, up to its end after {batches} "
            "batches"
        )

    def _unfit(self, how):
        return ValueError(
            f"Expected the checkpoint of this sweep. Received: {str(self._path)!r}, which {how}. "
            "Delete it to begin anew."
        )


def digest(before, inputs):
    """SHA-256 of a batch and, by their own digest, of all before it; `b""` is that of none."""
    found = hashlib.sha256(before)
    for tensor in tf.nest.flatten(inputs, expand_composites=True):
        found.update(f"{tensor.dtype.name}{tensor.shape};".encode())
        value = tensor.numpy()
        if value.dtype == object:  # Strings.
            found.update(repr(value.tolist()).encode())
        else:
            found.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return found.digest()


def _first(batches):
    return next((digest(b"", inputs) for inputs in batches), b"")


def _not_repeatable(kind):
    return ValueError(
        "Expected data whose batches come in the same order every time, for a sweep with a "
        f"checkpoint. Received: {kind}. Pass arrays, a PyDataset or a tf.data.Dataset that does "
        "not shuffle, or leave out `checkpoint`."
    )
