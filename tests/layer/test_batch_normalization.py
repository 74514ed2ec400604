"""Compare the layer with Keras's, and with NumPy where Keras's is wrong."""

import subprocess
import sys
import textwrap

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

# Private API. Optimizes a graph as a session does before running it.
from tensorflow.python.grappler.tf_optimizer import OptimizeGraph

import tfbn
from tfbn.layer import kernels

KERAS, OURS = keras.layers.BatchNormalization, tfbn.BatchNormalization
HAS_RENORM = "renorm" in KERAS().get_config()


KERAS_TESTS = """
    import tfbn
    from keras.src import layers
    from keras.src.layers.normalization.batch_normalization_test import BatchNormalizationTest

    layers.BatchNormalization = tfbn.BatchNormalization
"""


@pytest.mark.slow
def test_keras_own_layer_tests_pass(tmp_path):
    """Run Keras's tests on our layer, in another process because their pytest markers differ."""
    file = tmp_path / "test_keras.py"
    file.write_text(textwrap.dedent(KERAS_TESTS))
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, file]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def pair(shape, **options):
    """Build Keras's layer and ours with the same random weights."""
    layers = [KERAS(**options), OURS(**options)]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer.build((None, *shape[1:]) if options.get("axis", -1) % len(shape) else shape)
    values = [rng.uniform(0.5, 1.5, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(values)
    return layers


def step(layer, x, dy, **call):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **call)
    sources = [x, *(w.value for w in layer.trainable_weights)]
    return y, tape.gradient(y, sources, tf.cast(dy, y.dtype)), layer.get_weights()


def assert_same_step(layers, x, dy, rtol, **call):
    (y, gradients, weights), ours = (
        step(layer, tf.cast(x, layer.compute_dtype), dy, **call) for layer in layers
    )
    assert ours[0].dtype == layers[1].compute_dtype
    flat = [y, *gradients, *weights], [ours[0], *ours[1], *ours[2]]
    for theirs, mine in zip(*flat, strict=True):
        theirs, mine = (np.asarray(tf.cast(v, tf.float64)) for v in (theirs, mine))
        scale = max(1.0, np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=rtol * scale)


@st.composite
def options(draw):
    shape = [draw(st.integers(2, 5)) for _ in range(draw(st.integers(2, 5)))]
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    config = {
        "axis": axis,
        "momentum": draw(st.sampled_from([0.0, 0.3, 0.99, 1.0])),
        "epsilon": draw(st.sampled_from([1e-3, 0.1])),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "synchronized": draw(st.booleans()),
        "trainable": draw(st.sampled_from([True, True, True, False])),
        "dtype": draw(
            st.sampled_from(["float32", "float32", "float64", "mixed_float16", "mixed_bfloat16"])
        ),
    }
    if HAS_RENORM and draw(st.booleans()):
        config["renorm"] = True
        config["renorm_momentum"] = draw(st.sampled_from([0.5, 0.99]))
        clipping = {"rmax": 1.2, "rmin": 0.9, "dmax": 0.3}
        keys = draw(st.sets(st.sampled_from(sorted(clipping))))
        config["renorm_clipping"] = draw(st.sampled_from([None, {k: clipping[k] for k in keys}]))
    call = {"training": draw(st.booleans())}
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    if axis in (-1, len(shape) - 1) and draw(st.booleans()):
        mask = rng.random(shape[:-1]) < 0.7
        mask.flat[0] = True
        call["mask"] = mask
    return shape, config, call, rng.normal(1, 2, shape), rng.normal(size=shape)


@settings(max_examples=80)
@given(options())
def test_same_step_as_keras(drawn):
    shape, config, call, x, dy = drawn
    layers = pair(shape, **config)
    dtype = keras.dtype_policies.get(config["dtype"]).compute_dtype
    # Keras rounds twice, ours once; Keras's masked mean is off by 1e-7 / count.
    rtol = {"float64": 2e-6, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    if dtype == "float32":
        # Keras computes E[x^2] - E[x]^2, which is precise enough in float64.
        layers[0] = pair(shape, **config | {"dtype": "float64"})[0]
    assert_same_step(layers, tf.cast(tf.constant(x), dtype), dy, rtol, **call)


@pytest.mark.quick(2)
@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((16, 7, 7, 8), -1), ((16, 8, 7, 7), 1), ((256, 16), -1)]
)
def test_same_step_as_keras_in_functions(shape, axis, jit_compile):
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(0.5, 2, shape), tf.float32) for _ in range(2))
    results = []
    for layer in pair(shape, axis=axis):

        @tf.function(jit_compile=jit_compile)
        def train(x, dy, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

        results.append([*tf.nest.flatten(train(x, dy)), *layer.get_weights()])
    for theirs, mine in zip(*results, strict=True):
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.quick(2)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
@pytest.mark.parametrize("ratio", [10, 1e4])
def test_statistics_far_from_zero(mode, synchronized, dtype, ratio):
    rng = np.random.default_rng(0)
    layer = OURS(momentum=0.0, epsilon=1e-3, synchronized=synchronized, dtype=dtype)
    layer.build((None, None, None, 4))
    x = tf.cast(rng.normal(ratio, 1, (16, 20, 20, 4)), layer.compute_dtype)
    dy = tf.cast(rng.normal(1, 1, x.shape), layer.compute_dtype)

    def train(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, layer.gamma.value], dy)

    if mode != "eager":
        train = tf.function(train, jit_compile=mode == "xla")
    dx, dgamma = train(x, dy)

    x, dy = (np.asarray(v, np.float64) for v in (x, dy))
    axes = (0, 1, 2)
    mean, variance = x.mean(axes), x.var(axes)
    # float16 values of 1e4 are 8 apart: a channel may be constant.
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-6, atol=1e-6)
    v = (x - mean) / np.sqrt(variance + 1e-3)
    right = dy - dy.mean(axes) - v * (dy * v).mean(axes)
    right /= np.sqrt(variance + 1e-3)
    # dx has the compute dtype and its rounding.
    tolerance = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(dx, right, rtol=0, atol=tolerance * np.abs(right).max())
    expected = (dy * v).sum(axes)
    np.testing.assert_allclose(dgamma, expected, rtol=0, atol=tolerance * x.size / 4)


