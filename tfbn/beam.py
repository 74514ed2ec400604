"""Compute population statistics in an Apache Beam pipeline.

Requires `import tfbn.beam`, because `import tfbn` does not import Apache Beam.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import keras
import numpy as np

try:
    import apache_beam as beam
    from apache_beam.transforms.window import GlobalWindows
except ImportError as error:
    raise ImportError("tfbn.beam needs Apache Beam: pip install 'tfbn[beam]'.") from error

from tfbn.models import keras_models
from tfbn.models.keras_models import Structure
from tfbn.population import PopulationStats
from tfbn.stats.methods import METHODS
from tfbn.sweep import data
from tfbn.sweep.batches import Batch
from tfbn.sweep.network import Network
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.processes import ReplicaSpec, check_source, replica_here
from tfbn.sweep.replica import Replica
from tfbn.sweep.state import SweepState


class Collect(beam.PTransform):
    """Sweep a `PCollection` through a model and return its population statistics.

    `tfbn.collect` as a transform, with the same methods and numbers:

    ```python
    import apache_beam as beam
    import tfbn.beam

    with beam.Pipeline(options=options) as pipeline:
        (
            pipeline
            | beam.io.ReadFromTFRecord("gs://bucket/train-*.tfrecord")
            | beam.Map(parse)  # to x as the model takes it, without a batch axis
            | tfbn.beam.Collect("gs://bucket/model.keras", method="exact", batch_size=256)
            | beam.Map(lambda stats: stats.save("/shared/stats.safetensors"))
        )
    tfbn.PopulationStats.load("/shared/stats.safetensors").assign(model)
    ```

    The one-pass methods require one stage, and `"exact"` one stage per level of batch norm layers:
    the state after a stage is a side input of the next. A network that cannot be cut at levels,
    because it calls a layer in a loop or on its own output, requires one stage per call, and a few
    more. Every process loads and traces the model once. Processes exchange the moments of the
    layers of one level, ten numbers per channel (see `tfbn.stats.moments`), and store nothing, so
    that a bundle that is retried counts once. Every level must receive the same samples, which is
    validated.

    The order of the data does not change `"exact"`, up to rounding. The other methods return the
    same for the same batches. With `batch_size`, batches are formed within bundles, so the last
    batch of a bundle may be small. For `"pooled"` this matters as much as a small batch in any
    sweep. `"algorithm2"` weights a batch by m_b / (m_b - 1), raises for m_b = 1, and is not
    reproducible over bundles: pass batches.

    If the network draws random numbers in inference, one more stage groups equal batches, so that
    each draws different numbers. The batches must then be the same at every level: pass batches.

    Args:
        model: The path of a `.keras` file, or a function without arguments that returns the
            model (with custom objects, say). It is called in the process that builds the pipeline
            and in every process that runs it, and must return the same weights in all of them.
            The first process determines the names of layers. Name the layers of a subclassed
            model, because Keras numbers unnamed layers anew in every copy.
        method: `"pooled"`, `"algorithm2"` or `"exact"`, see `tfbn.collect`.
        batch_size: Number of examples in a batch. `None` if the elements are batches.
        include_frozen: Whether to sweep layers with `trainable=False` too.

    Elements are as `model.fit` takes them from a `tf.data.Dataset`: x, (x, y) or (x, y,
    sample_weight), where x is an array, or a dict or tuple of arrays. The collection must be
    bounded; its windows are joined. `beam.Reshuffle()` before the transform spreads a few large
    files over more workers.

    Returns:
        A `PCollection` of one `tfbn.PopulationStats`, from `expand`.

    Raises:
        ValueError: When the pipeline is built, if the model cannot be loaded, is not built or has
            no batch norm layer to sweep; for `"exact"` if the levels cannot be computed without
            data, because the model has no recorded input shape or runs eagerly; on Beam's
            DaskRunner, which loses elements (seen in 2.77). When it runs, as `tfbn.collect`; if a
            process loads other weights, or two levels receive different samples.
    """

    def __init__(
        self,
        model: str | os.PathLike | Callable[[], keras.Model],
        *,
        method: str = "exact",
        batch_size: int | None = None,
        include_frozen: bool = False,
    ):
        super().__init__()
        self._options = SweepOptions(
            method=method, batch_size=batch_size, include_frozen=include_frozen
        )
        self._source = check_source(model)

    def expand(self, examples: beam.PCollection) -> beam.PCollection:
        _refuse(examples.pipeline.runner)
        method, batch_size = self._options.method, self._options.batch_size
        spec = ReplicaSpec(self._source, self._options.include_frozen)
        here = replica_here(spec)
        stages = _stages(here, method)
        begin = here.initial_state(method)
        if stages.uncut:
            begin = begin.uncut()
        spec = dataclasses.replace(spec, paths=begin.paths)
        batches = (
            examples
            | "Join windows" >> beam.WindowInto(GlobalWindows())
            | "Drop targets" >> beam.Map(keras_models.inputs_of)
        )
        if batch_size is not None:
            batches = (
                batches
                | "Group" >> beam.BatchElements(int(batch_size), int(batch_size))
                | "Stack" >> beam.Map(_stack)
            )
        if stages.draws:
            numbered = (
                batches
                | "Key by content" >> beam.ParDo(_Key(spec))
                | "Group equal batches" >> beam.GroupByKey()
                | "Number equal batches" >> beam.FlatMap(lambda group: enumerate(group[1]))
            )
        else:
            numbered = batches | "Number batches" >> beam.Map(lambda batch: (0, batch))
        state = examples.pipeline | "Begin" >> beam.Create([begin])
        for level in range(1, stages.number + 1):
            before = beam.pvalue.AsSingleton(state)
            state = (
                numbered
                | f"Level {level}" >> beam.ParDo(_Level(spec), before)
                | f"Merge {level}" >> beam.CombineGlobally(_Merge())
                | f"Join {level}" >> beam.Map(_joined, before)
            )
        return state | "Finish" >> beam.Map(_finish, spec, stages.number)


class _Stages(NamedTuple):
    """The stages of a sweep.

    Attributes:
        number: Number of stages.
        uncut: Whether each is a pass over the whole network.
        draws: Whether the network may draw random numbers.
    """

    number: int
    uncut: bool
    draws: bool


def _stages(here: Replica, method: str) -> _Stages:
    """Compute the `_Stages` of a sweep from its model.

    Raises:
        ValueError: If this requires the data.
    """
    if not METHODS[method].by_level:
        return _Stages(1, False, _may_draw(here))
    model = here.model
    specs = keras_models.input_specs(model)
    if specs is None or model.run_eagerly:
        why = "runs eagerly" if specs else "has no recorded input shape"
        raise ValueError(
            f"Expected a model with known levels for method='exact'. Received: {model.name!r}, "
            f"which {why}. Use a functional model, or method='pooled'."
        )
    trace = Network(model, here.layers).trace(specs[0], settled=True)
    levels = trace.facts.levels
    if levels is not None:
        return _Stages(max(levels.values(), default=1), False, trace.random)
    # Each pass settles one more call, and the last pass shows convergence. A cell that is called
    # on its own output settles first, then the layers behind it.
    calls = len(trace.calls) + 2
    return _Stages(2 * calls if trace.facts.recurrent else calls, True, trace.random)


def _may_draw(here: Replica) -> bool:
    """Return whether a network draws random numbers in a one-pass sweep, or cannot be traced."""
    specs = keras_models.input_specs(here.model)
    if specs is None or here.model.run_eagerly:
        return True
    try:
        return Network(here.model, here.layers).trace(specs[0], settled=False).random
    except Exception:  # The sweep raises the error on a batch.
        return True


class _Key(beam.DoFn):
    """Convert batches to pairs (key, batch); equal batches share a key."""

    def __init__(self, spec: ReplicaSpec):
        self._spec = spec

    def setup(self) -> None:
        self._replica = replica_here(self._spec)

    def process(self, batch: Structure) -> Iterator[tuple[str, Structure]]:
        yield str(_Element(batch, self._replica.model).first().key), batch


class _Level(beam.DoFn):
    """Compute the state of each numbered batch after one level."""

    def __init__(self, spec: ReplicaSpec):
        self._spec = spec

    def setup(self) -> None:
        self._replica = replica_here(self._spec)

    def process(self, numbered: tuple[int, Structure], state: SweepState) -> Iterator[SweepState]:
        if state.complete:
            return
        number, batch = numbered
        yield self._replica.sweep_shard(state, _Element(batch, self._replica.model, number))


class _Element:
    """The `Batches` of one element.

    Args:
        x: The element.
        model: The model.
        number: The number among equal elements.
    """

    static = False

    def __init__(self, x: Structure, model: keras.Model, number: int = 0):
        # The element is x alone, which may be a tuple: wrap it in a tuple of one.
        [batch] = data.batches(iter([(x,)]), SweepOptions(), model, shard=number)
        self._batch = _Unnumbered(*batch)

    def first(self) -> Batch:
        return self._batch

    def __iter__(self) -> Iterator[Batch]:
        yield self._batch


class _Unnumbered(Batch):
    """A batch of a collection. Its elements have no order, so the batch has no number."""

    __slots__ = ()
    name = "a batch"


class _Merge(beam.CombineFn):
    """Merge the states after one level, without the levels before."""

    def create_accumulator(self) -> SweepState | None:
        return None

    def add_input(self, accumulator: SweepState | None, state: SweepState) -> SweepState:
        return state if accumulator is None else accumulator.merge(state)

    def merge_accumulators(self, accumulators: Iterable[SweepState | None]) -> SweepState | None:
        states = [state for state in accumulators if state is not None]
        return functools.reduce(SweepState.merge, states) if states else None

    def extract_output(self, accumulator: SweepState | None) -> SweepState | None:
        return accumulator


def _joined(swept: SweepState | None, before: SweepState) -> SweepState:
    """Return the state at the beginning of the next level."""
    if before.complete:
        return before
    samples, digest = (0, 0) if swept is None else (swept.samples, swept.data)
    if before.first is not None and (samples, digest) != before.first[:2]:
        raise ValueError(
            f"Expected the same elements at every level. Received: {before.first[0]} samples at "
            f"level 1, and at level {before.level} {samples}, or other elements. Remove randomness "
            "from the pipeline, use method='pooled', or change the runner."
        )
    swept = before if swept is None else dataclasses.replace(swept, settled=before.settled)
    if swept.turned_uncut(before):
        raise ValueError(
            "Expected levels as for the recorded input shape. Received: a batch for which a layer "
            "is called in a loop or on its own output. Give the data one shape."
        )
    return before.advance(swept)


def _finish(state: SweepState, spec: ReplicaSpec, stages: int) -> PopulationStats:
    here = replica_here(spec)
    if not state.complete:
        raise ValueError(
            f"Expected at most {stages} levels, as for the recorded input shape of model "
            f"{here.model.name!r}. Received: a batch with "
            f"{max(state.levels.values(), default=stages + 1)}. Give the data one shape."
        )
    return here.finish(state)


def _refuse(runner: beam.runners.PipelineRunner) -> None:
    if type(runner).__module__.startswith("apache_beam.runners.dask"):
        raise ValueError(
            "Expected a runner that delivers every element once. Received: DaskRunner, which does "
            "not. Use another one, or tfbn.collect_shards on Dask."
        )


def _stack(examples: list[Structure]) -> Structure:
    try:
        return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *examples)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected examples of one structure and one shape. Received: {error}. "
            "Pad them, or give batches."
        ) from error
