"""Random networks, data and sweeps, compared with Keras's layers in float64.

Hypothesis draws a plan: the network, its data, and the options of the sweep. The oracle is a copy
of the network with Keras's batch norm layers, which record their inputs. It is run until every
layer infers with the statistics of its inputs, and shares no code with the sweep.
"""

import contextlib
import dataclasses
import os
import tempfile
import warnings

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from keras import layers

import tfbn

NOISE = 16  # Channels of noise.


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network, its data, and a sweep of it.

    Attributes:
        root: The kind of sample, and how it is fed to the body of the network.
        parts: The parts of the body, in order.
        stock: Whether the batch norm layers are Keras's and not tfbn's.
        policy: The dtype policy.
        eager: Whether the model runs without a graph.
        source: The kind of data that the sweep receives.
        samples, batch_size: The sizes of the data and of a batch.
        method, memory_limit: See `tfbn.collect`.
        engine: This process, two devices, or a map over shards.
        fault: The batch that fails once in a sweep with a checkpoint, or the level that loses a
            shard in a map over shards.
        seed: The seed of weights and data.
    """

    root: str
    parts: tuple
    stock: bool
    policy: str
    eager: bool
    source: str
    samples: int
    batch_size: int
    method: str
    memory_limit: int
    engine: str
    fault: int | None
    seed: int


PARTS = (
    "dense",
    "bare",
    "bare",
    "residual",
    "concatenated",
    "shared",
    "shared apart",
    "nested",
    "custom",
    "compiled",
    "wrapped",
    "frozen",
    "frozen by call",
    "static",
    "noise",
    "carrying",
)
ROOTS = ("vector", "integers", "sequence", "masked", "two", "ragged", "graph")
SOURCES = (
    "arrays",
    "shuffled samples",
    "shuffled samples",
    "shuffled batches",
    "dataset",
    "generator",
    "pydataset",
)


@st.composite
def plans(draw):
    """Draw a valid `Plan`."""
    root = draw(st.sampled_from(ROOTS))
    uneven = root in ("ragged", "graph")
    engine = draw(st.sampled_from(["one", "one", "one", "shards", "devices"]))
    source = draw(st.sampled_from(SOURCES))
    if root == "graph":
        source = "iterable"
    elif root == "ragged":
        source = draw(st.sampled_from(["dataset", "iterable", "shuffled samples"]))
    if engine == "shards":
        source = "shards"
    method = draw(st.sampled_from(["exact", "exact", "exact", "pooled"]))
    if method == "pooled" and source == "shuffled samples":  # The batches are unknown.
        source = "dataset"
    fault = None
    if draw(st.booleans()) and source in ("shards", "arrays", "dataset", "pydataset"):
        fault = draw(st.integers(1, 3)) if engine == "shards" else draw(st.integers(0, 8))
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
    if draw(st.integers(0, 3)):  # Such networks are always refused, so draw few.
        parts = ["dense" if part == "carrying" else part for part in parts]
    if uneven:  # The batch size after such a root is unknown, in `fit` too.
        parts = ["bare" if part == "static" else part for part in parts]
    return Plan(
        root=root,
        parts=tuple(parts),
        stock=draw(st.booleans()),
        policy=draw(st.sampled_from(["float32", "float32", "float64"])),
        eager=draw(st.integers(0, 9)) == 0 and engine == "one" and not uneven,
        source=source,
        samples=draw(st.integers(24, 60)),
        batch_size=draw(st.integers(2, 12)),
        method=method,
        memory_limit=draw(st.sampled_from([0, 300, 600, 1_200, 5_000, 10**9])),
        engine=engine,
        fault=fault,
        seed=draw(st.integers(0, 2**16)),
    )


# The network.


class Holding(layers.Layer):
    """A batch norm layer inside a layer, not a model."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn
        self.supports_masking = True

    def build(self, shape):
        self.bn.build(shape)

    def call(self, x, training=None):
        return self.bn(x, training=training)


class Compiled(Holding):
    """A batch norm layer inside a layer, in a separately compiled function."""

    @tf.function
    def call(self, x, training=None):
        return self.bn(x, training=training)


class Inferring(Holding):
    """A batch norm layer that never trains, for any `trainable`."""

    def call(self, x, training=None):
        return self.bn(x, training=False)


class Static(layers.Layer):
    """Requires a static batch size in its trace."""

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)

    def call(self, x):
        """Reshape the inputs to their static shape."""
        return tf.reshape(x, [x.shape[0], *x.shape[1:]])