def poisoned():
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype("float32")
    yield "nan", np.where(np.arange(90).reshape(x.shape) == 7, np.nan, x), None
    yield "inf", np.where(np.arange(90).reshape(x.shape) == 7, np.inf, x), None
    yield "too large to square", x * 1e30, None
    yield "empty", x[:0], None
    yield "masked everywhere", x, np.zeros((6, 5), bool)


NEEDS_RENORM = pytest.mark.skipif(not HAS_RENORM, reason="this version of Keras has no renorm")


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("renorm", "jit_compile"),
    [(False, None), (False, True), pytest.param(True, None, marks=NEEDS_RENORM)],
)
@pytest.mark.parametrize(
    ("x", "mask"), [pytest.param(x, mask, id=name) for name, x, mask in poisoned()]
)
def test_moving_statistics_are_never_poisoned(x, mask, renorm, jit_compile):
    layer = OURS(**({"renorm": True} if renorm else {}))
    layer.build(x.shape)
    good = np.random.default_rng(1).normal(3, 2, (6, 5, 3)).astype("float32")
    train = tf.function(lambda x: layer(x, training=True, mask=mask), jit_compile=jit_compile)
    train(good) if mask is None else layer(good, training=True)
    before = layer.get_weights()
    y = train(x)
    assert y.shape == x.shape
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    # The next good batch counts.
    layer(good, training=True)
    assert np.all(layer.moving_mean != before[2])


def test_statistics_too_large_for_the_variables_do_not_poison_them():
    layer = OURS(autocast=False)
    x = np.random.default_rng(0).normal(size=(8, 3))
    layer(tf.constant(x * 1e25), training=True)
    np.testing.assert_array_equal(layer.moving_variance, [1, 1, 1])
    np.testing.assert_array_equal(layer.moving_mean, [0, 0, 0])


def test_one_value_per_channel_counts():
    layer = OURS(momentum=0.5)
    y = layer(tf.fill([1, 3], 4.0), training=True)
    np.testing.assert_array_equal(y, [[0, 0, 0]])
    np.testing.assert_array_equal(layer.moving_mean, [2, 2, 2])
    np.testing.assert_array_equal(layer.moving_variance, [0.5, 0.5, 0.5])


