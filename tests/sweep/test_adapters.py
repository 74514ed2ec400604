"""Tests of `tfbn.sweep.adapters`: every kind of data that `fit` accepts.

`fit` is the oracle: in a model that runs eagerly, a layer records the inputs.
"""

import itertools

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.sweep import adapters

ROWS, SIZE = 10, 4


X = np.random.default_rng(0).normal(3, 2, (ROWS, 3)).astype("float32")


Y = np.zeros((ROWS, 1), "float32")


class Joined(keras.layers.Layer):
    """Concatenates all inputs, dense and in float32, and records the result."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def call(self, inputs):
        parts = []
        for leaf in keras.tree.flatten(inputs):
            if leaf is None:
                continue
            if isinstance(leaf, tf.SparseTensor):
                leaf = tf.sparse.to_dense(leaf)
            if isinstance(leaf, tf.RaggedTensor):
                leaf = leaf.to_tensor(shape=[None, 3])
            parts.append(tf.cast(leaf, "float32"))
        joined = tf.concat(parts, -1)
        if tf.executing_eagerly():
            self.noted.append(joined.numpy())
        return joined


class Net(keras.Model):
    """Batch norm over inputs of any structure."""

    def __init__(self):
        super().__init__()
        self.joined = Joined()
        self.bn, self.dense = keras.layers.BatchNormalization(), keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(self.bn(self.joined(inputs)))


class Sequence(keras.utils.PyDataset):
    """A PyDataset of batches with targets."""

    def __len__(self):
        return len(pieces())

    def __getitem__(self, i):
        return pieces()[i]


class DataLoader:
    """Looks like PyTorch's loader to Keras, and yields lists."""

    def __len__(self):
        return len(pieces())

    def __iter__(self):
        return ([x, y] for x, y in pieces())


def pieces():
    starts = range(0, ROWS, SIZE)
    return [(X[i : i + SIZE], Y[i : i + SIZE]) for i in starts]


