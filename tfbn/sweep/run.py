"""The sweep: population statistics of a frozen network, from its data."""

import collections
import concurrent.futures
import contextlib
import functools
import pathlib
import warnings
from typing import NamedTuple

import keras

from tfbn import keras_models
from tfbn.population import PopulationStats, latest
from tfbn.sweep import batches as data
from tfbn.sweep import devices as distribute
from tfbn.sweep import parts
from tfbn.sweep.checkpoint import Checkpoint, digest
from tfbn.sweep.network import Frontier, Network

METHODS = ("pooled", "algorithm2", "exact")

# Fewer samples a batch than this, and one-pass statistics depend visibly on how many: the
# README has the figures.
_SMALL_BATCH = 16


def collect(
    model,
    x,
    method="pooled",
    batch_size=None,
    steps=None,
    include_frozen=False,
    verbose="auto",
    memory_limit=None,
    checkpoint=None,
):
    """Sweep data through a model and return its population statistics.

    The network is run in inference mode (dropout, noise and augmentation inactive), with
    only its batch norm layers observed. With m_b the count, mu_b the mean and sigma2_b the
    biased variance per channel of the values that enter a layer in batch b:

    - `"pooled"`: mean = sum(m_b mu_b) / N and variance = sum(m_b (sigma2_b +
      (mu_b - mean)^2)) / N with N = sum(m_b): those of all values together. One pass;
      layers below normalise with the batch's own statistics, as in training.
    - `"algorithm2"`: mean = E[mu_b] and variance = E[m_b / (m_b - 1) sigma2_b], batches
      weighted by their count: Algorithm 2, step 10, of Ioffe & Szegedy 2015
      (https://arxiv.org/abs/1502.03167). One pass, like `"pooled"`.
    - `"exact"`: as `"pooled"`, but every layer is observed while all layers below it
      normalise with their population statistics. Equal to one pass in training mode over
      the whole data as a single batch ("B = N" of Wu & Johnson 2021, Table 2,
      https://arxiv.org/abs/2105.07576), whatever the batch size and order of the sweep.
      One pass over a part of the network for every level of batch norm layers; with room
      for `memory_limit` bytes these add up to about one pass in all.

    Nothing is changed: no weight, no other state of the model, no random seed.

    A model built under `tf.distribute.MirroredStrategy` is swept on all of its devices, which
    take the batches in turn. One built under `tf.distribute.MultiWorkerMirroredStrategy` is swept
    by all workers together: each calls `collect` with the data that it is to sweep, its shard,
    which may be empty, and all get the statistics of all the data. What they exchange is three
    numbers per channel.

    Args:
        model: A built Keras model. Its batch norm layers may be tfbn's or Keras's, nested,
            shared, or in wrappers and custom layers.
        x: The training data, as `model.fit` takes it: arrays or tensors (one, a list or a
            dict), `tf.data.Dataset`, `keras.utils.PyDataset`, generator, or the
            `tf.distribute.DistributedDataset` of a strategy. Targets and sample weights are
            ignored. Masked positions do not count.
        method: See above.
        batch_size: For arrays; 32 by default. One-pass methods want it large.
        steps: Number of batches that make the data; endless data needs it.
        include_frozen: Whether to sweep layers with `trainable=False` too. They run in
            inference mode already and are left alone by default.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line per pass. `"auto"` is 1.
        memory_limit: For `"exact"`: bytes of main memory for the tensors that one level hands
            to the next; a quarter of what is free by default. Those that do not fit are
            computed again.
        checkpoint: Name of a file in which a long sweep saves what it has found, so often that
            it takes 2 % of the time. After a crash the same call goes on where that file ends, to
            the same result; a sweep that is done deletes the file. The data must come in the
            same order every time, which is checked. With several workers, each adds its number
            to the name.

    Returns:
        `tfbn.PopulationStats`; its `assign(model)` puts the statistics into the model.

    Raises:
        ValueError: If the model is not built, has no batch norm layer to sweep, or cannot
            run on a batch; if the data is empty, endless without `steps`, or shorter than
            `steps`; if what enters a layer is not finite (layer and batch are named); for
            `"algorithm2"`, if a batch has only one value per channel; if the data cannot be
            resumed, or the checkpoint is of another sweep.
        RuntimeError: If the data itself fails, from the error that it raised; on all workers,
            if one of them fails.
    """
    check_method(method)
    workers = distribute.Workers(model)

    @functools.cache  # Made in the first `gather`, so that all workers learn if one cannot.
    def sweep():
        several = len(workers) > 1
        layers, batches = check(model, x, batch_size, steps, include_frozen, several)
        limit = _default_memory_limit() if memory_limit is None else memory_limit
        report = _Report(method, verbose if workers.index == 0 else 0)
        path = checkpoint if checkpoint is None or not several else f"{checkpoint}.{workers.index}"
        return _Sweep(model, layers, batches, method, limit, report, path)

    # After a crash a worker may be a level ahead: what is below it is the same for all.
    stats = max(workers.gather(lambda: sweep().below), key=lambda below: below.level)
    stats = stats.replace(previous=sweep().below.previous)
    below = stats
    while not stats.complete:
        below = stats
        found = workers.gather(lambda below=below: sweep().part(below))
        stats = parts.above(below, functools.reduce(PopulationStats.merge, found))
    parts.check_settled(below, stats)
    stats = parts.finish(stats, model, sweep().below.previous)
    sweep().forget()
    one_pass, small = method != "exact", stats.batch_size < _SMALL_BATCH
    if one_pass and small and stats.batches > 1 and sweep().deep:
        warnings.warn(
            f"A one-pass sweep over batches of {stats.batch_size} samples gives deeper layers "
            f"statistics that depend on the batch size. Use batches of at least {_SMALL_BATCH} "
            "samples, or method='exact', which gives the same for any.",
            stacklevel=2,
        )
    return stats