def test_mask_of_wrong_rank_is_refused():
    with pytest.raises(ValueError, match=r"Received: mask\.shape=\(2, 3, 4\)"):
        OURS()(np.ones((2, 3, 4)), mask=np.ones((2, 3, 4)))
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)  # Without an axis for channels.
    layer = OURS(momentum=0.0)
    layer(x, mask=mask, training=True)
    np.testing.assert_allclose(layer.moving_mean, x[mask].mean(0), rtol=1e-5)


def test_integers_are_normalized_too():
    x = np.array([[1, 2], [3, 5], [4, 7]])
    y = OURS(autocast=False)(tf.constant(x), training=True)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
def test_large_integers_are_not_cast_to_half_precision(policy, training):
    """Integers may overflow half precision."""
    x = np.random.default_rng(0).integers(0, 200000, (300, 3))
    layer = OURS(momentum=0.0, dtype=policy)
    layer(tf.constant(x), training=True)
    y = layer(tf.constant(x), training=training)
    assert y.dtype == layer.compute_dtype
    np.testing.assert_allclose(layer.moving_variance, x.var(0), rtol=1e-6)
    right = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    np.testing.assert_allclose(y, right, atol=2e-3 if "16" in policy else 2e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"renorm": True}])
@pytest.mark.parametrize("training", [False, True])
def test_number_of_channels_unknown_while_tracing(axis, options, training, jit_compile):
    if not HAS_RENORM and "renorm" in options:
        pytest.skip("this version of Keras has no renorm")
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(3, 2, (8, 5, 5)), tf.float32) for _ in range(2))
    unknown = tf.function(input_signature=[tf.TensorSpec([None] * 3)] * 2, jit_compile=jit_compile)
    results = []
    # Keras's layer supports it only with the channels last.
    for layer, compiled in zip(pair(x.shape, axis=axis, **options), (None, unknown), strict=True):

        def run(x, dy, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
            return y, tape.gradient(y, x, dy)

        run = compiled(run) if compiled else run
        results.append([*run(x, dy), *layer.get_weights()])
    for theirs, mine in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_config_and_weights_equal_keras():
    given_options = {
        "axis": 1,
        "momentum": 0.8,
        "epsilon": 0.02,
        "center": False,
        "gamma_initializer": keras.initializers.RandomUniform(seed=3),
        "gamma_regularizer": keras.regularizers.L2(0.1),
        "gamma_constraint": "non_neg",
        "moving_variance_initializer": keras.initializers.Constant(2.0),
        "synchronized": True,
        "dtype": "mixed_float16",
        "name": "norm",
    }
    theirs, ours = KERAS(**given_options), OURS(**given_options)
    assert ours.get_config() == theirs.get_config()
    rebuilt = OURS.from_config(theirs.get_config())
    for layer in (theirs, ours, rebuilt):
        layer.build((None, 5, 6))
    for layer in (ours, rebuilt):
        assert [w.path for w in layer.weights] == [w.path for w in theirs.weights]
        assert [w.dtype for w in layer.weights] == [w.dtype for w in theirs.weights]
        for mine, right in zip(layer.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, right)
    assert isinstance(ours, KERAS)


def network(layer):
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(4, 3, use_bias=False, name="conv"),
            layer(name="first"),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            layer(name="second", scale=False),
            keras.layers.Dense(3, name="dense"),
        ]
    )


@pytest.mark.parametrize(("source", "target"), [(KERAS, OURS), (OURS, KERAS)])
@pytest.mark.parametrize("way", ["model.keras", "model.weights.h5", "get_weights"])
def test_weights_are_exchangeable_with_keras(source, target, way, tmp_path):
    model, other = network(source), network(target)
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    if way == "get_weights":
        other.set_weights(model.get_weights())
    else:
        save = model.save if way.endswith(".keras") else model.save_weights
        save(tmp_path / way)
        other.load_weights(tmp_path / way)
    x = rng.normal(size=(4, 8, 8, 2))
    np.testing.assert_allclose(other(x), model(x), rtol=1e-4, atol=1e-5)
    for mine, right in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, right)


