"""Population statistics from an Apache Beam pipeline, for data beyond one machine.

Import it by its name: `import tfbn` leaves Apache Beam alone.
"""

import functools
import os
import threading

import keras
import numpy as np
import tensorflow as tf

try:
    import apache_beam as beam
    from apache_beam.transforms.window import GlobalWindows
    from apache_beam.utils.shared import Shared
except ImportError as error:
    raise ImportError(
        "Expected apache-beam, to run pipelines with. Received: an environment without it. Run "
        "`pip install 'tfbn[beam]'`."
    ) from error

from tfbn import keras_models
from tfbn.population import PopulationStats, latest
from tfbn.sweep import batches as data
from tfbn.sweep import parts
from tfbn.sweep import run as sweep
from tfbn.sweep.network import Network

# Elements have no order in which they could be counted.
_BATCH = "a batch"


class Collect(beam.PTransform):
    """Sweep a `PCollection` through a model, and give its population statistics.

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
            | beam.Map(lambda stats: stats.save("/shared/stats.npz"))
        )
    tfbn.PopulationStats.load("/shared/stats.npz").assign(model)
    ```

    The one-pass methods are one stage. `"exact"` is one for every level of batch norm layers, in
    the same pipeline: what a stage has found of all data is a side input of the next. Every
    process loads the model once. Between processes go count, mean and M2 per channel of the layers
    of one level, merged by Chan's formula (see `tfbn.moments.merge`), and nothing is kept anywhere
    else, so that a bundle that is tried again counts once.

    Whatever the runner makes of the data's order, `"exact"` gives the same up to rounding, and the
    other methods as long as the batches are the same ones. With `batch_size`, the batches are
    formed within bundles, whose last ones are smaller. To `"pooled"` this matters as a small batch
    in any sweep does. `"algorithm2"` weighs a batch by m_b / (m_b - 1), raises where m_b = 1, and
    is not reproducible over bundles: give it batches.

    Args:
        model: The path of a `.keras` file, or a function without arguments that returns the
            model, where loading it takes more (custom objects, say). It is called in the process
            that builds the pipeline and in those that run it, and must give the same weights in
            all of them. Statistics name layers as the first of these does. Name those of a
            subclassed model, because Keras numbers unnamed ones anew in every copy.
        method: `"pooled"`, `"algorithm2"` or `"exact"`, see `tfbn.collect`.
        batch_size: How many examples to put into a batch. `None` if the elements are batches.
        include_frozen: Whether to sweep layers with `trainable=False` too.

    Elements are as `model.fit` takes them from a `tf.data.Dataset`: x, (x, y) or (x, y,
    sample_weight), with x an array, or a dict or tuple of arrays where the model takes that. The
    collection must be bounded; its windows are joined. `beam.Reshuffle()` before the transform
    spreads a few large files over more workers.

    Returns:
        Of `expand`: a `PCollection` of one `tfbn.PopulationStats`.

    Raises:
        ValueError: When the pipeline is built, if the model cannot be loaded, is not built or has
            no batch norm layer to sweep, or for `"exact"` if its levels cannot be told from it
            alone: a subclassed model that Keras recorded no input shape of, or one that runs
            eagerly. When it runs, as `tfbn.collect`; if a process loads other weights.
    """

    def __init__(self, model, method="pooled", batch_size=None, include_frozen=False):
        super().__init__()
        sweep.check_method(method)
        data.check_positive(batch_size=batch_size)
        self._model = _checked_source(model)
        self._method = method
        self._batch_size = None if batch_size is None else int(batch_size)
        self._include_frozen = include_frozen

    def expand(self, examples):
        swept = functools.partial(_Swept, self._model, self._method, self._include_frozen)
        here = swept()
        levels = here.levels()
        # One for all stages, as one process may run several of them.
        known = here.begin.fingerprint, list(here.begin.previous)
        acquire = functools.partial(Shared().acquire, functools.partial(swept, *known))
        batches = (
            examples
            | "Join windows" >> beam.WindowInto(GlobalWindows())
            | "Drop targets" >> beam.Map(_inputs)
        )
        if self._batch_size is not None:
            batches = (
                batches
                | "Group" >> beam.BatchElements(self._batch_size, self._batch_size)
                | "Stack" >> beam.Map(_stack)
            )
        stats = None
        for level in range(1, levels + 1):
            below = [] if stats is None else [beam.pvalue.AsSingleton(stats)]
            stats = (
                batches
                | f"Level {level}" >> beam.ParDo(_Level(acquire, level, levels), *below)
                | f"Merge {level}" >> beam.CombineGlobally(_Merge())
            )
            if below:
                stats |= f"Join {level}" >> beam.Map(_joined, *below)
        return stats | "Finish" >> beam.Map(_finish, acquire)