def ragged():
    return tf.RaggedTensor.from_row_lengths(X.ravel()[: ROWS + ROWS // 2], [1, 2] * (ROWS // 2))


def sparse():
    return tf.sparse.from_dense(np.where(X > 3, X, 0))


def sparse_in_no_order():
    """Return the sparse tensor with its values in random order."""
    value = sparse()
    order = np.random.default_rng(1).permutation(len(value.values))
    return tf.SparseTensor(
        value.indices.numpy()[order], tf.gather(value.values, order), value.dense_shape
    )


def kinds():
    """Return name -> function that creates data: x alone, or batches of x with targets."""
    frame = pytest.importorskip("pandas").DataFrame
    matrices = pytest.importorskip("scipy.sparse")
    mixed = {"a": X[:, 0].astype("d"), "b": X[:, 1] > 3, "c": X[:, 2].astype("int64")}
    dataset = tf.data.Dataset.from_tensor_slices
    both = {"a": X, "b": X[:, :1]}
    arrays = {
        "numpy": lambda: X,
        "float64": lambda: X.astype("d"),
        "float16": lambda: X.astype("float16"),
        "integers": lambda: X.astype("int32"),
        "bool": lambda: X > 3,
        "tensor": lambda: tf.constant(X),
        "list": lambda: [X, X[:, :2]],
        "tuple": lambda: (X, X[:, :2]),
        "dict": lambda: both,
        "nested": lambda: {"a": X, "b": [X, (X[:, :1], X)]},
        "DataFrame": lambda: frame({"a": X[:, 0], "b": X[:, 1]}),
        "mixed DataFrame": lambda: frame(mixed),
        "integer DataFrame": lambda: frame({"a": mixed["c"], "b": mixed["c"] + 1}),
        "Series": lambda: frame(mixed)["a"],
        "dict of Series": lambda: dict(frame(mixed).items()),
        "dict of DataFrame and array": lambda: {"a": frame(mixed), "b": X},
        "SparseTensor": sparse,
        "SparseTensor with an array": lambda: {"a": sparse(), "b": X},
        "SciPy": lambda: matrices.csr_matrix(X * (X > 3)),
        "SciPy, float64 coo": lambda: matrices.coo_matrix(X.astype("d") * (X > 3)),
        "ragged": ragged,
        "None in a dict": lambda: {"a": X, "b": None},
        "None in a list": lambda: [X, None],
        "None in a nested dict": lambda: {"a": {"b": None, "c": X}, "d": X},
    }
    batches = {
        "dataset": lambda: dataset((X, Y)).batch(SIZE),
        "dataset of dicts": lambda: dataset((both, Y)).batch(SIZE),
        "dataset with weights": lambda: dataset((X, Y, Y[:, 0])).batch(SIZE),
        "dataset of ragged": lambda: dataset((ragged(), Y)).batch(SIZE),
        "dataset of sparse": lambda: dataset((sparse(), Y)).batch(SIZE),
        "dataset with None": lambda: tf.data.Dataset.from_tensors(({"a": X, "b": None}, Y)),
        "generator": lambda: (piece for piece in pieces()),
        "generator of dicts": lambda: (({"a": x, "b": x[:, :1]}, y) for x, y in pieces()),
        "generator with None": lambda: (({"a": x, "b": None}, y) for x, y in pieces()),
        "generator of SciPy": lambda: ((matrices.csr_matrix(x), y) for x, y in pieces()),
        "PyDataset": Sequence,
        "distributed dataset": lambda: tf.distribute.get_strategy().experimental_distribute_dataset(
            dataset((X, Y)).batch(SIZE)
        ),
    }
    return {
        **{name: (make, True) for name, make in arrays.items()},
        **{n: (m, False) for n, m in batches.items()},
    }


NAMES = [*kinds()]


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", NAMES)
def test_the_sweep_reads_what_fit_reads(name):
    make, is_arrays = kinds()[name]
    model = Net()
    model.compile("sgd", "mse", run_eagerly=True)
    options = {"y": Y, "batch_size": SIZE} if is_arrays else {}
    model.fit(make(), **options, shuffle=False, verbose=0)
    fed = np.concatenate(model.joined.noted).astype("d")
    model.run_eagerly = False
    [stats] = tfbn.collect(
        model, make(), batch_size=SIZE if is_arrays else None, verbose=0
    ).values()
    assert stats.count == len(fed) == ROWS
    networks.assert_layer(stats, fed.mean(0), fed.var(0), 1e-4)


def test_sparse_tensors_need_no_order():
    model = Net()
    model(tf.zeros([1, 3]))
    [stats] = tfbn.collect(model, sparse_in_no_order(), batch_size=SIZE, verbose=0).values()
    np.testing.assert_allclose(stats.mean, np.where(X > 3, X, 0).mean(0), rtol=1e-5)


def test_an_optional_input_of_a_functional_model():
    class Added(keras.layers.Layer):
        def call(self, a, b=None):
            return a if b is None else a + b

        def compute_output_shape(self, a_shape, b_shape=None):
            return a_shape

    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b", optional=True)
    model = keras.Model({"a": a, "b": b}, keras.layers.BatchNormalization()(Added()(a, b)))
    for x, mean in (
        ({"a": X, "b": None}, X.mean(0)),
        ({"a": X, "b": X}, 2 * X.mean(0)),
        (iter([({"a": X, "b": None}, Y)]), X.mean(0)),
    ):
        for options in ({}, {"tolerance": 0.9}, {"method": "pooled"}):
            if not hasattr(x, "__next__") or not options:
                [stats] = tfbn.collect(model, x, verbose=0, **options).values()
                np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)


def test_the_callback_reads_what_fit_reads():
    frame = pytest.importorskip("pandas").DataFrame
    inputs = {name: keras.Input((1,), name=name) for name in "ab"}
    joined = keras.layers.Concatenate()([*inputs.values()])
    outputs = keras.layers.Dense(1)(keras.layers.BatchNormalization()(joined))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = dict(frame({"a": X[:, 0].astype("d"), "b": X[:, 1].astype("int64")}).items())
    callback = tfbn.PopulationStatsCallback(x)
    model.fit(x, Y, callbacks=[callback], verbose=0)
    [stats] = callback.stats.values()
    expected = np.column_stack([X[:, 0], X[:, 1].astype("int64")])
    np.testing.assert_allclose(stats.mean, expected.mean(0), rtol=1e-5)


def kinds_of_pairs(x):
    """Return the same data in batches of six, as every kind that `fit` accepts."""
    y, w = np.zeros(len(x)), np.ones(len(x))
    pieces = [x[i : i + 6] for i in range(0, len(x), 6)]
    dataset = tf.data.Dataset.from_tensor_slices
    return {
        "numpy": (x, {"batch_size": 6}),
        "tensor": (tf.constant(x), {"batch_size": 6}),
        "float64": (x.astype("float64"), {"batch_size": 6}),
        "dataset": (dataset(x).batch(6), {}),
        "dataset xy": (dataset((x, y)).batch(6), {}),
        "dataset xyw": (dataset((x, y, w)).batch(6), {}),
        "endless dataset": (dataset((x, y)).batch(6).repeat(), {"steps": len(pieces)}),
        "unknown length": (dataset(x).batch(6).filter(lambda _: True), {}),
        "pydataset": (networks.Pairs(x), {}),
        "endless pydataset": (networks.Pairs(x, endless=True), {"steps": len(pieces)}),
        "generator": ((piece for piece in pieces), {}),
        "generator xy": (((piece, np.zeros(len(piece))) for piece in pieces), {}),
        "endless generator": (itertools.cycle(pieces), {"steps": len(pieces)}),
    }


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", kinds_of_pairs(np.zeros((12, 2))))
def test_any_data_that_fit_takes(kind):
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), layers.ReLU(), layers.BatchNormalization()]
    )
    x = networks.data(model, 40)  # The last of seven batches has four samples.
    source, options = kinds_of_pairs(x)[kind]
    stats = tfbn.collect(model, source, verbose=0, **options)
    first, _ = stats.values()
    assert (stats.samples, stats.batches, stats.batch_size) == (40, 7, 6)
    assert first.count == 40
    networks.assert_layer(first, x.astype("d").mean(0), x.astype("d").var(0))