def collect_level(
    model, x, below=None, batch_size=None, steps=None, include_frozen=False, verbose="auto"
):
    """One level of an `"exact"` sweep, over one part of the data.

    For data that lies in several places. Each sweeps the first level over its part, what they
    find is merged, in any order, and given to all of them for the next level:

    ```python
    stats = None
    while stats is None or not stats.complete:
        parts = [tfbn.collect_level(model, shard, stats) for shard in shards]  # anywhere
        stats = functools.reduce(tfbn.PopulationStats.merge, parts)
    stats.assign(model)
    ```

    Parts, and what they are merged to, can be saved, sent and loaded as any `PopulationStats`;
    nothing else need be kept from one level to the next. Methods that take one pass need none
    of this: merge what `collect` gives for every part.

    Args:
        model: See `collect`. With the same weights everywhere.
        x: One part of the data, see `collect`.
        below: What the parts of the level before have been merged to; `None` for the first.
        batch_size: See `collect`.
        steps: See `collect`.
        include_frozen: See `collect`.
        verbose: See `collect`.

    Returns:
        `PopulationStats` of this part at the next level, on top of those in `below`.
        `complete` says whether it was the last.

    Raises:
        ValueError: As `collect`; if `below` is of other weights, is complete, or is nothing
            that this function gave.
        RuntimeError: As `collect`.
    """
    layers, batches = check(model, x, batch_size, steps, include_frozen)
    sweep = _Sweep(model, layers, batches, "exact", 0, _Report("exact", verbose))
    if below is None:
        below = sweep.below
    elif below.calls is None or below.complete:
        raise ValueError(
            "Expected `below` to be from tfbn.collect_level, with levels left to sweep. "
            f"Received: below={below!r}. Begin with below=None."
        )
    elif below.fingerprint != sweep.below.fingerprint:
        raise ValueError(
            "Expected a model with the weights that the levels below were swept with. Received: "
            f"fingerprints {sweep.below.fingerprint[:12]} and {below.fingerprint[:12]}. Use the "
            "same weights for all levels."
        )
    return parts.above(below, sweep.part(below))


def update_population_stats(model, x, **options):
    """Sweep data through a model and set its inference statistics: `collect`, then `assign`.

    For models that are trained already, with tfbn's layer or Keras's.

    Args:
        model: See `collect`.
        x: See `collect`.
        **options: The other arguments of `collect`.

    Returns:
        The new statistics; `stats.previous.assign(model)` puts back what was there.
    """
    stats = collect(model, x, **options)
    stats.assign(model)
    return stats


