"""Time of the layer's step under XLA on an accelerator, beside what memory allows.

    python tests/benchmarks/layer_gpu.py count

counts, without an accelerator, how often one training step reads and writes a tensor of the size
of the activation: from the traced graph, operation by operation, and from what XLA makes of it,
kernel by kernel. That is how it fuses for the CPU at hand, where it writes out what enters a
reduction; for a GPU it need not. The floor is 8.

TensorFlow need not run where the accelerator is. In two steps:

    python tests/benchmarks/layer_gpu.py export DIRECTORY    # with TensorFlow and tfbn
    python tests/benchmarks/layer_gpu.py run DIRECTORY       # with jax for the accelerator alone

The first writes the HLO of the traced training and inference steps of tfbn's and Keras's layer;
the second compiles and times it. It prints, for each shape, the time, and the time over the memory
floor: the bytes that must move (in training x twice and y once forward, x and dy twice and dx once
backward; in inference x and y) over the bandwidth of a copy, measured in the same run.
"""

import argparse
import functools
import math
import pathlib
import re
import statistics
import time

SHAPES = [(32, 56, 56, 64), (256, 56, 56, 64), (32, 14, 14, 256), (4096, 256), (65536, 1024)]
DTYPES = ["float32", "mixed_bfloat16"]
# Bytes of the dtypes that HLO names.
SIZES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1}
TENSORS_MOVED = {"train": 8, "infer": 2}


def export(directory, shapes):
    import keras
    import tensorflow as tf

    import tfbn

    for shape in shapes:
        for dtype in DTYPES:
            for name, make in [
                ("keras", keras.layers.BatchNormalization),
                ("tfbn", tfbn.BatchNormalization),
            ]:
                layer = make(dtype=dtype)
                layer.build((None, *shape[1:]))
                x = tf.zeros(shape, layer.compute_dtype)
                for kind, step, inputs in [
                    ("train", functools.partial(train, layer), (x, x)),
                    ("infer", functools.partial(infer, layer), (x,)),
                ]:
                    function = tf.function(step, jit_compile=True, autograph=False)
                    hlo = function.experimental_get_compiler_ir(*inputs)("hlo_serialized")
                    size = "x".join(map(str, shape))
                    file = directory / f"{size}-{dtype}-{kind}-{name}.hlo"
                    file.write_bytes(hlo)
    print(f"{len(list(directory.iterdir()))} files in {directory}")


def train(layer, x, dy):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)


def infer(layer, x):
    return layer(x, training=False)


def count(shape):
    import keras
    import tensorflow as tf

    import tfbn

    layers = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}
    for dtype in DTYPES:
        for name, make in layers.items():
            layer = make(dtype=dtype)
            layer.build((None, *shape[1:]))
            x = tf.zeros(shape, layer.compute_dtype)
            step = functools.partial(train, layer)
            whole = x.dtype.size * math.prod(shape)
            compiled = tf.function(step, jit_compile=True, autograph=False)
            hlo = compiled.experimental_get_compiler_ir(x, x)("optimized_hlo")
            passes = {"compiled by XLA": passes_of_hlo(hlo, whole)}
            if name == "keras":
                graph = tf.function(step, autograph=False).get_concrete_function(x, x).graph
                passes["operation by operation"] = passes_of_graph(graph, whole)
            for way, number in passes.items():
                print(f"{'x'.join(map(str, shape))} {dtype:14} {name:5} {way}: {number:.1f}")


def passes_of_graph(graph, whole):
    """Bytes that the operations of a graph read and write, over those of the activation."""
    free = {"Reshape", "Identity", "IdentityN", "StopGradient", "Shape", "Placeholder", "NoOp"}
    total = 0
    for operation in graph.get_operations():
        if operation.type not in free:
            for tensor in [*operation.inputs, *operation.outputs]:
                total += tensor.dtype.size * (tensor.shape.num_elements() or 0)
    return total / whole


