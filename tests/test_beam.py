"""Tests of `tfbn.beam`, on Beam's local runners."""

import glob
import importlib
import importlib.util
import operator
import os
import signal
import sys
import uuid

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.models.keras_models import batch_norm_layers

beam = pytest.importorskip("apache_beam")

from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner  # noqa: E402
from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # noqa: E402
from apache_beam.runners.portability.portable_runner import PortableRunner  # noqa: E402
from apache_beam.transforms.window import FixedWindows, TimestampedValue  # noqa: E402

import tfbn.beam  # noqa: E402
from tfbn.sweep.processes import make_replica  # noqa: E402

SAMPLES = 37
PROCESSES = {"direct_num_workers": 2, "direct_running_mode": "multi_processing"}
THREADS = {"direct_num_workers": 4, "direct_running_mode": "multi_threading"}
# As for Flink and Spark: a job for a server, whose workers are in this process here.
JOB = {"runner": PortableRunner(), "job_endpoint": "embed", "environment_type": "LOOPBACK"}


@pytest.fixture(autouse=True)
def time_limit():
    """A pipeline whose worker process died waits for ever."""

    def stop(*_):
        raise TimeoutError("the pipeline hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(tmp_path):
    """A function that runs a pipeline, for its one result."""

    def run(elements, collect, runner=None, before=None, **options):
        directory = tmp_path / str(uuid.uuid4())
        directory.mkdir()

        def save(stats):  # Worker processes share only files with this one.
            stats.save(f"{directory}/{uuid.uuid4()}.npz")

        # The default runner would look for a program to download.
        pipeline = beam.Pipeline(runner or FnApiRunner(), PipelineOptions([], **options))
        elements = pipeline | beam.Create(elements) | beam.Reshuffle()
        if before is not None:
            elements = elements | "Before" >> before
        elements | collect | "Save" >> beam.Map(save)
        pipeline.run().wait_until_finish()
        [path] = directory.iterdir()
        return tfbn.PopulationStats.load(path)

    return run


@pytest.fixture
def saved(tmp_path):
    """A function that builds a network and saves it: the model, its path, and data for it."""

    def save(build=networks.plain, bn=layers.BatchNormalization):
        model = build(bn)
        path = tmp_path / "model.keras"
        model.save(path)
        return model, path, networks.data(model, SAMPLES)

    return save


def examples(x):
    """The samples of some data, one by one."""
    return [part(x, i) for i in range(SAMPLES)]


def batches(x, *sizes):
    """Data in batches of the given sizes, and their slices."""
    slices = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    return [part(x, where) for where in slices], slices


def part(x, where):
    """Some samples of arrays."""
    return keras.tree.map_structure(operator.itemgetter(where), x)


# Results.


@pytest.mark.parametrize("build", [networks.residual, networks.branching, networks.late_input])
def test_exact_is_one_batch_in_training_mode(build, run, saved):
    model, path, x = saved(build)
    [expected] = networks.in_training(build, model, x, [slice(None)])
    stats = run(examples(x), tfbn.beam.Collect(path, method="exact", batch_size=4))
    networks.assert_statistics(stats, expected, model=model)
    assert stats.samples == SAMPLES and stats.batch_size <= 4
    stats = run(batches(x, 16, 1, 20)[0], tfbn.beam.Collect(path, method="exact"))
    networks.assert_statistics(stats, expected, model=model)
    assert (stats.batches, stats.batch_size, stats.samples) == (3, 20, SAMPLES)
    # Complete, of this model's weights, and with what it held.
    before = tfbn.PopulationStats.read(model)
    assert all(stats.previous[name] == held for name, held in before.items())
    stats.assign(model)
    assert stats.mismatch(model) is None


@pytest.mark.parametrize("build", [networks.plain, networks.branching])
@pytest.mark.parametrize("method", ["pooled", "algorithm2"])
def test_one_pass_to_its_definition(build, method, run, saved):
    model, path, x = saved(build)
    sizes = np.array([16, 2, 19])
    parts, slices = batches(x, *sizes)
    stats = run(parts, tfbn.beam.Collect(path, method=method))
    expected = []
    paths = {id(layer): name for name, layer in batch_norm_layers(model).items()}
    in_batches = networks.in_training(build, model, x, slices)
    for bn, actual in zip(networks.batch_norms(model), zip(*in_batches, strict=True), strict=True):
        if method == "pooled":
            expected.append(networks.pooled(sizes, actual))
            continue
        m = sizes[:, None] * (stats[paths[id(bn)]].count // SAMPLES)
        means, variances = (np.stack(v) for v in zip(*actual, strict=True))
        weights = sizes / SAMPLES
        expected.append((weights @ means, weights @ (variances * m / (m - 1))))
    networks.assert_statistics(stats, expected, rtol=1e-5, model=model)
    assert (stats.batches, stats.batch_size, stats.samples) == (3, 19, SAMPLES)


def test_pooled_over_examples_pools_the_batches_that_they_fill(run):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    x = networks.data(model, SAMPLES).astype("float64")  # As Keras does it: cast to float32.
    stats = run(examples(x), tfbn.beam.Collect(lambda: model, batch_size=5))
    networks.assert_statistics(stats, [(x.mean(0), x.var(0))], rtol=1e-5, model=model)
    assert stats.samples == SAMPLES and stats.batch_size <= 5


@pytest.fixture
def processes(monkeypatch):
    """Every stage loads the model again, as in a separate process."""
    monkeypatch.setattr(tfbn.beam, "replica_here", make_replica)


def test_layers_go_by_their_paths_where_the_pipeline_was_built(run, processes, tmp_path):
    build = networks.subclassed  # Its layers are unnamed.
    model = build(layers.BatchNormalization)
    weights, log = model.get_weights(), tmp_path / "paths"

    def load():
        loaded = build(layers.BatchNormalization)
        loaded.set_weights(weights)
        with open(log, "a") as file:  # A list would be pickled, and another one filled.
            print(*batch_norm_layers(loaded), file=file)
        return loaded

    x = networks.data(model, SAMPLES)
    stats = run(examples(x), tfbn.beam.Collect(load, method="exact", batch_size=6))
    here, *elsewhere = map(str.split, log.read_text().splitlines())
    assert list(stats) == list(stats.previous) == here
    assert elsewhere and here not in elsewhere
    stats = dict(zip(batch_norm_layers(model), stats.values(), strict=True))
    networks.assert_statistics(
        stats, *networks.in_training(build, model, x, [slice(None)]), model=model
    )


def test_exact_where_the_graph_cannot_be_cut(run):
    def load():
        model = networks.Looped()
        model(np.zeros((2, 3, 4)))
        return model

    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4))
    [first, second] = run(list(x), tfbn.beam.Collect(load, method="exact", batch_size=3)).values()
    mean, variance = x.mean((0, 1)), x.var((0, 1))
    networks.assert_layer(first, mean, variance)
    networks.assert_layer(second, 0, variance / (variance + 1e-3))
    assert second.count == 60


