"""`collect_shards`: one sweep over data in many places, on any engine that has a map."""

import dataclasses
import functools
import uuid
from typing import Any, NamedTuple

import keras

from tfbn.sweep import batches as data
from tfbn.sweep.methods import check_method
from tfbn.sweep.report import Report
from tfbn.sweep.run import check, layers_to_sweep
from tfbn.sweep.shard import ShardSweep
from tfbn.sweep.sources import check_source
from tfbn.sweep.sources import load as load_model
from tfbn.sweep.state import SweepState

# The model of the sweep that this process last worked for, by the sweep's name.
_loaded = {}


def collect_shards(
    model,
    shards,
    *,
    map=map,
    load=None,
    method="exact",
    batch_size=None,
    steps=None,
    include_frozen=False,
    verbose="auto",
):
    """Sweep data that lies in many shards, on the engine that `map` belongs to.

    The same as `tfbn.collect` on all the data: `"exact"` up to rounding whatever the shards, the
    one-pass methods for the same batches. Every level is one call of `map`. A task sweeps one
    shard at one level and returns count, mean and M2 of the layers of that level; a task that the
    engine runs twice counts once. Every process loads the model, and traces it, once a sweep.

    ```python
    with concurrent.futures.ProcessPoolExecutor() as pool:
        stats = tfbn.collect_shards("model.keras", files, map=pool.map, load=np.load)
    ```

    Args:
        model: The path of a `.keras` file that all processes can read, or a function without
            arguments that returns the model, with the same weights in all of them. A model itself
            does where `map` stays in this process.
        shards: A sequence of whatever `load` turns into `x` of `tfbn.collect`: names of files,
            keys, offsets. Without `load`, the data itself. A shard may be empty.
        map: A function that works as the built-in `map` does. It may give results in any order.
        load: Called with a shard, in the process that sweeps it.
        method: See `tfbn.collect`.
        batch_size: See `tfbn.collect`.
        steps: Number of batches of every shard; endless data needs it.
        include_frozen: See `tfbn.collect`.
        verbose: 0 for silence, 1 for a progress bar over shards and levels. `"auto"` is 1.

    Returns:
        `tfbn.PopulationStats`.

    Raises:
        ValueError: As `tfbn.collect`; if processes load other weights; if a shard is other data
            at another level; if the engine loses one.
        RuntimeError: If sweeping a shard fails, with the shard's name and the error's words.
    """
    check_method(method)
    data.check_positive(batch_size=batch_size, steps=steps)
    shards = list(shards)
    source = model if isinstance(model, keras.Model) else check_source(model)
    here = source if isinstance(source, keras.Model) else load_model(source)
    layers = layers_to_sweep(here, include_frozen)
    begin = ShardSweep(here, layers, data.none(), method, include_frozen=include_frozen)
    options = {"method": method, "include_frozen": include_frozen}
    task = _Task(uuid.uuid4().hex, source, load, batch_size, steps, options, begin.begin)
    report = Report(method, verbose, len(shards), unit="shard")
    report.begin()
    state, seen = begin.begin, {}
    while not state.complete:
        report.begin_level(state.level)
        merged = _sweep_level(task._replace(state=state), shards, map, seen, report)
        if merged.whole and not state.whole:
            state, seen = merged.whole_passes(), {}
            continue
        state = merged.next_level()
    report.end()
    return state.finish(here, begin.previous_of(state.paths))


class _Task(NamedTuple):
    """The sweep of one shard at one level, to be sent to another process.

    Attributes:
        sweep: The name of the sweep.
        source: The model, or where to get it.
        load: From a shard to its data.
        batch_size, steps: See `collect_shards`.
        options: Of `ShardSweep`.
        state: The state at the beginning of the level.
    """

    sweep: str
    source: Any
    load: Any
    batch_size: int | None
    steps: int | None
    options: dict
    state: SweepState

    def __call__(self, numbered):
        """The number of a shard, and the bytes of its state after the level."""
        number, shard = numbered
        try:
            state = self._sweep(shard)
        except Exception as error:
            # A string alone: the error itself may not survive the way back.
            raise RuntimeError(
                f"Expected every shard to be swept. Received: from {_named(number, shard)}, "
                f"{type(error).__name__}: {error}"
            ) from None
        return number, dataclasses.replace(state, settled={}).to_bytes()

    def _sweep(self, shard):
        x = shard if self.load is None else self.load(shard)
        if self.sweep not in _loaded:
            _loaded.clear()
            source = self.source
            model = source if isinstance(source, keras.Model) else load_model(source)
            _loaded[self.sweep] = model
        model = _loaded[self.sweep]
        layers, batches = check(
            model, x, self.batch_size, self.steps, self.options["include_frozen"], may_be_empty=True
        )
        # Unnamed layers of a subclassed model have other numbers in every process.
        paths = self.state.paths
        if len(paths) == len(layers):
            layers = dict(zip(paths, layers.values(), strict=True))
        return ShardSweep(model, layers, batches, **self.options).continue_sweep(self.state)


def _sweep_level(task, shards, map, seen, report):
    """The merged state of all shards after one level."""
    swept = {}
    for number, content in map(task, list(enumerate(shards))):
        if number in swept:
            continue
        state = SweepState.from_bytes(content)
        swept[number] = dataclasses.replace(state, settled=task.state.settled)
        data_now = state.samples, state.data
        if not state.whole and seen.setdefault(number, data_now) != data_now:
            raise ValueError(
                f"Expected the same data at every level. Received: {_named(number, shards[number])}"
                f", which had {seen[number][0]} samples at level 1 and now has {data_now[0]}, or "
                "other ones. Give shards that do not change."
            )
        report.batch(max(state.levels.values(), default=0))
    missing = [number for number in range(len(shards)) if number not in swept]
    if missing:
        raise ValueError(
            "Expected a result for every shard. Received: none for "
            f"{_named(missing[0], shards[missing[0]])}. Look at the engine that `map` belongs to."
        )
    # In the order of the shards, so that rounding is the same for any order of results.
    states = [swept[number] for number in range(len(shards)) if swept[number].batches]
    if not states:
        raise data.empty()
    return functools.reduce(SweepState.merge, states)


def _named(number, shard):
    return f"shard {number} ({repr(shard)[:200]})"
