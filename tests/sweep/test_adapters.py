"""Tests of `tfbn.sweep.adapters`: data as `fit` takes it.

`fit` is the oracle: a layer notes what enters the network, in a model that runs eagerly.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn

ROWS, SIZE = 10, 4
X = np.random.default_rng(0).normal(3, 2, (ROWS, 3)).astype("float32")
Y = np.zeros((ROWS, 1), "float32")


class Joined(keras.layers.Layer):
    """All inputs side by side, dense and in float32; it notes what it is given."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def call(self, inputs):
        """Join them."""
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
    """Batch norm over whatever enters, which need not be declared."""

    def __init__(self):
        super().__init__()
        self.joined = Joined()
        self.bn, self.dense = keras.layers.BatchNormalization(), keras.layers.Dense(1)

    def call(self, inputs):
        """The network."""
        return self.dense(self.bn(self.joined(inputs)))


class Sequence(keras.utils.PyDataset):
    """Batches by number, with targets."""

    def __len__(self):
        return len(pieces())

    def __getitem__(self, i):
        return pieces()[i]


class DataLoader:
    """It looks as PyTorch's loader does to Keras, and yields lists of its tensors."""

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
    """Its values in no order."""
    value = sparse()
    order = np.random.default_rng(1).permutation(len(value.values))
    return tf.SparseTensor(
        value.indices.numpy()[order], tf.gather(value.values, order), value.dense_shape
    )


def kinds():
    """Data by name, as functions of nothing: x alone, or x with targets in batches."""
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
    np.testing.assert_allclose(stats.mean, fed.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.variance, fed.var(0), rtol=1e-4, atol=1e-5)


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