class Carrying(layers.Layer):
    """Adds a state that it carries over from the previous batch."""

    def build(self, shape):
        """Create the state in a list, like Keras's recurrent layers."""
        self.states = [keras.Variable(np.zeros(shape[-1]), dtype=self.variable_dtype)]

    def call(self, x):
        [state] = self.states
        y = x + state
        state.assign(tf.reduce_mean(tf.reshape(x, [-1, x.shape[-1]]), 0))
        return y


class Noise(layers.Layer):
    """Draws noise of variance 1, a row per sample."""

    def __init__(self, seed):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(seed)

    def call(self, x):
        return keras.random.normal((tf.shape(x)[0], NOISE), seed=self.seeds, dtype=x.dtype)

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], NOISE), x.dtype)


class Rooted(keras.Model):
    """A body on top of a root that preprocesses a batch."""

    def __init__(self, root, body):
        super().__init__()
        self.root, self.body = root, body

    def call(self, inputs, training=None):
        """Apply the body to a ragged tensor, padded with zeros, or to the messages of a graph."""
        if self.root == "ragged":
            size = inputs.nrows() if inputs.shape[0] is None else inputs.shape[0]
            x = tf.reshape(inputs.to_tensor(shape=[size, 5]), [-1, 1])
        else:
            x = tf.gather(inputs["nodes"], inputs["edges"][:, 0]) * inputs["scale"]
        return self.body(tf.cast(x, self.body.compute_dtype), training=training)


def build(plan, bn):
    """Build the network of a plan with a batch norm class; the plan sets weights and names."""
    keras.utils.set_random_seed(plan.seed)
    numbers = iter(range(100))

    def norm(**options):
        return bn(name=f"bn_{next(numbers)}", **options)

    body = body_of(plan, norm)
    rng = np.random.default_rng(plan.seed)
    model = Rooted(plan.root, body) if plan.root in ("ragged", "graph") else body
    if model is not body:
        model(to_tensors(batches_of(plan, data_of(plan))[0]))
    for weight in model.weights:  # No weight keeps its initial value.
        if not keras.backend.is_int_dtype(weight.dtype):
            value = rng.normal(0, 0.7, weight.shape)
            positive = "variance" in weight.path or "gamma" in weight.path
            weight.assign(np.abs(value) + 0.5 if positive else value)
    return model


def body_of(plan, norm):
    """Build the Functional part of a network."""
    if plan.root == "two":
        inputs = {name: keras.Input((4,), name=name) for name in "ab"}
        x = layers.Concatenate()(
            [norm()(inputs["a"]), layers.Dense(3, "tanh")(layers.Add()([*inputs.values()]))]
        )
    else:
        shape, dtype = {
            "vector": ((4,), None),
            "integers": ((4,), "uint8"),
            "sequence": ((5, 3), None),
            "masked": ((5, 3), None),
            "ragged": ((1,), None),
            "graph": ((3,), None),
        }[plan.root]
        x = inputs = keras.Input(shape, dtype=dtype)
        if plan.root == "masked":
            x = layers.Masking()(x)
        if plan.root == "integers":
            x = norm()(x)
    outputs = []
    for part in plan.parts:
        x = add_part(part, x, norm, outputs, plan)
    return keras.Model(inputs, [x, *outputs])


def add_part(part, x, norm, outputs, plan):
    """Add one part of the body and return its output."""
    width = x.shape[-1]
    if part == "dense":
        return norm()(layers.Dense(5, "tanh")(x))
    if part == "bare":
        return norm()(x)
    if part == "residual":
        return layers.Add()([norm()(layers.Dense(width, "relu")(x)), layers.Dense(width)(x)])
    if part == "concatenated":
        return layers.Concatenate()([x, norm()(layers.Dense(3, "tanh")(norm()(x)))])
    if part == "shared":
        shared = norm()
        other = layers.Dense(width, "tanh")(x)
        return norm()(layers.Multiply()([shared(x), shared(other)]))
    if part == "shared apart":
        shared, dense = norm(), layers.Dense(width, "tanh")
        first = norm()(dense(shared(x)))
        return layers.Add()([first, shared(layers.Dense(width, "relu")(x))])
    if part == "nested":
        inner = keras.Input(x.shape[1:])
        return keras.Model(inner, layers.ReLU()(norm()(layers.Dense(4)(inner))))(x)
    if part == "custom":
        return Holding(norm())(layers.Dense(4, "relu")(x))
    if part == "compiled":
        return Compiled(norm())(layers.Dense(4, "relu")(x))
    if part == "wrapped":
        return layers.TimeDistributed(norm())(x) if len(x.shape) == 3 else norm()(x)
    if part == "frozen":
        return norm(trainable=False)(layers.Dense(4, "tanh")(x))
    if part == "frozen by call":
        return Inferring(norm())(layers.Dense(4, "tanh")(x))
    if part == "static":
        return norm()(Static()(layers.Dense(4, "relu")(x)))
    if part == "carrying":
        return norm()(Carrying()(layers.Dense(4)(x)))
    if part == "noise":
        first, second = (norm(center=False, scale=False) for _ in range(2))
        first.is_noise = second.is_noise = True
        outputs.append(second(first(Noise(plan.seed)(x))))
        return x
    raise ValueError(part)