def check_method(method):
    """Raise `ValueError` unless `method` is one that `collect` knows."""
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {METHODS}. Received: method={method!r}.")


def check(model, x, batch_size=None, steps=None, include_frozen=False, may_be_empty=False):
    """The layers that `collect` would sweep, by path, and the batches it would sweep.

    Raises:
        ValueError: All that `collect` would raise before it reads the first batch.
    """
    layers = layers_to_sweep(model, include_frozen)
    return layers, data.batches(x, batch_size, steps, may_be_empty)


def layers_to_sweep(model, include_frozen):
    """The layers that `collect` would sweep, by path.

    Raises:
        ValueError: If the model is none, is not built, or has no such layers.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r}. Pass the model itself.")
    layers = keras_models.batch_norm_layers(model)
    if not layers and model.built:
        raise ValueError(
            f"Expected a model with BatchNormalization layers. Received: model {model.name!r}, "
            "which has none. There is nothing to sweep."
        )
    if not model.built or not all(layer.built for layer in layers.values()):
        raise ValueError(
            f"Expected a built model. Received: model {model.name!r}, which has no weights yet. "
            "Call it on a batch, or fit or load it, before the sweep."
        )
    wanted = {path: layer for path, layer in layers.items() if include_frozen or layer.trainable}
    if not wanted:
        raise ValueError(
            "Expected a model with BatchNormalization layers that are not frozen. Received: model "
            f"{model.name!r}, all of whose {len(layers)} have trainable=False. Unfreeze them (the "
            "callback that froze them has `unfreeze()`), or pass include_frozen=True."
        )
    return wanted


class _Item(NamedTuple):
    """A batch on its way.

    Attributes:
        index: Its number in the data.
        samples: Its size.
        frontier: How far it has come; before any network has it, the raw batch.
        digest: The digest of the data up to it.
    """

    index: int
    samples: int
    frontier: Frontier
    digest: bytes


class _Sweep:
    """What one worker does in a sweep: its part of every level, over its data.

    Attributes:
        below: The statistics to begin above: those of no level, or of the levels that were
            done when the checkpoint was saved.
    """

    def __init__(self, model, layers, batches, method, memory_limit, report, checkpoint=None):
        self._report = report
        self._networks = [
            Network(model, layers, method, device) for device in distribute.devices(model)
        ]
        self.below = parts.start(model, layers, method)
        self._checkpoint = self._saved = None
        if checkpoint is not None:
            self._checkpoint = Checkpoint(checkpoint, batches)
            self._saved = self._checkpoint.read(self.below)
        if self._saved is not None:
            below, _, _ = self._saved
            self.below = below.replace(previous=self.below.previous)
        if method == "exact" and not batches.repeatable:
            batches = batches.in_memory(memory_limit)
            memory_limit -= sum(map(data.nbytes, batches))
        self._batches = batches
        self._kept = _Kept(memory_limit)

    @property
    def deep(self):
        """Whether a batch norm layer comes after another, as far as the batches told."""
        return any(network.depth > 1 for network in self._networks)

    def part(self, below):
        """This worker's part of the level above `below`, without what is below."""
        part = below.replace(calls={}, level=below.level + 1, samples=0, batches=0, batch_size=0)
        reached = part, None  # As one, because Ctrl-C may come at any point.
        if self._saved is not None and self._saved[1].level == part.level:
            reached = self._saved[1:]
        self._kept.begin_level()
        try:
            for item, found in _in_turn(self._jobs(below, *reached), len(self._networks)):
                self._kept.put(item)
                levels = max(network.levels for network in self._networks)
                reached = parts.add(reached[0], item.samples, found, levels), item.digest
                if self._checkpoint is not None and self._checkpoint.due:
                    self._checkpoint.save(below, *reached)
        except BaseException:
            if self._checkpoint is not None and reached[1] is not None:
                with contextlib.suppress(OSError):  # That it ended is what there is to say.
                    self._checkpoint.save(below, *reached)
            raise
        part, _ = reached
        self._kept.of_all = len(self._kept) == part.batches
        return part

    def forget(self):
        """Delete the checkpoint, of a sweep that is done."""
        if self._checkpoint is not None:
            self._checkpoint.remove()

    def _jobs(self, below, part, expected):
        """What is to be done for a level: a function for every batch, on each device in turn."""
        level, settled = part.level, latest(below.calls)
        devices = [(network, network.settle(settled)) for network in self._networks]
        items = self._kept if self._kept.of_all else self._items(part, expected)
        for item in self._report.on(items, self._batches.total, level, self._networks[0]):
            network, populations = devices[item.index % len(devices)]
            name = f"batch {item.index} (counting from 0)"
            if not isinstance(item.frontier, Frontier):
                item = item._replace(frontier=network.enter(name, item.frontier, level))
            keep = level < network.levels and self._kept.may_take(item)
            yield functools.partial(_advance, network, name, item, level, populations, keep)

    def _items(self, part, expected):
        """The batches that the part does not have yet, as far as they have come."""
        found, index = b"", -1
        for index, inputs in enumerate(self._batches):
            if self._checkpoint is not None:
                found = digest(found, inputs)
                if index + 1 == part.batches and found != expected:
                    raise self._checkpoint.other_data(part.batches)
            if index >= part.batches:
                raw = _Item(index, data.samples(inputs), inputs, found)
                yield self._kept.get(index, raw)
        if index + 1 < part.batches:
            raise self._checkpoint.other_data(part.batches)