def test_saved_model_loads_by_registered_name(tmp_path):
    model = network(OURS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("first")) is OURS
    x = np.ones((2, 8, 8, 2))
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_gives_the_same_weights_as_keras(jit_compile):
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 3, (96, 8, 8, 2)), rng.integers(0, 3, 96)
    keras.utils.set_random_seed(0)
    initial = network(KERAS).get_weights()
    trained = []
    for layer in (KERAS, OURS):
        model = network(layer)
        model.set_weights(initial)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
        # 96 = 2 * 40 + 16: the last batch is smaller.
        model.fit(x, y, batch_size=40, epochs=2, shuffle=False, verbose=0)
        trained.append(model.get_weights())
    for start, theirs, ours in zip(initial, *trained, strict=True):
        assert np.abs(theirs - start).max() > 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("axis", [-1, 1])
def test_convolution_and_activation_are_fused(axis):
    """TensorFlow's graph optimizer fuses all three, with the channels last."""
    layer, kernel = OURS(axis=axis), tf.ones((3, 3, 2, 6))
    layer.build((None, 6, 6, 6))

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 2))])
    def infer(x):
        # The optimizer fuses operations that are placed on a CPU.
        with tf.device("CPU:0"):
            return tf.nn.relu6(layer(tf.nn.conv2d(x, kernel, 1, "VALID"), training=False))

    graph = infer.get_concrete_function().graph
    meta = tf.compat.v1.train.export_meta_graph(graph_def=graph.as_graph_def(), graph=graph)
    meta.collection_def["train_op"].node_list.value.append(graph.outputs[0].name)
    config = tf.compat.v1.ConfigProto()
    # The optimizer skips small graphs by default.
    config.graph_options.rewrite_options.min_graph_nodes = -1
    names = {node.op for node in OptimizeGraph(config, meta).node}
    apart = {"Conv2D", "Relu6"}
    assert names & {"_FusedConv2D", *apart} == ({"_FusedConv2D"} if axis == -1 else apart)


def test_subclass_that_calls_super():
    class Doubled(OURS):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    np.testing.assert_allclose(Doubled()(x, training=True), 2 * OURS()(x, training=True))


def test_statistics_do_not_change_in_inference_or_when_frozen():
    layer = OURS()
    layer.build((None, 3))
    x = np.random.default_rng(0).normal(5, 2, (8, 3)).astype("float32")
    before = layer.get_weights()
    layer(x)
    layer(x, training=False)
    layer.trainable = False
    np.testing.assert_allclose(layer(x, training=True), x / np.sqrt(1.001), rtol=1e-5)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_one_trace_serves_all_batch_and_image_sizes():
    traces = []
    layer = OURS()
    layer.build((None, None, None, 3))

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3))])
    def train(x):
        traces.append(1)
        return layer(x, training=True)

    for shape in [(1, 1, 1, 3), (4, 5, 6, 3), (0, 5, 6, 3), (70, 2, 1, 3)]:
        assert train(tf.ones(shape)).shape == shape
    assert len(traces) == 1


SYNCHRONIZED = """
    import numpy as np, tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
    import tfbn

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
    rng = np.random.default_rng(0)
    for far in (0, 1e4):
        # Replicas with different statistics, of different sizes, one without any value.
        sizes, centres = (5, 2, 0), (far, far + 3, 0)
        xs = [rng.normal(c, 1, (n, 3, 4)).astype("float32") for n, c in zip(sizes, centres)]
        dys = [rng.normal(1, 1, x.shape).astype("float32") for x in xs]
        with strategy.scope():
            layer = tfbn.BatchNormalization(synchronized=True, momentum=0.0)
            layer.build((None, 3, 4))

        @tf.function
        def step(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, *tape.gradient(y, [x, layer.gamma.value], dy)

        def spread(values):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(values[context.replica_id_in_sync_group])
            )

        outputs = strategy.run(step, (spread(xs), spread(dys)))
        y, dx, dgamma = (strategy.experimental_local_results(v) for v in outputs)

        x, dy = (np.concatenate(v).astype("float64") for v in (xs, dys))
        mean, variance = x.mean((0, 1)), x.var((0, 1))
        v = (x - mean) / np.sqrt(variance + 1e-3)
        right = (dy - dy.mean((0, 1)) - v * (dy * v).mean((0, 1))) / np.sqrt(variance + 1e-3)
        np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.concatenate(y), v, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(dx), right, atol=1e-5)
        np.testing.assert_allclose(sum(dgamma), (dy * v).sum((0, 1)), atol=1e-4)
    print("all equal")
"""