# The data.


def data_of(plan):
    """Return all samples: arrays, or a list of rows (ragged) or of batches (graphs)."""
    rng = np.random.default_rng(plan.seed)
    n = plan.samples

    def values(*shape):
        spread = rng.uniform(0.2, 3, (n, *[1] * len(shape)))
        return (spread * rng.normal(size=(n, *shape)) + spread).astype("f")

    if plan.root == "integers":
        return rng.integers(0, 200, (n, 4)).astype("uint8")
    if plan.root == "two":
        return {"a": values(4), "b": values(4)}
    if plan.root in ("sequence", "masked"):
        x = values(5, 3)
        if plan.root == "masked":
            x[np.arange(5) >= rng.integers(1, 6, n)[:, None]] = 0
        return x
    if plan.root == "ragged":
        return [rng.normal(1, 2, rng.integers(1, 6)).astype("f") for _ in range(n)]
    if plan.root == "graph":
        return [graph(rng, plan.batch_size) for _ in range(max(2, n // 12))]
    return values(4)


def graph(rng, nodes):
    """Draw a graph with random numbers of nodes and edges."""
    nodes = int(rng.integers(nodes, nodes + 4))
    return {
        "nodes": rng.normal(rng.uniform(-2, 2), 1, (nodes, 3)).astype("f"),
        "edges": rng.integers(0, nodes, (int(rng.integers(8, 25)), 2)).astype("int32"),
        "scale": np.float32(rng.uniform(0.5, 2)),
    }


def batches_of(plan, x):
    """Return the data in batches."""
    if plan.root == "graph":
        return x
    starts = range(0, plan.samples, plan.batch_size)
    if plan.root == "ragged":
        return [tf.ragged.constant(x[s : s + plan.batch_size], dtype="float32") for s in starts]
    return [keras.tree.map_structure(lambda a, s=s: a[s : s + plan.batch_size], x) for s in starts]


def to_tensors(batch):
    """Convert a batch to tensors."""
    return keras.tree.map_structure(tf.convert_to_tensor, batch) if is_dense(batch) else batch


def is_dense(batch):
    """Return whether a batch is not ragged."""
    return not isinstance(batch, tf.RaggedTensor)


class Batches(keras.utils.PyDataset):
    """Batches as a PyDataset."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i], np.zeros(1)


class Iterable:
    """Batches as an iterable that can be read repeatedly."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def source_of(plan, x):
    """Return the data for the sweep, and the options it requires."""
    batches = batches_of(plan, x)
    if plan.source == "arrays":
        return x, {"batch_size": plan.batch_size}
    if plan.source == "generator":
        return ((batch, None) for batch in batches), {}
    if plan.source == "pydataset":
        return Batches(batches), {}
    if plan.source == "iterable":
        return Iterable(batches), {}
    if plan.root == "ragged":
        rows = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(x, dtype="float32"))
        if plan.source == "shuffled samples":
            rows = rows.shuffle(plan.samples)
        return rows.batch(plan.batch_size), {}
    dataset = tf.data.Dataset.from_tensor_slices(x)
    static = plan.samples % plan.batch_size == 0
    if plan.source == "shuffled samples":
        dataset = dataset.shuffle(plan.samples)
    dataset = dataset.batch(plan.batch_size, drop_remainder=static)
    if plan.source == "shuffled batches":
        dataset = dataset.shuffle(plan.samples)
    return dataset, {}


# The oracle.


class Noting(layers.BatchNormalization):
    """Keras's layer, which records its inputs.

    Attributes:
        entered: Arrays of shape (values, channels), one per call since the last clear.
        trains: Whether any call was in training mode.
        as_batch: Whether to normalise with the batch's own statistics, as in training.
    """

    def __init__(self, **options):
        super().__init__(momentum=0.0, **options)
        self.entered, self.trains, self.as_batch = [], False, False

    def call(self, inputs, training=None, mask=None):
        if isinstance(inputs, keras.KerasTensor) or not tf.executing_eagerly():
            return super().call(inputs, training=training, mask=mask)
        inputs = tf.cast(inputs, self.compute_dtype)  # Keras does not convert integers.
        values = np.asarray(inputs, np.float64)
        kept = np.ones(values.shape[:-1], bool) if mask is None else np.asarray(mask)
        self.trains = self.trains or bool(training)
        self.entered.append(values[kept])
        return super().call(inputs, training=bool(training) and self.as_batch, mask=mask)


def oracle(plan, model, batches):
    """Return layer name -> count, mean and variance of all its inputs."""
    with networks.dtype_policy("float64"):
        twin = build(plan, Noting)
    twin.set_weights(model.get_weights())
    noting = [layer for layer in twin._flatten_layers() if isinstance(layer, Noting)]
    eager, epsilon = tf.config.functions_run_eagerly(), keras.config.epsilon()
    tf.config.run_functions_eagerly(True)
    # With a mask Keras divides by the count plus this epsilon, 1e-7 by default.
    keras.config.set_epsilon(1e-14)
    try:
        for layer in noting:
            layer.as_batch = plan.method == "pooled"
        for _ in range(1 if plan.method == "pooled" else len(noting) + 1):
            for layer in noting:
                layer.entered.clear()
            for batch in batches:
                twin(double(batch), training=True)
            if plan.method == "exact":
                for layer in noting:
                    if layer.trains and layer.trainable:
                        values = np.concatenate(layer.entered)
                        layer.moving_mean.assign(values.mean(0))
                        layer.moving_variance.assign(values.var(0))
    finally:
        tf.config.run_functions_eagerly(eager)
        keras.config.set_epsilon(epsilon)
    actual = {}
    for layer in noting:
        if layer.trains and layer.trainable and not hasattr(layer, "is_noise"):
            values = np.concatenate(layer.entered)
            actual[layer.name] = len(values), values.mean(0), values.var(0)
    return actual


def double(batch):
    """Cast the floating tensors of a batch to float64."""

    def cast(leaf):
        leaf = leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)
        return tf.cast(leaf, tf.float64) if leaf.dtype.is_floating else leaf

    if isinstance(batch, dict) or not is_dense(batch):
        return keras.tree.map_structure(cast, batch) if is_dense(batch) else cast(batch)
    return cast(batch)


# The sweep.


class Stop(Exception):
    """Raised by a sweep that should fail."""


@contextlib.contextmanager
def failing(number):
    """Make sweeps fail at batch `number`, counted over all levels, within the context."""
    from tfbn.sweep.state import SweepState

    original, calls = SweepState.add, []

    def add(state, *args):
        calls.append(1)
        if len(calls) == number + 1:
            raise Stop
        return original(state, *args)

    SweepState.add = add
    try:
        yield
    finally:
        SweepState.add = original


def swept(plan, model, x):
    """Return the statistics of the sweep of a plan."""
    source, options = (None, {}) if plan.engine == "shards" else source_of(plan, x)
    options |= {"method": plan.method, "verbose": 0}
    if plan.engine == "shards":
        return swept_in_shards(plan, model, x, options)
    options["memory_limit"] = plan.memory_limit
    if plan.source == "generator" and plan.method == "exact":
        options["memory_limit"] = max(plan.memory_limit, 16_000)
    if plan.fault is None:
        return tfbn.collect(model, source, **options)
    with tempfile.TemporaryDirectory() as folder:
        options["checkpoint"] = os.path.join(folder, "c")
        with failing(plan.fault), contextlib.suppress(Stop):
            tfbn.collect(model, source, **options)
        stats = tfbn.collect(model, source, **options)
        assert os.listdir(folder) == []
        return stats


def swept_in_shards(plan, model, x, options):
    """Run `collect_shards` with results that are reordered and partly duplicated."""
    batches = batches_of(plan, x)
    shards = [batches[:1], batches[1:3], [], batches[3:]]
    levels = []

    def map_(function, items):
        levels.append(1)
        actual = [function(item) for item in reversed(items)]
        if len(levels) == plan.fault:
            return actual[1:]
        return actual + actual[:2]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stats = tfbn.collect_shards(model, shards, map=map_, load=iter, **options)
        except ValueError as error:
            if len(levels) != plan.fault:
                raise
            assert "result for every shard" in str(error), error
            return None
    assert plan.fault is None or len(levels) < plan.fault
    return stats


def check(plan, strategy):
    """Sweep as planned, and compare with the oracle."""
    bn = layers.BatchNormalization if plan.stock else tfbn.BatchNormalization
    scope = strategy.scope() if plan.engine == "devices" else contextlib.nullcontext()
    with networks.dtype_policy(plan.policy), scope:
        model = build(plan, bn)
    model.run_eagerly = plan.eager
    x = data_of(plan)
    before = [weight.copy() for weight in model.get_weights()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            stats = swept(plan, model, x)
        except (ValueError, RuntimeError) as error:
            # Only sweeps that are not well defined are refused, with a reason.
            if "carrying" in plan.parts:
                assert "does not depend on the batch before" in str(error), error
                return
            trained = oracle(plan, model, batches_of(plan, x))
            noise = "noise" in plan.parts
            assert (not trained and not noise) or (
                noise
                and plan.source == "shuffled samples"
                and "same batches in every pass" in str(error)
            ), error
            return
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    if stats is None:  # A lost shard raised its error.
        return
    assert "carrying" not in plan.parts
    compare(plan, model, stats, oracle(plan, model, batches_of(plan, x)))


def compare(plan, model, stats, expected):
    """Require that statistics match the oracle."""
    tolerance = 2e-4 if plan.policy == "float32" else 2e-6
    actual = {path.split("/")[-1]: layer for path, layer in stats.items()}
    noisy = [layer.name for layer in model._flatten_layers() if hasattr(layer, "is_noise")]
    noisy.sort(key=lambda name: int(name.removeprefix("bn_")))
    assert actual.keys() == expected.keys() | set(noisy)
    for name, (count, mean, variance) in expected.items():
        assert actual[name].count == count, name
        scale = variance + 1e-3  # Inference divides by the square root of this.
        np.testing.assert_array_less(
            np.abs(actual[name].mean - mean) / np.sqrt(scale), tolerance, name
        )
        np.testing.assert_array_less(np.abs(actual[name].variance - variance) / scale, tolerance)
    for first, second in zip(noisy[::2], noisy[1::2], strict=True):
        rows = actual[first].count * NOISE
        assert abs(actual[first].variance.mean() - 1) < 6 * np.sqrt(2 / rows) + 2 / rows, first
        # Chi-squared with one degree of freedom per channel, unless batches share their noise.
        assert np.sum(actual[first].mean ** 2) * actual[first].count < 4 * NOISE, first
        if plan.method == "exact":  # Both layers get the same draws.
            passed = actual[first].variance / (actual[first].variance + 1e-3)
            np.testing.assert_allclose(actual[second].mean, 0, atol=1e-4)
            np.testing.assert_allclose(actual[second].variance, passed, rtol=1e-4)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def pinned(root, *parts, **changes):
    """Return a plan that once exposed a bug."""
    plain = {
        "stock": True,
        "policy": "float32",
        "eager": False,
        "source": "arrays",
        "samples": 40,
        "batch_size": 7,
        "method": "exact",
        "memory_limit": 10**9,
        "engine": "one",
        "fault": None,
        "seed": 1,
    }
    return Plan(root=root, parts=parts, **plain | changes)


PINNED = {
    "shuffled anew": pinned(
        "vector", "dense", "dense", "residual", source="shuffled samples", memory_limit=400
    ),
    "noise": pinned("vector", "noise", batch_size=4, memory_limit=0),
    "a lost shard": pinned("vector", "dense", "dense", engine="shards", source="shards", fault=2),
    "a shard that comes twice": pinned("sequence", "dense", engine="shards", source="shards"),
    "integers": pinned("integers", "bare"),
    "frozen by call": pinned("vector", "dense", "frozen by call", "dense", method="pooled"),
    "ragged": pinned("ragged", "bare", "bare", source="dataset"),
    "a state": pinned("vector", "carrying"),
    "graphs": pinned("graph", "dense", source="iterable", memory_limit=0),
    "a static size": pinned("vector", "static", source="dataset", batch_size=10),
    "one mask for two layers": pinned("masked", "bare", "bare", source="pydataset"),
}


def also(test):
    """Add the pinned plans to a property as explicit examples."""
    for plan in PINNED.values():
        test = example(plan=plan)(test)
    return test


@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=QUIET,
)
@also
@given(plan=plans())
def test_any_sweep_of_any_network_over_any_data(plan, two_devices):
    check(plan, two_devices)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=QUIET)
@given(plan=plans())
def test_many_more(plan, two_devices):
    check(plan, two_devices)