def _advance(network, name, item, level, populations, keep):
    found, frontier = network.advance(name, item.frontier, level, populations, keep=keep)
    return item._replace(frontier=frontier), found


def _in_turn(jobs, at_a_time):
    """The results of some functions in their order, with several of them running at a time."""
    if at_a_time == 1:
        for job in jobs:
            yield job()
        return
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        running = collections.deque()
        for job in jobs:
            if len(running) == at_a_time:
                yield running.popleft().result()
            running.append(pool.submit(job))
        while running:
            yield running.popleft().result()


class _Kept:
    """How far batches have come, for as many of them as there is room for."""

    def __init__(self, room):
        self._room = room
        self._items = {}
        self.of_all = False

    def __len__(self):
        return len(self._items)

    def __iter__(self):
        # Each by itself, so that it can go when another has come in its place.
        return (self._items[index] for index in sorted(self._items))

    def get(self, index, default):
        return self._items.get(index, default)

    def begin_level(self):
        """From here on, what lies at the frontier takes another size."""
        self._least = 1

    def may_take(self, item):
        """Whether to find out how much room an item takes that has come further."""
        return item.index in self._items or self._room >= self._least

    def put(self, item):
        """Take an item in the place of what is there of its batch, if there is room for it."""
        if item.frontier is None:
            return
        held = self._items.get(item.index)
        more = _nbytes(item) - (_nbytes(held) if held else 0)
        if more <= self._room:
            self._items[item.index] = item
            self._room -= more
        else:
            self._least = more


def _nbytes(item):
    return data.nbytes(item.frontier.values)


class _Report:
    """Keras's progress bar, once for every level."""

    def __init__(self, method, verbose):
        self._method = method
        self._verbose = 1 if verbose == "auto" else int(verbose)

    def on(self, items, total, level, network):
        """Pass items on, and say how many of `total` (`None` if unknown) are done."""
        bar = item = None
        for item in items:
            yield item
            if bar is None:  # How many levels there are is known after the first batch.
                if self._verbose:
                    passes = "" if network.levels == 1 else f", pass {level} of {network.levels}"
                    print(f"Population statistics, {self._method}{passes}")
                bar = keras.utils.Progbar(total, verbose=self._verbose, unit_name="batch")
            bar.update(item.index + 1, finalize=item.index + 1 == total)
        if bar is not None and total is None:
            bar.update(item.index + 1, finalize=True)


def _default_memory_limit():
    """A quarter of the memory that is free, in bytes; 1 GiB where that is not known."""
    info = pathlib.Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 // 4
    return 2**30