class OfRagged(keras.Model):
    """Batch norm over the values of a ragged tensor."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 1))

    def call(self, inputs, training=None):
        return self.bn(tf.cast(inputs.flat_values, tf.float32)[:, None], training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_ragged_last_batch(method):
    rows = [list(range(i % 5 + 1)) for i in range(23)]
    dataset = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(rows, dtype=tf.float32))
    model = OfRagged()
    model(tf.ragged.constant(rows, dtype=tf.float32))
    [actual] = tfbn.collect(model, dataset.batch(5), method=method, verbose=0).values()
    values = np.concatenate(rows).astype("d")
    assert actual.count == len(values)
    networks.assert_layer(actual, values.mean(), values.var())


@pytest.mark.parametrize("memory_limit", [0, 100])
@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_data_may_shuffle_too(kind, memory_limit):
    if kind == "ragged":
        rows = [list(range(i % 5 + 1)) for i in range(23)]
        x, model = tf.ragged.constant(rows, dtype=tf.float32), OfRagged()
        values = np.concatenate(rows)[:, None].astype("d")
    else:
        dense = networks.normal(23, 6) * (np.random.default_rng(1).uniform(size=(23, 6)) < 0.4)
        x, model = tf.sparse.from_dense(dense), OfSparse()
        values = dense.astype("d") @ model.kernel.numpy()
    deep = Deep(model)
    deep(x)
    dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(23).batch(5)
    first, second = tfbn.collect(deep, dataset, memory_limit=memory_limit, verbose=0).values()
    assert first.count == second.count == len(values)
    networks.assert_layer(first, values.mean(0), values.var(0))
    np.testing.assert_allclose(second.variance, values.var(0) / (values.var(0) + 1e-3), rtol=1e-4)


class Deep(keras.Model):
    """Batch norm over the output of another model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.bn = model, layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(self.model(x, training=training), training=training)