def test_a_layer_that_is_called_on_its_own_output(run):
    def load():
        keras.utils.set_random_seed(0)
        model = networks.Cell()
        model(np.zeros((2, 3, 4), "float32"))
        return model

    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("float32")
    stats = run(list(x), tfbn.beam.Collect(load, method="exact", batch_size=3))
    expected = tfbn.collect(load(), x, verbose=0)
    networks.assert_statistics(stats, expected)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_equal_batches_draw_their_own_numbers(run, method):
    def load():
        bn = [layers.BatchNormalization(), layers.BatchNormalization()]
        return keras.Sequential([keras.Input((8,)), networks.Drawing("generator"), *bn])

    equal = [np.zeros((10, 8), "f")] * 100 + [np.zeros((10, 8))] * 100
    stats = run(equal, tfbn.beam.Collect(load, method=method))
    first, second = stats.values()
    # 2,000 draws a channel: a standard error of 0.022.
    np.testing.assert_allclose(first.mean, 0, atol=0.1)
    np.testing.assert_allclose(first.variance, 1, atol=0.15)
    assert np.all(first.mean_error > 0.01)
    if method == "exact":  # Every level draws the same.
        np.testing.assert_allclose(second.mean, 0, atol=1e-5)
        expected = first.variance / (first.variance + 1e-3)
        np.testing.assert_allclose(second.variance, expected, rtol=1e-5)


