"""Time of tfbn's layer over that of Keras's, on the CPU; run as a script.

Prints, for each shape and mode, the median milliseconds a step takes and the ratio of ours to
Keras's. A training step is forward, backward and the update of the moving statistics; all
contenders take turns within one run, since the speed of a shared machine drifts. With PyTorch
installed, its channels_last batch norm takes its turns too.
"""

import argparse
import functools
import statistics
import time

import keras
import tensorflow as tf

import tfbn

SHAPES = [(32, 56, 56, 64), (32, 14, 14, 256), (4096, 256)]


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
    """Median milliseconds of each step, the steps taking turns."""
    times = {name: [] for name in steps}
    for repeat in range(repeats + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    layers = {
        "keras": keras.layers.BatchNormalization,
        "tfbn": tfbn.BatchNormalization,
    }
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, milliseconds")
    for shape in SHAPES:
        x, dy = tf.random.normal(shape), tf.random.normal(shape)
        torch = torch_steps(shape)
        for mode, options in {"graph": {}, "XLA": {"jit_compile": True}}.items():
            for kind, make, inputs in [
                ("train", training_step, (x, dy)),
                ("infer", inference_step, (x,)),
            ]:
                steps = {}
                for name, layer in layers.items():
                    step = make(layer(), shape, **options)
                    steps[name] = functools.partial(step, *inputs)
                if mode == "graph" and torch:
                    steps["torch"] = torch[kind]
                times = interleaved(steps, repeats)
                ratio = times["tfbn"] / times["keras"]
                line = "  ".join(f"{name} {value:6.2f}" for name, value in times.items())
                size = "x".join(map(str, shape))
                print(f"{size:12} {mode:5} {kind}  {line}  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