def passes_of_hlo(text, whole):
    """Bytes that the kernels of a compiled module read and write, over those of the activation."""
    free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    entry = text[text.index("\nENTRY") :]
    entry = entry[: entry.index("\n}")]
    sizes, total = {}, 0
    for line in entry.splitlines():
        if " = " not in line:
            continue
        name, right = line.replace("ROOT ", "").strip().lstrip("%").split(" = ", 1)
        kind, operands = re.search(r" ([a-z][a-z-]*)\(([^)]*)\)", right).groups()
        made = right[: right.index(f" {kind}(")]
        sizes[name] = sum(
            SIZES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"([a-z0-9]+)\[([0-9,]*)\]", made)
        )
        if kind not in free:
            names = re.findall(r"%?([\w.-]+)(?:,|$)", operands)
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in names)
    return total / whole


def run(directory, repeats):
    import jax

    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}")
    for size, dtype, kind in sorted({tuple(f.stem.split("-")[:3]) for f in directory.iterdir()}):
        steps, inputs = {}, {}
        for name in ("keras", "tfbn"):
            hlo = (directory / f"{size}-{dtype}-{kind}-{name}.hlo").read_bytes()
            steps[name], inputs[name] = compiled(hlo)
        x = max(inputs["tfbn"], key=lambda value: value.nbytes)
        steps["copy"], inputs["copy"] = jax.jit(lambda x: -x), [x]
        times = interleaved(steps, inputs, repeats)
        # A copy moves two tensors of the size of x.
        floor = times["copy"] / 2 * TENSORS_MOVED[kind]
        line = "  ".join(
            f"{name} {times[name]:7.3f} ms, {times[name] / floor:5.2f} x floor"
            for name in ("keras", "tfbn")
        )
        bandwidth = 2 * x.nbytes / times["copy"] / 1e6
        print(f"{size:14} {dtype:14} {kind}  {line}  copy {bandwidth:.0f} GB/s", flush=True)


def compiled(hlo):
    """A function for a serialized HLO module, and arrays for its parameters."""
    import jax
    import numpy as np

    # jax has no public way to run HLO that it did not make.
    from jax._src.lib import xla_client

    computation = xla_client.XlaComputation(hlo)
    rng = np.random.default_rng(0)
    arrays = [
        # No negative values: the moving variance is among them.
        jax.numpy.asarray(rng.uniform(0.5, 1.5, shape.dimensions()), shape.numpy_dtype())
        for shape in computation.program_shape().parameter_shapes()
    ]
    module = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    client = jax.devices()[0].client
    devices = xla_client._xla.DeviceList((jax.devices()[0],))
    executable = client.compile_and_load(module, devices)
    return lambda *inputs: executable.execute_sharded(list(inputs)), arrays


def interleaved(steps, inputs, repeats):
    """Median milliseconds of each step, the steps taking turns of several calls each."""
    import jax

    times = {name: [] for name in steps}
    calls = 10
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            # A step takes the moving statistics' buffers for its results, so each call has its own.
            prepared = [
                [value if value.ndim > 1 else jax.numpy.copy(value) for value in inputs[name]]
                for _ in range(calls)
            ]
            jax.block_until_ready(prepared)
            start = time.perf_counter()
            for arguments in prepared:
                results = step(*arguments)
            if hasattr(results, "disassemble_into_single_device_arrays"):
                results = results.disassemble_into_single_device_arrays()
            jax.block_until_ready(results)
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def shape_of(text):
    """A shape as the command line has it."""
    return tuple(map(int, text.split("x")))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["count", "export", "run"])
    parser.add_argument("directory", type=pathlib.Path, nargs="?")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, help="as 32x8x8x16")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.action == "count":
        return count(arguments.shapes[0])
    if arguments.directory is None:
        parser.error(f"{arguments.action} needs a directory")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.action == "export":
        return export(arguments.directory, arguments.shapes)
    return run(arguments.directory, arguments.repeats)


if __name__ == "__main__":
    main()