def test_targets_are_dropped(run, saved):
    model, path, x = saved()
    expected = networks.in_training(networks.plain, model, x, [slice(None)])
    pairs = [(one, number) for number, one in enumerate(examples(x))]
    networks.assert_statistics(
        run(pairs, tfbn.beam.Collect(path, method="exact", batch_size=6)), *expected, model=model
    )
    weighted = [(x, np.ones(SAMPLES), np.ones(SAMPLES))]
    networks.assert_statistics(
        run(weighted, tfbn.beam.Collect(path, method="exact")), *expected, model=model
    )


def test_windows_are_joined(run, saved):
    model, path, x = saved()

    class Spread(beam.PTransform):
        def expand(self, elements):
            late = elements | beam.Map(lambda x: TimestampedValue(x, float(x.flat[0])))
            return late | beam.WindowInto(FixedWindows(1))

    stats = run(examples(x), tfbn.beam.Collect(path, method="exact", batch_size=4), before=Spread())
    networks.assert_statistics(
        stats, *networks.in_training(networks.plain, model, x, [slice(None)]), model=model
    )


def test_frozen_layers_only_if_wanted(run, saved):
    model, path, x = saved()
    model.layers[1].trainable = False
    model.save(path)
    for include_frozen, count in [(False, 2), (True, 3)]:
        assert len(run([x], tfbn.beam.Collect(path, include_frozen=include_frozen))) == count


# Where it runs.


@pytest.mark.parametrize("options", [PROCESSES, THREADS, JOB], ids=["processes", "threads", "job"])
def test_workers_share_the_data_and_load_the_model_once(options, run, saved, tmp_path):
    model, path, x = saved(networks.plain)

    def load():
        open(f"{tmp_path}/load-{os.getpid()}-{uuid.uuid4()}", "w").close()
        return keras.models.load_model(path)

    stats = run(examples(x), tfbn.beam.Collect(load, method="exact", batch_size=4), **options)
    networks.assert_statistics(
        stats, *networks.in_training(networks.plain, model, x, [slice(None)]), model=model
    )
    assert stats.samples == SAMPLES
    loads = [os.path.basename(name).split("-")[1] for name in glob.glob(f"{tmp_path}/load-*")]
    assert loads.count(str(os.getpid())) == 1  # To learn of the levels.
    assert len(set(loads)) == len(loads) == (3 if options is PROCESSES else 1)


class Failing(beam.DoFn):
    """Lets elements through, and fails once right after the first."""

    def __init__(self, marker):
        self.marker = marker

    def process(self, element):
        yield element
        if not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("a worker is lost")


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_a_bundle_that_is_tried_again_counts_once(method, run, saved, tmp_path, monkeypatch):
    model, path, x = saved()
    process, calls = tfbn.beam._Level.process, []

    def failing(self, batch, state):
        yield from process(self, batch, state)
        calls.append(state.level)
        if calls.count(state.level) == 2:
            raise RuntimeError("a worker is lost")

    monkeypatch.setattr(tfbn.beam._Level, "process", failing)
    sizes = [2] * 18 + [1]
    parts, slices = batches(x, *sizes)
    marker = tmp_path / "failed"
    stats = run(
        parts,
        tfbn.beam.Collect(path, method=method),
        runner=BundleBasedDirectRunner(),
        before=beam.ParDo(Failing(marker)),
    )
    assert marker.exists()
    assert all(calls.count(level) > len(parts) for level in set(calls))
    assert (stats.batches, stats.samples) == (len(parts), SAMPLES)
    if method == "exact":
        assert set(calls) == {1, 2, 3}
        sizes, slices = [SAMPLES], [slice(None)]
    in_batches = networks.in_training(networks.plain, model, x, slices)
    networks.assert_statistics(
        stats, [networks.pooled(sizes, f) for f in zip(*in_batches, strict=True)], model=model
    )


# Failures.


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_no_data(method, run, saved):
    _, path, _ = saved()
    with pytest.raises(ValueError, match="at least one batch"):
        run([], tfbn.beam.Collect(path, method=method, batch_size=4))