class _Swept:
    """A model in one process, with what is made of it once for all batches."""

    def __init__(self, source, method, include_frozen, fingerprint=None, paths=None):
        self.model = source() if callable(source) else _load(source)
        layers = sweep.layers_to_sweep(self.model, include_frozen)
        self.begin = parts.start(self.model, layers, method)
        if fingerprint not in (None, self.begin.fingerprint):
            raise ValueError(
                "Expected every process to load the same weights. Received: fingerprints "
                f"{fingerprint[:12]} where the pipeline was built and "
                f"{self.begin.fingerprint[:12]} where it runs. Give all the same file."
            )
        if paths is not None:  # Unnamed layers have other numbers in every process.
            layers, held = (
                dict(zip(paths, found.values(), strict=True))
                for found in (layers, self.begin.previous)
            )
            self.begin = self.begin.replace(previous=self.begin.previous.replace(layers=held))
        self.network = Network(self.model, layers, method)
        # The observed layers are patched while the model is called.
        self.lock = threading.Lock()

    def levels(self):
        """How many stages the sweep takes."""
        if self.begin.method != "exact":
            return 1
        specs = keras_models.input_specs(self.model)
        if specs is None or self.model.run_eagerly:
            why = "runs eagerly" if specs else "has no recorded input shape"
            raise ValueError(
                "Expected a model whose levels can be told before the data comes, for "
                f"method='exact'. Received: {self.model.name!r}, which {why}. Use a functional "
                "model, or method='pooled' with large batches."
            )
        self.network.enter(_BATCH, specs[0], 1)
        return max(1, self.network.levels)


class _Level(beam.DoFn):
    """From batches to the statistics of each at one level."""

    def __init__(self, acquire, level, levels):
        self._acquire = acquire
        self._level = level
        self._levels = levels

    def setup(self):
        self._swept = self._acquire()
        self._below, self._populations = None, {}

    def process(self, batch, below=None):
        swept = self._swept
        inputs = data.to_tensors(batch)
        samples = data.samples(inputs)
        with swept.lock:
            if below is not self._below:  # The same object for all of a bundle.
                self._below = below
                self._populations = swept.network.settle(latest(below.calls))
            frontier = swept.network.enter(_BATCH, inputs, self._level)
            found, _ = swept.network.advance(
                _BATCH, frontier, self._level, self._populations, keep=False
            )
            levels = max(self._levels, swept.network.levels)
        part = swept.begin.replace(level=self._level, previous=None)
        yield parts.add(part, samples, found, levels)


class _Merge(beam.CombineFn):
    """The statistics of all data at one level."""

    def create_accumulator(self):
        return None

    def add_input(self, accumulator, part):
        return part if accumulator is None else accumulator.merge(part)

    def merge_accumulators(self, accumulators):
        parts = [part for part in accumulators if part is not None]
        return functools.reduce(PopulationStats.merge, parts) if parts else None

    def extract_output(self, accumulator):
        if accumulator is None:
            raise data.empty()
        return accumulator


def _joined(part, below):
    stats = parts.above(below, part)
    if stats.complete:
        parts.check_settled(below, stats)
    return stats


def _finish(stats, acquire):
    swept = acquire()
    if not stats.complete:
        raise ValueError(
            f"Expected data for which model {swept.model.name!r} has as many levels of batch norm "
            f"layers as for its recorded input shape, {stats.level}. Received: a batch for which "
            f"it has {stats.levels}. Give the data one shape."
        )
    return parts.finish(stats, swept.model, swept.begin.previous)


def _inputs(element):
    return keras.utils.unpack_x_y_sample_weight(element)[0]


def _stack(examples):
    try:
        return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *examples)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "Expected examples of one structure and one shape, to put them into batches. "
            f"Received: examples that differ ({error}). Pad them, or give batches."
        ) from error


def _checked_source(model):
    known = isinstance(model, str | os.PathLike) and str(model).endswith(".keras")
    if known and tf.io.gfile.exists(os.fspath(model)):
        return os.fspath(model)
    if callable(model) and not isinstance(model, keras.Model):
        return model
    raise ValueError(
        "Expected `model` to be the path of a .keras file, or a function without arguments that "
        f"returns the model. Received: model={model!r}"
        + (", which does not exist" if known else "")
        + ". Save the model where all workers can read it."
    )


def _load(path):
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(
            f"Expected a .keras file that Keras can load. Received: model={path!r}, on which it "
            f"raised {type(error).__name__}: {error} Give a function that returns the model."
        ) from error
