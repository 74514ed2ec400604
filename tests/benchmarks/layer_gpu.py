"""The layer's step under XLA on a GPU: what XLA compiles it to, and its time.

    python tests/benchmarks/layer_gpu.py compile    # needs no GPU

prints for NVIDIA GPUs how many passes over memory and how many kernels a training step has, as XLA
compiles it (the extra `gpu-compile`; see `tests/gpu_compiler.py`): whole, as in `fit` on one GPU,
and in a graph that XLA does not compile, as under a strategy. The floor is 8 passes.

TensorFlow need not run where the GPU is. In two steps:

    python tests/benchmarks/layer_gpu.py export DIRECTORY    # with TensorFlow and tfbn
    python tests/benchmarks/layer_gpu.py run DIRECTORY       # with jax for the GPU alone

The first writes the HLO of the training and inference steps of tfbn's and Keras's layer; the second
compiles and times it. It prints, for each shape, the time, and the time over the memory floor: the
bytes that must move (in training x twice and y once forward, x and dy twice and dx once backward;
in inference x and y) over the bandwidth of a copy, measured in the same run.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

SHAPES = [(32, 56, 56, 64), (32, 14, 14, 256), (4096, 256), (256, 56, 56, 64), (65536, 1024)]
DTYPES = ["float32", "bfloat16"]
TENSORS_MOVED = {"train": 8, "infer": 2}


def steps_of():
    """The module that makes the steps. It imports TensorFlow."""
    import gpu_compiler

    return gpu_compiler


def layer(steps, name, dtype):
    return steps.LAYERS[name](dtype=dtype if dtype == "float32" else f"mixed_{dtype}")


def compile_steps(shapes, dtypes, gpus):
    steps = steps_of()
    for shape in shapes:
        for dtype in dtypes:
            whole = {n: steps.whole_step(layer(steps, n, dtype), shape) for n in steps.LAYERS}
            clusters = steps.cluster_steps(layer(steps, "tfbn", dtype), shape).values()
            operations = steps.operations_of(layer(steps, "keras", dtype), shape)
            for gpu in gpus:
                actual = {name: steps.kernels_of(hlo, gpu) for name, hlo in whole.items()}
                actual["keras, in a graph"] = operations
                actual["tfbn, in a graph"] = [
                    kernel for hlo in clusters for kernel in steps.kernels_of(hlo, gpu)
                ]
                cells = [
                    f"{name} {steps.passes(kernels, shape, dtype):.2f} / {len(kernels)}"
                    for name, kernels in actual.items()
                ]
                print(f"{gpu} {'x'.join(map(str, shape))} {dtype}: {', '.join(cells)}", flush=True)


def export(directory, shapes, dtypes):
    steps = steps_of()
    make = {"train": steps.whole_step, "infer": steps.inference_step}
    for shape in shapes:
        for dtype in dtypes:
            for name in steps.LAYERS:
                for kind in make:
                    hlo = make[kind](layer(steps, name, dtype), shape)
                    size = "x".join(map(str, shape))
                    (directory / f"{size}-{dtype}-{kind}-{name}.hlo").write_bytes(hlo)
    print(f"{len(list(directory.iterdir()))} files in {directory}")


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
    from portable_hlo import portable

    rng = np.random.default_rng(0)
    arrays = [
        # No negative values: the moving variance is among them.
        jax.numpy.asarray(rng.uniform(0.5, 1.5, shape.dimensions()), shape.numpy_dtype())
        for shape in xla_client.XlaComputation(hlo).program_shape().parameter_shapes()
    ]
    client = jax.devices()[0].client
    devices = xla_client.DeviceList((jax.devices()[0],))
    executable = client.compile_and_load(portable(hlo), devices)
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
    """A shape in command-line notation."""
    return tuple(map(int, text.split("x")))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "export", "run"])
    parser.add_argument("directory", type=pathlib.Path, nargs="?")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, help="as 32x8x8x16")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--gpus", nargs="+", default=["H200", "H100", "A100"])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.action == "compile":
        return compile_steps(arguments.shapes, arguments.dtypes, arguments.gpus)
    if arguments.directory is None:
        parser.error(f"{arguments.action} needs a directory")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.action == "export":
        return export(arguments.directory, arguments.shapes, arguments.dtypes)
    return run(arguments.directory, arguments.repeats)


if __name__ == "__main__":
    main()