def bad_data():
    """For `networks.plain`: elements, the size of batches, and what the error says."""
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype("float32")
    nan = x.copy()
    nan[3, 1, 1] = np.nan
    ragged = [np.zeros((8, 8, 3)), np.zeros((8, 9, 3))]
    takes = r"batches that model '.*' takes\. Received: a batch with inputs"
    return {
        "NaN": ([nan], None, "layer 'batch_norm.* in a batch, channel .*Clean it"),
        "no batch axis": (list(x), None, "Expected batches of shape .*which has no batch axis"),
        "a batch axis twice": ([x, x], 2, takes),
        "other shapes": (ragged, 2, "one structure and one shape"),
        "scalars": ([[1.0, 2.0]], None, takes),
    }


@pytest.mark.parametrize("name", bad_data())
def test_bad_data_gets_one_clear_error(name, run, saved):
    elements, batch_size, message = bad_data()[name]
    _, path, _ = saved()
    with pytest.raises(ValueError, match=message):
        run(elements, tfbn.beam.Collect(path, batch_size=batch_size))


def test_errors_reach_the_caller_from_other_processes(run, saved):
    _, path, x = saved()
    x[5, 0, 0] = np.inf
    with pytest.raises(RuntimeError, match="Error: Expected finite values to enter layer"):
        run(examples(x), tfbn.beam.Collect(path, method="exact", batch_size=4), **PROCESSES)


def test_one_value_per_channel(run):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    with pytest.raises(ValueError, match=r"two values per channel.*'bn', in a batch\. Use"):
        run([np.ones((1, 3))], tfbn.beam.Collect(lambda: model, method="algorithm2"))


def test_a_process_with_other_weights(run, processes):
    def load():  # Other ones each time.
        return networks.plain(layers.BatchNormalization)

    x = networks.data(load(), SAMPLES)
    with pytest.raises(ValueError, match="every process to load the same weights"):
        run([x], tfbn.beam.Collect(load))


@pytest.mark.parametrize("times", [0, 2])
def test_a_runner_that_loses_or_repeats_an_element_of_a_level(times, run, saved, monkeypatch):
    _, path, x = saved()
    process, seen = tfbn.beam._Level.process, []

    def unreliable(self, batch, state):
        seen.append(state.level)
        for _ in range(times if seen.count(2) == 1 and state.level == 2 else 1):
            yield from process(self, batch, state)

    monkeypatch.setattr(tfbn.beam._Level, "process", unreliable)
    message = rf"same elements at every level.*{SAMPLES} samples at level 1, and at level 2 \d+, or"
    with pytest.raises(ValueError, match=message):
        run(batches(x, 4, 17, 16)[0], tfbn.beam.Collect(path, method="exact"))


def test_a_runner_that_is_known_to_lose_elements(saved):
    _, path, x = saved()

    class DaskRunner(FnApiRunner):
        """Beam's own needs Dask; this one has its place."""

    DaskRunner.__module__ = "apache_beam.runners.dask.dask_runner"
    elements = beam.Pipeline(DaskRunner(), PipelineOptions([])) | beam.Create([x])
    with pytest.raises(ValueError, match=r"delivers every element once.*DaskRunner"):
        elements | tfbn.beam.Collect(path)


def test_beams_runner_on_dask_is_where_it_was():
    assert importlib.util.find_spec("apache_beam.runners.dask.dask_runner")


