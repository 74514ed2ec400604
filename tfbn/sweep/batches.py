"""Batches of model inputs, with digests that identify their samples."""

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure
from tfbn.sweep.adapters import to_tensor

# The dense tensors, or their specs, of a structure that may have ragged and sparse ones.
flatten = functools.partial(tf.nest.flatten, expand_composites=True)


class Position(NamedTuple):
    """The position of a batch in the user's data.

    Attributes:
        number: The number of the batch, from 0.
        rows: The numbers of the samples if they were drawn at random, else `None`.
    """

    number: int
    rows: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Name of the batch in messages."""
        if self.rows is None:
            return f"batch {self.number} (counting from 0)"
        more = ", ..." if len(self.rows) > 3 else ""
        return f"a batch of rows {', '.join(map(str, self.rows[:3]))}{more} (counting from 0)"


class Batch(NamedTuple):
    """A batch of a model's inputs.

    Attributes:
        index: Position in the data, from 0.
        inputs: A structure of tensors.
        samples: Number of samples: the length of the first axis of the first input.
        data: Sum of the digests of the samples, see `sample_digests`.
        key: Digest of the batch. Equal batches of one sweep have different keys.
        find: Function that returns the `Position` in the user's data, if that is not `index`.
    """

    index: int  # type: ignore[assignment]  # It hides a method of tuples.
    inputs: Structure
    samples: int
    data: int
    key: int
    find: Callable[[], Position] | None = None

    @property
    def number(self) -> tf.Tensor:
        """Seed of the random draws in the batch, an int64 scalar."""
        return tf.constant(self.key - 2**63, tf.int64)

    @property
    def position(self) -> Position:
        """The position in the user's data."""
        return Position(self.index) if self.find is None else self.find()

    @property
    def name(self) -> str:
        """Name of the batch in messages."""
        return self.position.name


