"""The sweep: population statistics of a frozen network, from a pass over its data."""

import pathlib
import warnings

import keras

from tfbn import data, moments
from tfbn import model as models
from tfbn.network import Network
from tfbn.stats import LayerStats, PopulationStats

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

    Args:
        model: A built Keras model. Its batch norm layers may be tfbn's or Keras's, nested,
            shared, or in wrappers and custom layers.
        x: The training data, as `model.fit` takes it: arrays or tensors (one, a list or a
            dict), `tf.data.Dataset`, `keras.utils.PyDataset`, generator. Targets and
            sample weights are ignored. Masked positions do not count.
        method: See above.
        batch_size: For arrays; 32 by default. One-pass methods want it large.
        steps: Number of batches that make the data; endless data needs it.
        include_frozen: Whether to sweep layers with `trainable=False` too. They run in
            inference mode already and are left alone by default.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line per pass. `"auto"` is 1.
        memory_limit: For `"exact"`: bytes of main memory for the tensors that one level hands
            to the next; a quarter of what is free by default. Those that do not fit are
            computed again.

    Returns:
        `tfbn.PopulationStats`; its `assign(model)` puts the statistics into the model.

    Raises:
        ValueError: If the model is not built, has no batch norm layer to sweep, or cannot
            run on a batch; if the data is empty, endless without `steps`, or shorter than
            `steps`; if what enters a layer is not finite (layer and batch are named); for
            `"algorithm2"`, if a batch has only one value per channel.
        RuntimeError: If the data itself fails, from the error that it raised.
    """
    check_method(method)
    layers, batches = check(model, x, batch_size, steps, include_frozen)
    network = Network(model, layers, method)
    before = PopulationStats.read(model)
    report = _Report(method, verbose)
    if method == "exact":
        limit = _default_memory_limit() if memory_limit is None else memory_limit
        sizes = _exact(network, batches, limit, report)
    else:
        sizes = _one_pass(network, batches, report)
    return PopulationStats(
        {path: _layer_stats(found) for path, found in network.result().items()},
        method=method,
        samples=sum(sizes),
        batches=len(sizes),
        batch_size=max(sizes),
        fingerprint=before.fingerprint,
        previous=PopulationStats({path: before[path] for path in layers}, method="assigned"),
    )


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


def check(model, x, batch_size=None, steps=None, include_frozen=False):
    """The layers that `collect` would sweep, by path, and the batches it would sweep.

    Raises:
        ValueError: All that `collect` would raise before it reads the first batch.
    """
    return _layers_to_sweep(model, include_frozen), data.batches(x, batch_size, steps)


def _layers_to_sweep(model, include_frozen):
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r}. Pass the model itself.")
    layers = models.batch_norm_layers(model)
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


def _one_pass(network, batches, report):
    for index, inputs in report.on(batches):
        network.run(index, inputs, settled=False)
    sizes = batches.sizes
    if network.depth > 1 and len(sizes) > 1 and max(sizes) < _SMALL_BATCH:
        warnings.warn(
            f"A one-pass sweep over batches of {max(sizes)} samples gives deeper layers statistics "
            f"that depend on the batch size. Use batches of at least {_SMALL_BATCH} samples, or "
            "method='exact', which gives the same for any.",
            stacklevel=3,
        )
    return sizes


def _exact(network, batches, memory_limit, report):
    if not batches.repeatable:
        batches = batches.in_memory(memory_limit)
        memory_limit -= sum(map(data.nbytes, batches))
    if network.enter(0, next(iter(batches))) is None:
        return _exact_by_whole_passes(network, batches, report)
    kept = None  # The frontier of every batch, where a level had room to leave it to the next.
    level = 0
    while level < network.depth:
        level += 1
        room = memory_limit - sum(data.nbytes(frontier.values) for frontier in kept or ())
        store = _Store(room if level < network.depth else 0)
        for index, batch in report.on(kept or batches, level, network.depth):
            frontier = batch if kept else network.enter(index, batch)
            store.put(network.advance(index, frontier, level, keep=store.has_room))
        network.settle(level)
        kept = store.frontiers or kept
    return batches.sizes


def _exact_by_whole_passes(network, batches, report):
    # After pass d every call of level d or lower has settled, whatever the others hold. How
    # many levels there are is not known here, but not more than there are calls. The first
    # pass normalises as in training, to give the others something sound to hold.
    number, passes = 0, 1
    while number < passes:
        number += 1
        network.reset()
        for index, inputs in report.on(batches, number, None if number == 1 else passes):
            network.run(index, inputs, settled=number > 1)
        network.settle()
        passes = len(network.sites)
    return batches.sizes


class _Store:
    """The frontiers of all batches, or none of them if there is not room for all."""

    def __init__(self, room):
        self.frontiers = []
        self.has_room = room > 0
        self._room = room

    def put(self, frontier):
        if frontier is not None:
            self._room -= data.nbytes(frontier.values)
            self.frontiers.append(frontier)
        if frontier is None or self._room < 0:
            self.frontiers.clear()
            self.has_room = False


class _Report:
    """Keras's progress bar, once for every pass over the batches."""

    def __init__(self, method, verbose):
        self._method = method
        self._verbose = 1 if verbose == "auto" else int(verbose)

    def on(self, batches, number=1, of=1):
        """Enumerate the batches of pass `number` of `of`, `None` if that is not known."""
        if self._verbose:
            part = "" if of == 1 else f", pass {number} of {of or 'several'}"
            print(f"Population statistics, {self._method}{part}")
        total = len(batches) if isinstance(batches, list) else batches.total
        bar = keras.utils.Progbar(total, verbose=self._verbose, unit_name="batch")
        for index, batch in enumerate(batches):
            yield index, batch
            bar.update(index + 1, finalize=index + 1 == total)
        if total is None:
            bar.update(index + 1, finalize=True)


def _layer_stats(found):
    counts = found.count
    # Only a mask that tells channels apart makes their counts differ.
    count = int(counts[0]) if (counts == counts[0]).all() else counts.astype(int)
    return LayerStats(count, found.mean, moments.variance(found))


def _default_memory_limit():
    """A quarter of the memory that is free, in bytes; 1 GiB where that is not known."""
    info = pathlib.Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 // 4
    return 2**30
