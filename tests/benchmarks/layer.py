"""Time of tfbn's layer beside Keras's, PyTorch's and the physical floor, on the CPU; a script.

A training step is forward, backward and the update of the moving statistics. The floor is what
memory allows. A training step reads the input twice and writes the output, and reads input and
gradient twice and writes the input's gradient, which is 8 passes over a tensor; inference is 2.
`tf.add` on the same tensors is 3. So the floor is 8/3 and 2/3 of its time.

All contenders take turns within a run, since the speed of a shared machine drifts, and a figure is
the ratio of medians of a run, printed as the range over runs. CPU time is that of all threads
together: on a machine that others use too it says more than the time on the clock. With PyTorch
installed, its batch norm (channels last) takes its turns too.

The last table is the first training step of a network, tracing included, of a process each.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time

import keras
import tensorflow as tf

import tfbn

LAYERS = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}
SHAPES = [(32, 56, 56, 64), (32, 14, 14, 256), (4096, 256)]
PASSES = {"train": 8, "infer": 2}
CLOCKS = {"clock": time.perf_counter, "CPU": time.process_time}


def training_step(layer, shape, **options):
    layer.build((None, *shape[1:]))

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        # y is among the results, or the graph's optimizers would leave it out.
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    return compiled(step, shape, 2, **options)


def inference_step(layer, shape, **options):
    layer.build((None, *shape[1:]))
    return compiled(lambda x: layer(x, training=False), shape, 1, **options)


def compiled(step, shape, inputs, **options):
    signature = [tf.TensorSpec((None, *shape[1:]), tf.float32)] * inputs
    return tf.function(step, input_signature=signature, autograph=False, **options)


def torch_steps(shape):
    """PyTorch's training and inference steps on data of the same shape, or none without it."""
    try:
        import torch
    except ImportError:
        return {}
    layer = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(shape[-1])
    x = torch.randn(shape[0], shape[-1], *shape[1:-1])
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x)

    def train():
        leaf = x.detach().requires_grad_()
        layer.train()
        layer(leaf).backward(dy)

    def infer():
        layer.eval()
        with torch.no_grad():
            layer(x)

    return {"train": train, "infer": infer}


def interleaved(steps, repeats):
    """Median milliseconds of each step by each clock, the steps taking turns."""
    times = {name: [] for name in steps}
    for repeat in range(repeats + 3):
        for name, step in steps.items():
            start = [clock() for clock in CLOCKS.values()]
            step()
            if repeat >= 3:
                stop = [clock() for clock in CLOCKS.values()]
                times[name].append([1e3 * (b - a) for a, b in zip(start, stop, strict=True)])
    return {
        name: dict(zip(CLOCKS, map(statistics.median, zip(*values, strict=True)), strict=True))
        for name, values in times.items()
    }


def contenders(shape, kind, options):
    """The steps to compare; all layers' are traced here, and their variables made anew."""
    x, dy = tf.random.normal(shape), tf.random.normal(shape)
    make, inputs = {"train": (training_step, (x, dy)), "infer": (inference_step, (x,))}[kind]
    steps = {
        name: functools.partial(make(layer(), shape, **options), *inputs)
        for name, layer in LAYERS.items()
    }
    if not options and (torch := torch_steps(shape)):
        steps["torch"] = torch[kind]
    add = compiled(tf.add, shape, 2)
    steps["add"] = functools.partial(add, x, dy)
    return steps


def compare(shapes, repeats, runs):
    for shape in shapes:
        for mode, options in {"graph": {}, "XLA": {"jit_compile": True}}.items():
            for kind, passes in PASSES.items():
                steps = contenders(shape, kind, options)
                results = [interleaved(steps, repeats) for _ in range(runs)]
                size = "x".join(map(str, shape))
                for clock in CLOCKS:
                    line = []
                    for name in steps:
                        if name == "add":
                            continue
                        floor = ratios(results, clock, name, "add", 3 / passes)
                        line.append(f"{name} {floor} of the floor")
                    line.append(f"tfbn/keras {ratios(results, clock, 'tfbn', 'keras')}")
                    add = statistics.median(result["add"][clock] for result in results)
                    line.append(f"(add {add:.2f} ms)")
                    print(f"{size:12} {mode:5} {kind} {clock:5}  {'  '.join(line)}", flush=True)


def ratios(results, clock, name, base, factor=1.0):
    """The range over runs of the ratio of two contenders' times."""
    values = sorted(factor * result[name][clock] / result[base][clock] for result in results)
    return f"{values[0]:.2f}-{values[-1]:.2f}"


def first_step(name):
    """Seconds of the first training step of ResNet50 with one layer, by each clock."""
    keras.layers.BatchNormalization = LAYERS[name]
    # The application looks the layer up in Keras's own module.
    keras.src.layers.BatchNormalization = LAYERS[name]
    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)
    assert sum(type(layer) is LAYERS[name] for layer in model.layers) == 53
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    x, y = tf.random.normal((8, 64, 64, 3)), tf.zeros(8, tf.int32)
    for clock in CLOCKS.values():
        print(clock(), end=" ")
    model.train_on_batch(x, y)
    for clock in CLOCKS.values():
        print(clock(), end=" ")


def compare_first_steps(runs):
    results = []
    for _ in range(runs):
        result = {}
        for name in LAYERS:
            command = [sys.executable, __file__, "--first-step", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            values = [float(value) for value in output.split()]
            half = len(CLOCKS)
            seconds = [b - a for a, b in zip(values[:half], values[half:], strict=True)]
            result[name] = dict(zip(CLOCKS, seconds, strict=True))
        results.append(result)
    for clock in CLOCKS:
        median = statistics.median(result["keras"][clock] for result in results)
        ratio = ratios(results, clock, "tfbn", "keras")
        print(f"ResNet50, first step {clock:5}  tfbn/keras {ratio}  (keras {median:.1f} s)")


def shape_of(text):
    """A shape in command-line notation."""
    return tuple(map(int, text.split("x")))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, help="as 32x8x8x16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--first-step", choices=LAYERS, help="that of one layer alone")
    arguments = parser.parse_args()
    if arguments.first_step:
        return first_step(arguments.first_step)
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}"
    print(f"{versions}, {os.cpu_count()} cores; ratios, ranges over {arguments.runs} runs")
    compare(arguments.shapes, arguments.repeats, arguments.runs)
    return compare_first_steps(arguments.runs)


if __name__ == "__main__":
    main()