@pytest.mark.slow
def test_synchronized_replicas_equal_one_device_on_the_joined_batch():
    # Another process: logical devices must be set before TensorFlow is used.
    command = [sys.executable, "-c", textwrap.dedent(SYNCHRONIZED)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "all equal" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "values", [10**6, pytest.param(2 * 10**7, marks=pytest.mark.slow, id="twenty millions")]
)
@pytest.mark.parametrize("gpu_visible", [False, True])
def test_many_values_per_channel_on_the_cpu(values, gpu_visible, monkeypatch):
    monkeypatch.setattr(kernels, "_gpu_visible", lambda: gpu_visible)
    x = np.random.default_rng(0).normal(3, 1, size=(values, 1)).astype("float32")
    layer = tfbn.BatchNormalization(momentum=0.0)
    layer.build(x.shape)
    tf.function(lambda x: layer(x, training=True)[:1])(tf.constant(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(layer.moving_variance.numpy(), exact.var(0), rtol=1e-4)
    np.testing.assert_allclose(layer.moving_mean.numpy(), exact.mean(0), rtol=1e-6)


def test_synchronized_layer_trains_outside_of_replicas(two_devices):
    x = np.random.default_rng(0).normal(2, 3, (16, 4)).astype("float32")
    with two_devices.scope():
        layer = OURS(momentum=0.0, synchronized=True)
        y = layer(x, training=True)
        networks.assert_layer(layer, x.mean(0), x.var(0))
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + layer.epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def one_by_one(layer, x, training):
    """Return outputs and gradients of sum(y^3) by x and gamma, for each element of x separately."""
    rows = []
    for element in x:
        with tf.GradientTape() as tape:
            tape.watch(element)
            y = layer(element, training=training)
            loss = tf.reduce_sum(y**3)
        rows.append([y, *tape.gradient(loss, [element, layer.gamma.value])])
    return [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.quick(4)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("shape", "axis"), [((8, 3), -1), ((8, 5, 5, 3), -1), ((8, 3, 4, 4), 1)])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
def test_vectorized_map(policy, shape, axis, mean, training):
    layer, oracle = OURS(axis=axis, dtype=policy), KERAS(axis=axis, dtype="float64")
    x = tf.constant(np.random.default_rng(0).normal(mean, 2, (3, *shape)), layer.compute_dtype)
    for one in (layer, oracle):
        one.build(shape)

    def of_one(element):
        with tf.GradientTape() as tape:
            tape.watch(element)
            y = layer(element, training=training)
            loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 3)
        return [y, *tape.gradient(loss, [element, layer.gamma.value])]

    results = tf.vectorized_map(of_one, x, fallback_to_while_loop=False)
    expected = one_by_one(oracle, tf.cast(x, tf.float64), training)
    # Tolerance: units in the last place of the inputs, in std; the gradients are cubic.
    rtol = {"float32": 1e-4, "float64": 1e-9, "mixed_float16": 0.01, "mixed_bfloat16": 0.08}[policy]
    for ours, theirs in zip(results, expected, strict=True):
        ours = np.asarray(tf.cast(ours, tf.float64))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


@pytest.mark.parametrize("training", [True, False])
def test_vectorized_map_over_models(training):
    """Run an ensemble: each element has different weights and statistics."""
    layer = OURS()
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(2, 3, (4, 8, 3)), tf.float32)
    layer.build((8, 3))
    gamma, beta, mean, variance = (
        tf.constant(rng.uniform(0.5, 2, (4, 3)), tf.float32) for _ in range(4)
    )

    @tf.function
    def of_one(member):
        x, trainable, fixed = member
        return layer.stateless_call(trainable, fixed, x, training=training)

    members = (x, [gamma, beta], [mean, variance])
    y, (new_mean, _) = tf.vectorized_map(of_one, members, fallback_to_while_loop=False)

    x, gamma, beta, mean, variance = (np.float64(v) for v in (x, gamma, beta, mean, variance))
    moments = (x.mean(1), x.var(1)) if training else (mean, variance)
    m, v = (value[:, np.newaxis] for value in moments)
    expected = gamma[:, np.newaxis] * (x - m) / np.sqrt(v + layer.epsilon) + beta[:, np.newaxis]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    moved = 0.99 * mean + 0.01 * x.mean(1) if training else mean
    np.testing.assert_allclose(new_mean, moved, rtol=1e-5)
