"""What a sweep costs, beside what a bare loop over the same batches costs.

    python tests/benchmarks/sweep.py [--samples 10000] [--repeats 3]

A ResNet-20 (19 batch norm layers, one after the other) on images of 32x32. Every variant
starts cold and traces its graph within the time that is taken; all take turns within a
run, and the best time of each is compared. With PyTorch (and fvcore)
installed, `torch.optim.swa_utils.update_bn` and fvcore's `update_bn_stats` are measured on the
same network over PyTorch's own bare forward pass.
"""

import argparse
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn

BATCH = 100


def resnet20(bn):
    """He et al. 2016, section 4.2, n = 3: 19 batch norms on the longest path, and in all."""

    def convolution(x, filters, strides=1):
        return bn()(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x))

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(inputs, 16))
    for filters, strides in [(16, 1)] * 3 + [(32, 2)] + [(32, 1)] * 2 + [(64, 2)] + [(64, 1)] * 2:
        y = layers.ReLU()(convolution(x, filters, strides))
        y = convolution(y, filters)
        if strides > 1:  # Shortcut A: subsample, and pad the channels.
            x = layers.AveragePooling2D(1, 2)(x)
            x = layers.Concatenate()([x, layers.Rescaling(0.0)(x)])
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def tensorflow_variants(name, bn, x):
    """What to time, by name."""
    model = resnet20(bn)
    model(x[:BATCH])

    def bare():
        forward = tf.function(
            lambda batch: model(batch, training=True),
            input_signature=[tf.TensorSpec((None, *x.shape[1:]))],
        )
        for i in range(0, len(x), BATCH):
            forward(tf.convert_to_tensor(x[i : i + BATCH]))

    def predict():
        model.make_predict_function(force=True)
        model.predict(x, batch_size=BATCH, verbose=0)

    def sweep(**options):
        return lambda: tfbn.collect(model, x, batch_size=BATCH, verbose=0, **options)

    return {
        f"{name}: training=True": bare,
        f"{name}: predict": predict,
        f"{name}: pooled": sweep(method="pooled"),
        f"{name}: exact": sweep(method="exact", memory_limit=8 * 2**30),
        f"{name}: exact, memory_limit=0": sweep(method="exact", memory_limit=0),
    }


def torch_variants(x):
    """PyTorch's tools over PyTorch's forward pass, as far as they are installed."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before, filters, strides):
            super().__init__()
            self.strides, self.pad = strides, filters - before
            self.convolutions = nn.Sequential(
                nn.Conv2d(before, filters, 3, strides, 1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
                nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
                nn.BatchNorm2d(filters),
            )

        def forward(self, x):
            y = self.convolutions(x)
            if self.strides > 1:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.pad))
            return torch.relu(x + y)

    blocks, before = [], 16
    for filters, strides in [(16, 1)] * 3 + [(32, 2)] + [(32, 1)] * 2 + [(64, 2)] + [(64, 1)] * 2:
        blocks.append(Block(before, filters, strides))
        before = filters
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*stem, *blocks, *head).to(memory_format=torch.channels_last)
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    batches = [images[i : i + BATCH] for i in range(0, len(x), BATCH)]

    @torch.no_grad()
    def bare():
        model.train()
        for batch in batches:
            model(batch)

    actual = {
        "torch: training mode": bare,
        "torch: update_bn": lambda: torch.optim.swa_utils.update_bn(batches, model),
    }
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        pass
    else:
        actual["torch: fvcore"] = lambda: update_bn_stats(model.train(), batches, len(batches))
    return actual


def main():
    """Time everything, and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(args.samples, 32, 32, 3)).astype("float32")
    variants = tensorflow_variants("tfbn", tfbn.BatchNormalization, x)
    variants |= tensorflow_variants("keras", layers.BatchNormalization, x)
    try:
        variants |= torch_variants(x)
    except ImportError:
        print("PyTorch is not installed: its tools are left out.")
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(args.repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {args.samples} images, "
        f"best of {args.repeats}"
    )
    for name, seconds in best.items():
        family = name.partition(":")[0]
        bare = best[f"{family}: training=True" if family != "torch" else "torch: training mode"]
        line = f"{name:32}{seconds:8.2f} s   {seconds / bare:5.2f} of the bare loop"
        if family != "torch":
            line += f"   {seconds / best[f'{family}: predict']:5.2f} of predict"
            line += f"   {seconds / best[f'{family}: pooled']:5.2f} of pooled"
        print(line)


if __name__ == "__main__":
    main()
