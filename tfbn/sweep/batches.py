"""Batches of model inputs: the digest, the random draws and the signature of each."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import keras
import tensorflow as tf

from tfbn.models.keras_models import Structure
from tfbn.sweep import digests
from tfbn.sweep.arrays import to_tensor


class Batch(NamedTuple):
    """A batch of a model's inputs.

    Attributes:
        index: Its number in the data, from 0.
        inputs: A structure of tensors.
        samples: How many samples it has: the length of the first axis of its first input.
        data: The sum of its samples' digests, see `tfbn.sweep.digests`.
        key: Its own digest. An equal batch of the same sweep has another one.
    """

    index: int  # type: ignore[assignment]  # It hides a method of tuples.
    inputs: Structure
    samples: int
    data: int
    key: int

    @property
    def number(self) -> tf.Tensor:
        """The number from which its random draws follow, an int64 scalar."""
        return tf.constant(self.key - 2**63, tf.int64)

    @property
    def name(self) -> str:
        """The words for it in messages."""
        return f"batch {self.index} (counting from 0)"


class BatchReader(Protocol):
    """The batches that a process sweeps at one level: read once, see `Batches`."""

    static: bool

    def first(self) -> Batch | None: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Batches:
    """The inputs of a model, a batch at a time, in the order in which the data has them.

    Attributes:
        check: Raises `ValueError` for inputs that are a sample and no batch.
        total: The number of batches, or `None` where only counting them would tell.
        repeatable: Whether they can be iterated over again. A generator cannot.
        static: Whether all are of one size, which `fit` would make a part of the model's trace.
        drawn: Whether they come in random order.
        population_size: The number of samples that they are drawn from; 0 if it is unknown.
        source: The numbers of the shard and of its batch that these begin with. They tell equal
            batches of one sweep apart, so that each draws its own random numbers.
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
    ):
        self.drawn = read_from is not None
        self.population_size = population_size
        self._read_from = read_from
        self.source = source
        self._elements = elements
        self.prepare = prepare
        self._steps = steps
        self._begun: tuple[Batch | None, Iterator[Batch]] | None = None
        self.total = total
        self.repeatable = repeatable
        self.static = static

    def first(self) -> Batch | None:
        """The first batch, or `None`; the next iteration begins with it, and reads on."""
        if self._begun is None:
            iterator = self._read()
            self._begun = next(iterator, None), iterator
        return self._begun[0]

    def __iter__(self) -> Iterator[Batch]:
        """Yield each `Batch`.

        Raises:
            ValueError, RuntimeError: See the description of the class.
        """
        if self._begun is None:
            yield from self._read()
            return
        (batch, iterator), self._begun = self._begun, None
        if batch is not None:
            yield batch
        yield from iterator

    def part(self, start: int, stop: int) -> "Batches":
        """The batches from number `start` to `stop`. A stream is read from its beginning."""
        same = {name: getattr(self, name) for name in ("prepare", "repeatable", "static")}
        shard, first = self.source

        def elements() -> Iterator[Structure]:
            if self._read_from is not None:
                return itertools.islice(self._read_from(start), stop - start)
            return itertools.islice(self._elements(), start, stop)

        return Batches(
            elements, stop - start, **same, steps=stop - start, source=(shard, first + start)
        )

    def in_memory(self, limit: int) -> "Batches":
        """The same batches, read once and held in main memory.

        Raises:
            ValueError: If they take more than `limit` bytes.
        """
        inputs, taken = [], 0
        for batch in self:
            inputs.append(batch.inputs)
            taken += nbytes(batch.inputs)
            if taken > limit:
                raise too_large(len(inputs), limit)
        return self.holding(inputs)

    def holding(self, inputs: Sequence[Structure], first: int = 0) -> "Batches":
        """The batches of inputs that were read from these, from number `first` on."""
        shard, before = self.source
        return prepared(inputs, self.static, (shard, before + first))

    def joined(self, limit: int) -> "Batches":
        """The same samples, read once, in batches of up to `limit` bytes where they are dense."""
        inputs = [batch.inputs for batch in self]
        shapes = {
            tuple(leaf.shape[1:] if isinstance(leaf, tf.Tensor) else None for leaf in leaves)
            for leaves in map(keras.tree.flatten, inputs)
        }
        if self.static or len(shapes) != 1 or None in next(iter(shapes)):
            return self.holding(inputs)
        size = max(1, limit // max(nbytes(inputs[0]), 1))
        return self.holding(
            [
                keras.tree.map_structure(
                    lambda *leaves: tf.concat(leaves, 0), *inputs[first : first + size]
                )
                for first in range(0, len(inputs), size)
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
                raise RuntimeError(
                    f"Expected batch {number} (counting from 0) of the data. Received: "
                    f"{type(error).__name__}: {error}. Nothing was changed."
                ) from error
            yield _numbered(number, inputs, seen, self.source)
            number += 1
        if self._steps is not None and number < self._steps:
            raise too_short(self._steps, number)


def nbytes(structure: Structure) -> int:
    """Bytes that a structure of tensors takes."""
    flat = tf.nest.flatten(structure, expand_composites=True)
    return sum(tensor.dtype.size * int(tf.size(tensor)) for tensor in flat)


def _numbered(
    number: int, inputs: Structure, seen: collections.Counter[int], source: tuple[int, int]
) -> Batch:
    of_samples = digests.of_samples(inputs)
    content = digests.of_batch(of_samples)
    key = digests.of_batch(of_samples, seen[content], source)
    seen[content] += 1
    return Batch(number, inputs, batch_size_of(inputs), digests.total(of_samples), key)


def prepared(
    inputs: Sequence[Structure], static: bool = False, source: tuple[int, int] = (0, 0)
) -> Batches:
    """Batches of inputs that are prepared for the model already."""
    return Batches(
        lambda: iter(inputs),
        len(inputs),
        prepare=lambda batch: batch,
        static=static,
        source=source,
    )


def to_tensors(inputs: Structure) -> Structure:
    """A batch as the model gets it from `fit`."""
    return keras.tree.map_structure(to_tensor, inputs)


def batch_size_of(inputs: Structure) -> int:
    """The number of samples in a batch: the length of the first axis of the first input with one.

    A batch need not have the same length everywhere: a graph has nodes and edges.
    """
    for leaf in keras.tree.flatten(inputs):
        if leaf.shape.rank:
            return int(leaf.shape[0] if leaf.shape[0] is not None else leaf.nrows())
    return 1


class NotABatchError(ValueError):
    """A sample where a batch belongs."""


def empty() -> ValueError:
    """The error to raise for data without a batch."""
    return ValueError(
        "Expected data with at least one batch. Received: data that yields nothing. Pass the "
        "training data; a generator that was used up must be made anew."
    )


def too_large(number: int, limit: int) -> ValueError:
    """The error to raise for data that must be held in memory, and is too large for that."""
    return ValueError(
        "Expected data that can be read several times, or that fits in memory. "
        f"Received: a generator whose first {number} batches take more than "
        f"memory_limit={limit} bytes. Pass arrays, a tf.data.Dataset or a PyDataset, "
        "or raise memory_limit."
    )


def too_short(steps: int, seen: int) -> ValueError:
    return ValueError(
        f"Expected steps={steps} batches. Received: data that ends after {seen}. Lower `steps`, "
        "or leave it out to take all there is."
    )