class Deeper(keras.Model):
    """One more batch norm for inputs that are not four wide."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.BatchNormalization(), layers.BatchNormalization()
        self.second.build((None, None, 3))

    def call(self, inputs):
        x = self.first(inputs)
        return self.second(x) if inputs.shape[1] != 4 else x


def test_a_model_that_has_more_levels_for_some_data(run):
    def load():
        model = Deeper()
        model(np.zeros((2, 4, 3)))
        return model

    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(2, width, 3)).astype("float32") for width in (4, 6)]
    with pytest.raises(ValueError, match=r"at most 1 levels, .* a batch with 2\..*one shape"):
        run(parts, tfbn.beam.Collect(load, method="exact"))
    x = rng.normal(size=(6, 4, 3)).astype("float32")
    [stats] = run([x[:2], x[2:]], tfbn.beam.Collect(load, method="exact")).values()  # The advice.
    networks.assert_layer(stats, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


def test_a_model_that_runs_eagerly_is_swept_as_advised(run):
    model, x = networks.three_levels(), networks.varied(20)
    model.run_eagerly = True
    with pytest.raises(ValueError, match="Use a functional model, or method='pooled'"):
        run([x], tfbn.beam.Collect(lambda: model, method="exact"))
    # One batch, so that pooled and exact statistics are the same.
    stats = run([x], tfbn.beam.Collect(lambda: model, method="pooled"))
    networks.assert_exact(stats, networks.three_levels, model, x)
    functional = keras.Model(model.inputs, model.outputs)
    stats = run([x[:9], x[9:]], tfbn.beam.Collect(lambda: functional, method="exact"))
    networks.assert_exact(stats, networks.three_levels, functional, x)


@pytest.mark.parametrize("how", ["pad", "batches"])
def test_examples_of_several_shapes_are_swept_as_advised(how, run):
    norm = layers.BatchNormalization(name="norm")
    model = keras.Sequential([keras.Input((None, 3)), layers.Masking(), norm])
    x = [networks.normal(n, 3, seed=n, loc=2) for n in (4, 6, 5)]
    with pytest.raises(ValueError, match="Pad them, or give batches"):
        run(x, tfbn.beam.Collect(lambda: model, batch_size=3))
    if how == "pad":
        elements = [np.pad(one, ((0, 6 - len(one)), (0, 0))) for one in x]
        stats = run(elements, tfbn.beam.Collect(lambda: model, batch_size=3))
    else:
        stats = run([one[None] for one in x], tfbn.beam.Collect(lambda: model))
    values = np.concatenate(x).astype("d")
    assert stats["norm"].count == len(values)
    networks.assert_layer(stats["norm"], values.mean(0), values.var(0))


def test_one_value_per_channel_is_swept_as_advised(run):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    x = networks.normal(12, 3, loc=1)
    pairs, variance = np.split(x, 6), x.astype("d").reshape(6, 2, 3).var(1, ddof=1).mean(0)
    stats = run(pairs, tfbn.beam.Collect(lambda: model, method="algorithm2"))
    np.testing.assert_allclose(stats["bn"].variance, variance, rtol=1e-5)
    stats = run(list(x[:, None]), tfbn.beam.Collect(lambda: model, method="pooled"))
    networks.assert_layer(stats["bn"], x.astype("d").mean(0), x.astype("d").var(0))


def bad_arguments(tmp_path):
    """Arguments of `Collect`, and what the error says."""
    plain = networks.plain(layers.BatchNormalization)
    path = tmp_path / "model.keras"
    plain.save(path)
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"nothing")
    frozen = networks.plain(layers.BatchNormalization)
    frozen.trainable = False
    eager = networks.plain(layers.BatchNormalization)
    eager.run_eagerly = True
    recorded_nothing = Deeper()
    recorded_nothing.get_build_config = lambda: None
    recorded_nothing(np.zeros((2, 4, 3)))
    one = "the path of a .keras file, or a function"
    return {
        "no such file": (["missing.keras"], {}, f"{one}.*'missing.keras', which does not exist"),
        "another file": ([tmp_path], {}, one),
        "a model": ([plain], {}, one),
        "a broken file": ([broken], {}, "that Keras can load.*broken.keras"),
        "no Keras model": ([lambda: 3], {}, "Expected a Keras model. Received: 3"),
        "frozen": ([lambda: frozen], {}, "not frozen"),
        "method": ([path], {"method": "fast"}, "Expected (a )?method.*fast"),
        "batch size": ([path], {"batch_size": 0}, "batch_size to be an integer >= 1"),
        "eager": ([lambda: eager], {"method": "exact"}, "levels.*runs eagerly"),
        "unknown inputs": (
            [lambda: recorded_nothing],
            {"method": "exact"},
            "no recorded input shape",
        ),
    }


NAMES = ["no such file", "another file", "a model", "a broken file", "no Keras model", "frozen"]
NAMES += ["method", "batch size", "eager", "unknown inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_get_one_clear_error_before_the_pipeline_runs(name, tmp_path):
    arguments, options, message = bad_arguments(tmp_path)[name]
    with pytest.raises(ValueError, match=message):
        (
            beam.Pipeline(FnApiRunner(), PipelineOptions([]))
            | beam.Create([1])
            | tfbn.beam.Collect(*arguments, **options)
        )


def test_without_apache_beam_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "tfbn.beam")
    with pytest.raises(ImportError, match=r"pip install 'tfbn\[beam\]'"):
        importlib.import_module("tfbn.beam")