class BatchReader(Protocol):
    """Protocol of the batches that a process sweeps at one level: read once, see `Batches`."""

    static: bool

    def first(self) -> Batch | None: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Batches:
    """The inputs of a model as batches, in the order of the data.

    Attributes:
        prepare: Converts inputs to the inputs of the network; raises `ValueError` for a sample.
        total: Number of batches, or `None` if unknown.
        repeatable: Whether they can be read again. A generator cannot.
        static: Whether all have one size, which `fit` would include in the model's trace.
        drawn: Whether they come in random order.
        population_size: Number of samples that they are drawn from; 0 if unknown.
        source: Number of the shard, and of its batch that these begin with. It makes the keys of
            equal batches differ, so that each draws different random numbers.
        position: Function from the number of a batch, in the order of all, to its `Position`.
    """

    def __init__(
        self,
        elements: Callable[[], Iterator[Structure]],
        total: int | None,
        *,
        prepare: Callable[[Structure], Structure],
        repeatable: bool = True,
        static: bool = False,
        read_from: Callable[[int], Iterator[Structure]] | None = None,
        population_size: int = 0,
        steps: int | None = None,
        source: tuple[int, int] = (0, 0),
        position: Callable[[int], Position] = Position,
    ):
        self.drawn = read_from is not None
        self.population_size = population_size
        self._read_from = read_from
        self.source = source
        self.position = position
        self._elements = elements
        self.prepare = prepare
        self._steps = steps
        self._begun: tuple[Batch | None, Iterator[Batch]] | None = None
        self.total = total
        self.repeatable = repeatable
        self.static = static

    def first(self) -> Batch | None:
        """Return the first batch, or `None`; the next iteration yields it first."""
        if self._begun is None:
            iterator = self._read()
            self._begun = next(iterator, None), iterator
        return self._begun[0]

    def __iter__(self) -> Iterator[Batch]:
        """Yield each `Batch`.

        Raises:
            ValueError: If the data ends before `steps`, or the model does not take it.
            RuntimeError: If the data raises an error, from that error.
        """
        if self._begun is None:
            yield from self._read()
            return
        (batch, iterator), self._begun = self._begun, None
        if batch is not None:
            yield batch
        yield from iterator

    def part(self, start: int, stop: int) -> "Batches":
        """Return the batches from `start` to `stop`. A stream is read from its beginning."""
        names = "prepare", "repeatable", "static", "position"
        same = {name: getattr(self, name) for name in names}
        shard, first = self.source

        def elements() -> Iterator[Structure]:
            if self._read_from is not None:
                return itertools.islice(self._read_from(start), stop - start)
            return itertools.islice(self._elements(), start, stop)

        return Batches(
            elements, stop - start, **same, steps=stop - start, source=(shard, first + start)
        )

    def in_memory(self, limit: int) -> "Batches":
        """Load the batches into main memory.

        Raises:
            ValueError: If they require more than `limit` bytes.
        """
        inputs, taken = [], 0
        for batch in self:
            inputs.append(batch.inputs)
            taken += nbytes(batch.inputs)
            if taken > limit:
                raise too_large(len(inputs), limit)
        return self.holding(inputs)

    def holding(self, inputs: Sequence[Structure], first: int = 0) -> "Batches":
        """Create batches from inputs that were read from these, from number `first` on."""
        shard, before = self.source
        return prepared(inputs, self.static, (shard, before + first), self.position)

    def thinned(self, share: float, limit: int) -> "Batches | None":
        """Load samples drawn at random, in batches of up to `limit` bytes.

        Args:
            share: The share of the samples to load.
            limit: Largest number of bytes in a batch.

        Returns:
            The batches; `None` if these cannot be split into samples and concatenated.
        """
        rng = np.random.default_rng(self.source)
        parts: list[Structure] = []
        shapes = set()
        for batch in self:
            leaves = keras.tree.flatten(batch.inputs)
            dense = all(isinstance(leaf, tf.Tensor) and leaf.shape.rank for leaf in leaves)
            if self.static or not dense or {leaf.shape[0] for leaf in leaves} != {batch.samples}:
                return None
            shapes.add(tuple(leaf.shape[1:] for leaf in leaves))
            if len(shapes) > 1:
                return None
            chosen = np.flatnonzero(rng.random(batch.samples) < share)
            if len(chosen):
                parts.append(_rows(batch.inputs, chosen))
        if not parts:
            return self.holding([])
        whole = keras.tree.map_structure(lambda *leaves: tf.concat(leaves, 0), *parts)
        samples = batch_size_of(whole)
        size = max(1, limit * samples // max(nbytes(whole), 1))
        return self.holding(
            [
                _rows(whole, np.arange(first, min(first + size, samples)))
                for first in range(0, samples, size)
            ]
        )

    def _read(self) -> Iterator[Batch]:
        """Yield each `Batch`.

        Raises:
            ValueError: If the data ends before `steps`, or the model does not take it.
            RuntimeError: If the data raises an error, from that error.
        """
        iterator = self._elements()
        seen: collections.Counter[int] = collections.Counter()
        number = 0
        while number != self._steps:
            try:
                inputs = self.prepare(to_tensors(next(iterator)))
            except StopIteration:
                break
            except NotABatchError:
                raise
            except Exception as error:
                name = self._find(number).name
                raise RuntimeError(
                    f"Expected {name}. Received: {type(error).__name__}: {error}."
                ) from error
            find = functools.partial(self._find, number)
            yield _numbered(number, inputs, seen, self.source)._replace(find=find)
            number += 1
        if self._steps is not None and number < self._steps:
            raise too_short(self._steps, number)

    def _find(self, number: int) -> Position:
        """Return the position of one of these batches in the user's data."""
        return self.position(self.source[1] + number)


def _rows(inputs: Structure, numbers: np.ndarray) -> Structure:
    """Return some samples of a batch of dense tensors."""
    return keras.tree.map_structure(lambda leaf: tf.gather(leaf, numbers), inputs)


def nbytes(structure: Structure) -> int:
    """Return the number of bytes in a structure of tensors."""
    return sum([tensor.dtype.size * int(tf.size(tensor)) for tensor in flatten(structure)])


def _numbered(
    number: int, inputs: Structure, seen: collections.Counter[int], source: tuple[int, int]
) -> Batch:
    digests = sample_digests(inputs)
    content = batch_digest(digests)
    key = batch_digest(digests, seen[content], source)
    seen[content] += 1
    return Batch(number, inputs, batch_size_of(inputs), sum_of_digests(digests), key)


def prepared(
    inputs: Sequence[Structure],
    static: bool = False,
    source: tuple[int, int] = (0, 0),
    position: Callable[[int], Position] = Position,
) -> Batches:
    """Create batches from inputs that are already prepared for the model."""
    return Batches(
        lambda: iter(inputs),
        len(inputs),
        prepare=lambda batch: batch,
        static=static,
        source=source,
        position=position,
    )


def to_tensors(inputs: Structure) -> Structure:
    """Convert a batch to the tensors that `fit` passes to the model."""
    return keras.tree.map_structure(to_tensor, inputs)


def batch_size_of(inputs: Structure) -> int:
    """Return the number of samples in a batch: the length of the first axis of the first input.

    Scalars are skipped. Lengths may differ between inputs: a graph has nodes and edges.
    """
    for leaf in keras.tree.flatten(inputs):
        if leaf.shape.rank:
            return int(leaf.shape[0] if leaf.shape[0] is not None else leaf.nrows())
    return 1


class NotABatchError(ValueError):
    """Raised for a sample where a batch is required."""


def empty() -> ValueError:
    """Create the error for data without a batch."""
    return ValueError(
        "Expected data with at least one batch. Received: data that yields nothing. Recreate "
        "a used-up generator."
    )


def too_large(number: int, limit: int) -> ValueError:
    """Create the error for data that must be stored in memory and exceeds the limit."""
    return ValueError(
        "Expected data that can be read again, or fits in memory. Received: a generator whose "
        f"first {number} batches exceed memory_limit={limit} bytes. Pass arrays or a dataset, "
        "or raise `memory_limit`."
    )


def too_short(steps: int, seen: int) -> ValueError:
    return ValueError(
        f"Expected steps={steps} batches. Received: data that ends after {seen}. Lower `steps`."
    )


def sample_digests(inputs: Structure) -> np.ndarray:
    """Compute a 64-bit digest of every sample of a batch.

    A batch whose inputs differ in the length of the first axis (nodes and edges of a graph) has one
    digest.

    Args:
        inputs: A structure of tensors.

    Returns:
        An array of `uint64`.
    """
    leaves = tf.nest.flatten(inputs)
    sizes = {_samples(leaf) for leaf in leaves}
    if len(sizes) == 1 and None not in sizes:
        columns = [_of_rows(leaf) for leaf in leaves]
    else:
        leaves = flatten(inputs)
        shapes = tf.constant([str(leaf.shape) for leaf in leaves])
        columns = [tf.fingerprint(tf.reshape(leaf, [1, -1])) for leaf in (shapes, *leaves)]
    column = columns[0] if len(columns) == 1 else tf.fingerprint(tf.concat(columns, 1))
    return column.numpy().view(np.uint64)[:, 0]


def _samples(leaf: tf.Tensor) -> int | None:
    """Return the length of a tensor's first axis; `None` for a scalar."""
    if not leaf.shape.rank:
        return None
    if isinstance(leaf, tf.RaggedTensor):
        return int(leaf.nrows())
    return int(leaf.shape[0])


def _of_rows(leaf: tf.Tensor) -> tf.Tensor:
    if isinstance(leaf, tf.RaggedTensor):
        return tf.fingerprint(tf.constant(list(_ragged_rows(leaf)), tf.string))
    if isinstance(leaf, tf.SparseTensor):
        return tf.fingerprint(tf.constant(list(_sparse_rows(leaf)), tf.string))
    return tf.fingerprint(leaf)


def _ragged_rows(leaf: tf.RaggedTensor) -> Iterator[bytes]:
    splits = [level.numpy() for level in leaf.nested_row_splits]
    values = tf.fingerprint(leaf.flat_values).numpy()
    for row in range(int(leaf.nrows())):
        begin, end, lengths = row, row + 1, []
        for level in splits:
            lengths.append(np.diff(level[begin : end + 1]).tobytes())
            begin, end = level[begin], level[end]
        yield b"".join([*lengths, values[begin:end].tobytes()])


def _sparse_rows(leaf: tf.SparseTensor) -> Iterator[bytes]:
    indices, values = leaf.indices.numpy(), tf.fingerprint(leaf.values).numpy()
    order = np.argsort(indices[:, 0], kind="stable")
    indices, values = indices[order], values[order]
    ends = np.searchsorted(indices[:, 0], np.arange(leaf.shape[0] + 1))
    for begin, end in itertools.pairwise(ends):
        yield indices[begin:end, 1:].tobytes() + values[begin:end].tobytes()


def sum_of_digests(digests: np.ndarray) -> int:
    """Compute the sum of digests modulo 2^64, independent of order and batches."""
    return int(digests.sum(dtype=np.uint64))


def batch_digest(digests: np.ndarray, occurrence: int = 0, source: tuple[int, int] = (0, 0)) -> int:
    """Compute a 64-bit digest of a batch from its samples in their order.

    Args:
        digests: Digests of the samples.
        occurrence: Number of earlier batches with the same samples.
        source: See `Batches`.
    """
    content = hashlib.blake2b(digests.tobytes(), digest_size=8)
    content.update(repr((occurrence, *source)).encode())
    return int.from_bytes(content.digest(), "little")


def sequence_digest(before: bytes, key: int) -> bytes:
    """Compute a digest of a batch and all batches before it; `b""` stands for no batches."""
    return hashlib.sha256(before + key.to_bytes(8, "little")).digest()
