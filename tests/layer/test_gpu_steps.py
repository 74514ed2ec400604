"""Memory passes and kernels of the steps that XLA compiles for GPUs, compared with Keras.

The compiled programs are counted; nothing here runs on a GPU. `gpu_compiler` defines the counts.
"""

import functools

import gpu_compiler
import pytest
import tensorflow as tf

from tfbn.layer import kernels
from tfbn.sweep import observation
from tfbn.sweep.state import Site

pytestmark = pytest.mark.gpu_compile

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(32, 56, 56, 64), (32, 14, 14, 256), (4096, 256)]
# Upper limits for tfbn's training step: passes and kernels. The minimum is 8 passes.
MOST = {shape: (8.1 if shape == SHAPES[0] else 8.35, 11) for shape in SHAPES}


def layer(name, dtype):
    return gpu_compiler.LAYERS[name](dtype=dtype if dtype == "float32" else f"mixed_{dtype}")


# The program does not depend on the GPU.
@functools.cache
def whole(name, shape, dtype):
    return gpu_compiler.whole_step(layer(name, dtype), shape)


@functools.cache
def clusters(shape, dtype):
    return gpu_compiler.cluster_steps(layer("tfbn", dtype), shape)


def counted(hlo, gpu, shape, dtype):
    kernels = gpu_compiler.kernels_of(hlo, gpu)
    return gpu_compiler.passes(kernels, shape, dtype), len(kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", gpu_compiler.GPUS)
def test_step_compiled_by_xla_is_near_the_floor(gpu, shape, dtype):
    passes, kernels = counted(whole("tfbn", shape, dtype), gpu, shape, dtype)
    assert 8 <= passes <= MOST[shape][0] and kernels <= MOST[shape][1]
    keras_passes, _ = counted(whole("keras", shape, dtype), gpu, shape, dtype)
    assert passes <= keras_passes - 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", gpu_compiler.GPUS)
def test_compiled_clusters_exchange_only_small_tensors(gpu, shape, dtype):
    steps = clusters(shape, dtype)
    assert sorted(steps) == ["backward", "forward"]
    forward, backward = (
        counted(steps[name], gpu, shape, dtype) for name in ("forward", "backward")
    )
    # One more result of the size of x costs one pass, or two in half precision.
    assert 3 <= forward[0] <= 3.2 and 5 <= backward[0] <= 5.2
    assert forward[0] + backward[0] <= MOST[shape][0]
    assert forward[1] + backward[1] <= MOST[shape][1]
    keras = gpu_compiler.operations_of(layer("keras", dtype), shape)
    assert gpu_compiler.passes(keras, shape, dtype) >= 20


@pytest.mark.parametrize(
    ("step", "passes", "kernels"),
    [
        (lambda x: -x, 2, 1),
        (lambda x: (x + 1, x - 1), 3, 1),
        (lambda x: tf.reduce_sum(x, 0), 1, 1),
        # Read for the sums, then read and written.
        (lambda x: x - tf.reduce_sum(x, 0), 3, 2),
        (lambda x: -x[::64], 2 / 64, 1),
    ],
)
def test_known_programs_are_counted_correctly(step, passes, kernels):
    shape = (64, 1024, 64)
    compiled = gpu_compiler.kernels_of(gpu_compiler.hlo_of(step, tf.zeros(shape)), "H200")
    assert gpu_compiler.passes(compiled, shape, "float32") == pytest.approx(passes, abs=0.05)
    assert len(compiled) == kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_a_sweep_are_one_pass(shape, dtype):
    x = tf.zeros(shape, dtype)
    with gpu_compiler.as_on_gpu():
        [flat], measure = observation._measured(-1, x)
        hlo = gpu_compiler.hlo_of(measure, flat)
    passes, kernels = counted(hlo, "H200", shape, dtype)
    assert 1 <= passes <= 1.2 and kernels <= 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_and_normalization_of_a_batch_are_three_passes(shape, dtype):
    bn = layer("tfbn", dtype)
    bn.build(shape)

    def step(x):
        call = observation._observed(Site("bn", 0), bn, x, None, None)
        return *call.fetches, call.outputs

    x = tf.zeros(shape, dtype)
    with gpu_compiler.as_on_gpu():
        [flat], measure = observation._measured(-1, x)
        moments = counted(gpu_compiler.hlo_of(measure, flat), "H200", shape, dtype)
        graph = tf.function(step, autograph=False).get_concrete_function(x).graph
        one_cluster = counted(gpu_compiler.hlo_of(step, x), "H200", shape, dtype)
    others = [op for op in gpu_compiler.operations_in(graph) if op.name != "PartitionedCall"]
    passes = moments[0] + gpu_compiler.passes(others, shape, dtype)
    # x is read for the moments, then read and written. Some of the kernels are folded.
    assert 3 <= passes <= 3.2 and moments[1] + len(others) <= 10
    # Compiling both as one function would not save a pass.
    assert passes - one_cluster[0] < 0.05 and one_cluster[1] <= 7


def test_inference_on_images_is_merged_with_a_relu():
    weights = [tf.ones(64)] * 4

    @tf.function(autograph=False)
    def step(x):
        return tf.nn.relu(kernels.normalize(-x, *weights, axis=-1, epsilon=1e-3))

    with gpu_compiler.as_on_gpu():
        function = step.get_concrete_function(tf.TensorSpec((32, 56, 56, 64)))
    types = gpu_compiler.optimized_for_gpu(function)
    assert "_FusedBatchNormEx" in types and "Relu" not in types