class OfSparse(keras.Model):
    """Batch norm over a product with a sparse tensor."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 2))
        self.kernel = tf.constant(networks.normal(6, 2))

    def call(self, inputs, training=None):
        return self.bn(tf.sparse.sparse_dense_matmul(inputs, self.kernel), training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_sparse_last_batch(method):
    x = networks.normal(23, 6) * (np.random.default_rng(1).uniform(size=(23, 6)) < 0.4)
    dataset = tf.data.Dataset.from_tensor_slices(tf.sparse.from_dense(x)).batch(5)
    model = OfSparse()
    model(tf.sparse.from_dense(x))
    stats = tfbn.collect(model, dataset, method=method, verbose=0)
    [actual] = stats.values()
    values = x.astype("d") @ model.kernel.numpy()
    assert (actual.count, stats.samples) == (23, 23)
    networks.assert_layer(actual, values.mean(0), values.var(0))


class OfGraphs(keras.Model):
    """One step of message passing, with batch norm over nodes and over edges."""

    def __init__(self):
        super().__init__()
        self.nodes, self.edges = layers.BatchNormalization(), layers.BatchNormalization()
        self.message = layers.Dense(3)

    def call(self, inputs, training=None):
        nodes = self.nodes(inputs["nodes"], training=training)
        sent = self.message(tf.gather(nodes, inputs["edges"][:, 0]))
        sent = self.edges(sent * inputs["scale"], training=training)
        return tf.math.unsorted_segment_sum(sent, inputs["edges"][:, 1], tf.shape(nodes)[0])


def graph_batches(count=6):
    """Yield graphs with 10 to 15 nodes and 20 to 25 edges, and a scalar."""
    rng = np.random.default_rng(0)
    for i in range(count):
        edges = rng.integers(0, 10 + i, (25 - i, 2)).astype("int32")
        nodes = rng.normal(i, 1, (10 + i, 3)).astype("f")
        yield {"nodes": nodes, "edges": edges, "scale": np.float32(1 + i / 10)}


@pytest.mark.parametrize("memory_limit", [0, 10**9])
def test_graphs_with_other_numbers_of_nodes_and_edges_and_a_scalar(memory_limit):
    model = OfGraphs()
    parts = list(graph_batches())
    model(parts[0])

    class Repeatable:
        def __iter__(self):
            return iter(parts)

    stats = tfbn.collect(model, Repeatable(), memory_limit=memory_limit, verbose=0)
    nodes = np.concatenate([part["nodes"] for part in parts]).astype("d")
    actual = stats[model.nodes.name]
    networks.assert_layer(actual, nodes.mean(0), nodes.var(0))
    kernel, bias = (w.numpy().astype("d") for w in model.message.weights)
    sent = []
    for part in parts:
        normed = (part["nodes"] - nodes.mean(0)) / np.sqrt(nodes.var(0) + 1e-3)
        sent.append((normed[part["edges"][:, 0]] @ kernel + bias) * part["scale"])
    sent = np.concatenate(sent)
    assert stats[model.edges.name].count == len(sent)
    networks.assert_layer(stats[model.edges.name], sent.mean(0), sent.var(0))


def test_pandas_frames():
    pandas = pytest.importorskip("pandas")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    x = networks.normal(23, 3, loc=4)
    [actual] = tfbn.collect(model, pandas.DataFrame(x), verbose=0).values()
    networks.assert_layer(actual, x.astype("d").mean(0), x.astype("d").var(0))


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    x = networks.normal(23, 3, loc=4)
    [actual] = tfbn.collect(model, jax.numpy.asarray(x), verbose=0).values()
    networks.assert_layer(actual, x.astype("d").mean(0), x.astype("d").var(0))


def test_torch_loaders():
    torch = pytest.importorskip("torch")
    model = networks.three_levels()
    x = networks.varied(50)
    loader = torch.utils.data.DataLoader(torch.tensor(x), batch_size=8, shuffle=True)
    stats = tfbn.collect(model, loader, memory_limit=0, verbose=0)
    networks.assert_exact(stats, networks.three_levels, model, x, rtol=1e-5)


@pytest.mark.parametrize("memory_limit", [0, 10**9])
def test_grain_loaders(memory_limit):
    grain = pytest.importorskip("grain")
    model = networks.three_levels()
    x = networks.varied(50)
    loader = grain.MapDataset.source(list(x)).shuffle(seed=1).batch(8)
    for source in (loader, loader.to_iter_dataset()):
        stats = tfbn.collect(model, source, memory_limit=memory_limit, verbose=0)
        networks.assert_exact(stats, networks.three_levels, model, x, rtol=1e-5)


def test_arrays_stay_on_the_host():
    with tf.device("CPU:1"):  # A stand-in for a GPU.
        assert adapters.to_tensor(X).device.endswith("CPU:0")
