"""`collect_shards`: one sweep over data in many places, on any engine that has a map."""

import dataclasses
from typing import Any

from tfbn.sweep import batches as data
from tfbn.sweep.methods import check_method
from tfbn.sweep.replicas import Recipe, forget, replica, source_of
from tfbn.sweep.report import Report
from tfbn.sweep.state import SweepState, merged


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
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
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
    recipe = Recipe(source_of(model), method, include_frozen)
    try:
        return _collect(recipe, shards, map, load, batch_size, steps, verbose)
    finally:
        forget(recipe)


def _collect(recipe, shards, map, load, batch_size, steps, verbose):
    here = replica(recipe)
    state, seen = here.begin, {}
    recipe = dataclasses.replace(recipe, paths=state.paths)
    report = Report(recipe.method, verbose, len(shards), unit="shard")
    report.begin()
    while not state.complete:
        report.begin_level(state.level)
        task = _Task(recipe, state, load, batch_size, steps)
        after = _sweep_level(task, shards, map, seen, report)
        if after.whole and not state.whole:
            state, seen = after.whole_passes(), {}
            continue
        state = after.next_level()
    report.end()
    return here.finish(state)


@dataclasses.dataclass(frozen=True)
class _Task:
    """The sweep of one shard at one level, to be sent to another process.

    Attributes:
        recipe: The `Recipe` of the sweep.
        state: The state at the beginning of the level.
        load: From a shard to its data.
        batch_size, steps: See `collect_shards`.
    """

    recipe: Recipe
    state: SweepState
    load: Any
    batch_size: int | None
    steps: int | None

    def __call__(self, numbered):
        """The number of a shard, and the bytes of its state after the level."""
        number, shard = numbered
        try:
            here = replica(self.recipe)
            x = shard if self.load is None else self.load(shard)
            batches = data.batches(
                x, self.batch_size, self.steps, may_be_empty=True, model=here.model
            )
            return number, here.sweep_level(self.state, batches).to_bytes()
        except Exception as error:
            # A string alone: the error itself may not survive the way back.
            raise RuntimeError(
                f"Expected every shard to be swept. Received: from {_named(number, shard)}, "
                f"{type(error).__name__}: {error}"
            ) from None


def _sweep_level(task, shards, map, seen, report):
    """The merged state of all shards after one level."""
    swept = {}
    for number, content in map(task, list(enumerate(shards))):
        if number in swept:
            continue
        state = swept[number] = SweepState.from_bytes(content)
        begins_anew = state.whole and not task.state.whole
        found = state.samples, state.data
        if not begins_anew and seen.setdefault(number, found) != found:
            raise ValueError(
                f"Expected the same data at every level. Received: {_named(number, shards[number])}"
                f", which had {seen[number][0]} samples at level 1 and at level {task.state.level} "
                f"has {found[0]}, or other ones. Give shards that do not change."
            )
        report.batch(max(state.levels.values(), default=0))
    missing = [number for number in range(len(shards)) if number not in swept]
    if missing:
        raise ValueError(
            "Expected a result for every shard. Received: none for "
            f"{_named(missing[0], shards[missing[0]])}. Look at the engine that `map` belongs to."
        )
    # In the order of the shards, so that rounding is the same for any order of results.
    state = merged((swept[number] for number in range(len(shards))), task.state)
    if state is None:
        raise data.empty()
    return state


def _named(number, shard):
    # Of data itself only the beginning, on one line.
    return f"shard {number} ({' '.join(repr(shard).split())[:100]})"
