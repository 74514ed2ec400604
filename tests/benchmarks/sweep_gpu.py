"""The sweep of ResNet-50 on one GPU, computed and not measured.

The traced network is cut as a sweep cuts it. An operation takes the longest of three times: its
bytes over the bandwidth, its multiplications over half of the peak rate, and a launch for each of
its kernels. Moments are compiled by XLA for the GPU (needs the extra `gpu-compile`), which gives
their bytes and kernels.

    python tests/benchmarks/sweep_gpu.py --images 2500 10000
"""

import argparse
import functools
import itertools
import math
import pathlib
import sys
from typing import NamedTuple

import keras
import tensorflow as tf

import tfbn
from tfbn.models.keras_models import batch_norm_layers
from tfbn.sweep import observation
from tfbn.sweep.network import Network

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import gpu_compiler

LAUNCH = 2.5e-6  # Seconds of a kernel that TensorFlow launches.
BUS = 50e9  # Bytes a second between main memory and the GPU, PCIe 5 with 16 lanes.
# Dense multiplications and additions a second, of which convolutions reach half.
PEAK = {"float32": 494e12, "mixed_bfloat16": 989e12}  # float32 in TF32.
FREE = {"Reshape", "Identity", "Shape", "Placeholder", "NoOp", "Const", "ReadVariableOp"}


class Cost(NamedTuple):
    """Seconds of a part of the network for one batch, and bytes of its frontier."""

    seconds: float
    frontier: int


def size(tensor):
    """Bytes of a tensor."""
    return tensor.dtype.size * (tensor.shape.num_elements() or 0)


def seconds(op, bandwidth, peak):
    """The time of an operation."""
    if op.type in FREE:
        return 0.0
    moved = sum(map(size, (*op.inputs, *op.outputs)))
    multiplied = 0
    if op.type == "Conv2D":
        kernel, positions = op.inputs[1].shape, op.outputs[0].shape[:-1].num_elements()
        multiplied = 2 * positions * math.prod(kernel)
    return max(moved / bandwidth, 2 * multiplied / peak, LAUNCH)


@functools.cache
def moments(shape, dtype, gpu):
    """The time of the moments of a layer."""
    with gpu_compiler.as_on_gpu():
        [flat], measure = observation._measured(-1, tf.zeros(shape, dtype))
        kernels = gpu_compiler.kernels_of(gpu_compiler.hlo_of(measure, flat), gpu)
    moved = sum(kernel.read + kernel.written for kernel in kernels)
    return max(moved / gpu_compiler.GPUS[gpu]["bandwidth"], len(kernels) * LAUNCH)


def traced(model, batch):
    """The trace of a sweep for a GPU."""
    with gpu_compiler.as_on_gpu():
        network = Network(model, batch_norm_layers(model))
        return network.trace(tf.zeros(batch), settled=True, static=True)


def segments(trace, gpu, peak):
    """A `Cost` for each level."""
    cost = [0.0] * (trace.cut.depth + 1)
    for op, level in trace.cut.run_at.items():
        cost[level] += seconds(op, gpu_compiler.GPUS[gpu]["bandwidth"], peak)
    frontiers = [sum(map(size, tensors)) for tensors in trace.cut.frontiers]
    return [Cost(*pair) for pair in zip(cost[1:], frontiers[1:], strict=True)]


def training(trace, gpu, peak):
    """A step: three times the convolutions, 5 passes an activation, 8 a batch norm layer."""
    bandwidth = gpu_compiler.GPUS[gpu]["bandwidth"]
    total = 0.0
    for op in trace.graph.get_operations():
        if op.type == "Conv2D":
            total += 3 * seconds(op, bandwidth, peak)
        elif op.type in ("Relu", "AddV2"):
            total += 5 * size(op.outputs[0]) / bandwidth
    for call in trace.calls:
        total += max(8 * size(call.inputs[0]) / bandwidth, 11 * LAUNCH)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=gpu_compiler.GPUS, default="H200")
    parser.add_argument("--images", type=int, nargs="+", default=[2500, 10000])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    batch = (options.batch_size, options.size, options.size, 3)
    for policy, peak in PEAK.items():
        keras.config.set_dtype_policy(policy)
        model = tfbn.convert(
            keras.applications.ResNet50(weights=None, input_shape=batch[1:], classes=10)
        )
        trace = traced(model, batch)
        levels = segments(trace, options.gpu, peak)
        forward = sum(level.seconds for level in levels)
        step = training(trace, options.gpu, peak)
        measured = sum(
            moments(tuple(tensor.shape), tensor.dtype, options.gpu)
            for call in trace.calls
            for tensor in call.inputs
        )
        kept = max(level.frontier for level in levels)
        # Of each level: with the frontier before it in main memory, and from the batch.
        before = [0, *(level.frontier for level in levels)]
        from_main = [lv.seconds + 2 * size / BUS for lv, size in zip(levels, before, strict=False)]
        again = list(itertools.accumulate(level.seconds for level in levels))
        print(f"{options.gpu}, {policy}, ms for a batch of {options.batch_size}:")
        print(f"  predict {1e3 * forward:.2f}, a step of training {1e3 * step:.2f}")
        print(f"  moments of {len(trace.calls)} layers {1e3 * measured:.2f}")
        print(f"  sweep, frontiers on the GPU {1e3 * (forward + measured):.2f}")
        better = sum(map(min, from_main, again))
        print(f"  sweep, frontiers in main memory {1e3 * (sum(from_main) + measured):.2f}")
        print(f"  sweep, {len(levels)} levels computed again {1e3 * (sum(again) + measured):.2f}")
        print(f"  sweep, the better of the two at each level {1e3 * (better + measured):.2f}")
        print(f"  the largest frontier {kept / 2**20:.0f} MiB")
        for images in options.images:
            batches = math.ceil(images / options.batch_size)
            share = min(gpu_compiler.GPUS[options.gpu]["memory"] / 2 / (batches * kept), 1)
            sweep = batches * (share * forward + (1 - share) * better + measured)
            print(
                f"  {images} images, {100 * share:.0f} % of the frontiers on the GPU: sweep "
                f"{sweep:.2f} s, predict {batches * forward:.2f} s, an epoch of training "
                f"{batches * step:.2f} s"
            )


if __name__ == "__main__":
    main()
