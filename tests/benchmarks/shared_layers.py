"""Which statistics suit a batch norm layer that one forward pass calls several times?

    python tests/benchmarks/shared_layers.py [--seeds 5] [--epochs 5 30] [--only siamese]

Stock `keras.layers.BatchNormalization` in networks that are trained on scikit-learn's digits, 1,197
images to train and 600 to validate, another split for every seed. The same trained weights are
validated with four sets of statistics, all of them of the training images:

- `moving`: the moving averages, as `fit` left them (momentum 0.99).
- `A`, training mode: every call normalises by its own population. A layer's statistics are the
  pooled mean and variance of all its calls, by the law of total variance, weighted by count.
- `B`, inference: the mean and variance per layer such that, in inference with them, the inputs of
  every layer, pooled over its calls, have just that mean and variance. Found by inference passes:
  every pass sets all layers to the statistics that it found, until no mean moves by more than
  1e-6 standard deviations and no variance by more than 1e-6 of itself. Where 20 passes do not get
  there, which is said, up to 80 more go a quarter of the way each.
- `C`, for layers that feed themselves, the cells: these keep A's statistics, and all layers behind
  them have those of B, found in inference with A's statistics in the cell. Elsewhere C is B.
- `own`, for comparison: every call is validated with the population statistics of that call, as
  one layer per call would do it. No single mean and variance per layer can say this.

Nothing of tfbn is used. One pass is one batch of all images; activations are float32, statistics
float64. Losses are means over seeds with their standard error, and differences are paired.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

TRAIN = 1197
BATCH = 32
PLAIN_PASSES = 20
DAMPED_PASSES = 80
DAMPING = 0.25
STILL = 1e-6


class Calls:
    """Moments of every call of every batch norm layer, while a model runs once.

    Args:
        model: A functional model, built.
        own: Normalise every call by its own moments, not in inference mode.
        given: The moments to normalise every call by, a list per layer; measures nothing then.
    """

    def __init__(self, model, own=False, given=None):
        self.layers = batch_norms(model)
        self.moments = {layer.name: [] for layer in self.layers}
        self._own = own
        self._given = given and {name: iter(calls) for name, calls in given.items()}

    def __enter__(self):
        for layer in self.layers:
            layer.call = self._call_of(layer, layer.call)
        return self

    def __exit__(self, *_):
        for layer in self.layers:
            del layer.call

    def _call_of(self, layer, inference):
        def call(inputs, training=None, mask=None):
            if self._given:
                return normalised(layer, inputs, *next(self._given[layer.name])[1:])
            moments = moments_of(ops.convert_to_numpy(inputs))
            self.moments[layer.name].append(moments)
            if self._own:
                return normalised(layer, inputs, *moments[1:])
            return inference(inputs, training=False)

        return call


def batch_norms(model):
    """The model's batch norm layers in order of creation, according to their names."""
    actual = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    return sorted(actual, key=lambda layer: (len(layer.name), layer.name))


def moments_of(inputs):
    """Count, mean and population variance per channel, in float64."""
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
    mean = rows.mean(0)
    rows -= mean
    return len(rows), mean, np.einsum("ij,ij->j", rows, rows) / len(rows)


def normalised(layer, inputs, mean, variance):
    """`layer`'s output for `inputs` with the given statistics instead of the layer's."""
    mean, variance = (ops.convert_to_tensor(value, "float32") for value in (mean, variance))
    return ops.batch_normalization(
        inputs, mean, variance, -1, layer.beta, layer.gamma, layer.epsilon
    )


def pooled(calls):
    """Mean and variance of all calls together: the law of total variance."""
    counts, means, variances = (np.array(part) for part in zip(*calls, strict=True))
    weights = (counts / counts.sum())[:, None]
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0)


def assign(model, statistics):
    for layer in batch_norms(model):
        mean, variance = statistics[layer.name]
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)


def assigned(model):
    return {
        layer.name: (ops.convert_to_numpy(layer.moving_mean), layer.moving_variance.numpy())
        for layer in batch_norms(model)
    }


def one_pass(model, inputs, **how):
    """The moments of every call, by layer, over one pass of all `inputs`."""
    with Calls(model, **how) as calls:
        model(inputs, training=False)
    return calls.moments


def training_mode(model, inputs):
    """Definition A, and the moments of every call that it pools."""
    calls = one_pass(model, inputs, own=True)
    return {name: pooled(moments) for name, moments in calls.items()}, calls


def move(old, new):
    """The greatest move of a mean, in standard deviations, or of a variance, of itself.

    A channel that is dead, or all but dead, is measured by the epsilon that divides it.
    """
    greatest = 0.0
    for name, (mean, variance) in new.items():
        scale = variance + 1e-3
        means = np.abs(mean - old[name][0]) / np.sqrt(scale)
        variances = np.abs(variance - old[name][1]) / scale
        greatest = max(greatest, means.max(), variances.max())
    return greatest


def inference_mode(model, inputs, start, most, step=1.0, kept=()):
    """Definition B from `start`: the statistics, the passes that moved them, the last move.

    Args:
        model: The model.
        inputs: All its training data.
        start: The statistics of the first pass.
        most: So many passes at most.
        step: How far to go to the statistics that a pass found.
        kept: Names of layers that keep the statistics of `start`.
    """
    statistics, passes = start, 0
    while True:
        assign(model, statistics)
        actual = {name: pooled(calls) for name, calls in one_pass(model, inputs).items()}
        actual |= {name: start[name] for name in kept}
        moved = move(statistics, actual)
        if moved < STILL or passes == most:
            return statistics, passes, moved
        statistics = {name: between(statistics[name], actual[name], step) for name in actual}
        passes += 1


def between(old, new, step):
    return tuple(o + step * (n - o) for o, n in zip(old, new, strict=True))


def conv_bn(filters, strides=1):
    """3x3 convolution, batch norm and relu, to be called as often as wanted."""
    parts = [
        layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
    ]
    return chain(parts)


def dense_bn(units):
    parts = [layers.Dense(units, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    return chain(parts)


def chain(parts):
    def call(inputs):
        for part in parts:
            inputs = part(inputs)
        return inputs

    return call


def classes(features):
    """Two unshared layers behind the shared ones, and ten classes."""
    features = dense_bn(32)(dense_bn(32)(features))
    return layers.Dense(10)(features)


def pyramid(scales, heads):
    """`heads` shared conv + batch norm layers over `scales` scales of a small backbone."""
    image = keras.Input((8, 8, 1))
    levels = [conv_bn(12)(image)]
    for _ in range(scales - 1):
        levels.append(conv_bn(12, strides=2)(levels[-1]))
    head = chain([conv_bn(12) for _ in range(heads)])
    merged = layers.Concatenate()([layers.GlobalAveragePooling2D()(head(x)) for x in levels])
    return keras.Model(image, classes(merged))


def siamese():
    """A shared encoder of three batch norm layers; is it the same digit?"""
    images = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    encoder = chain([conv_bn(12), conv_bn(16, strides=2), layers.Flatten(), dense_bn(32)])
    one, other = (encoder(image) for image in images)
    apart = ops.abs(layers.Subtract()([one, other]))
    merged = layers.Concatenate()([apart, layers.Multiply()([one, other])])
    return keras.Model(images, layers.Dense(2)(dense_bn(32)(dense_bn(32)(merged))))


def rows_cell(activation):
    """A dense cell whose steps are the eight rows of the image."""
    image = keras.Input((8, 8, 1))
    dense, norm = layers.Dense(32, use_bias=False), layers.BatchNormalization()
    state = ops.zeros_like(ops.tile(image[:, 0, :, 0], (1, 4)))
    for step in range(8):
        joined = layers.Concatenate()([image[:, step, :, 0], state])
        state = layers.Activation(activation)(norm(dense(joined)))
    return keras.Model(image, classes(state))


def image_cell(steps, residual):
    """A convolutional cell that sees the whole image at each step."""
    image = keras.Input((8, 8, 1))
    cell = conv_bn(8)
    state = ops.zeros_like(ops.tile(image, (1, 1, 1, 8)))
    for _ in range(steps):
        after = cell(layers.Concatenate()([image, state]))
        state = layers.Add()([state, after]) if residual else after
    return keras.Model(image, classes(layers.GlobalAveragePooling2D()(state)))


def digits(seed):
    """Images in [0, 1] and labels: those to train on and those to validate."""
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], data.target[order]
    return (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])


def pairs(part, seed, bright_and_dark):
    """Two pairs per image, the half of them of the same digit; with light, one by [0.5, 1]."""
    images, labels = part
    random = np.random.default_rng(seed)
    first, second, same = [], [], []
    for index in np.tile(np.arange(len(images)), 2):
        alike = random.random() < 0.5
        choice = np.flatnonzero((labels == labels[index]) == alike)
        first.append(index)
        second.append(random.choice(choice))
        same.append(int(alike))
    one, other = images[first], images[second]
    if bright_and_dark:
        one, other = 0.5 + 0.5 * one, 0.5 * other
    return [one, other], np.array(same)


NETWORKS = {
    "pyramid: 2 scales, 1 shared": (lambda: pyramid(2, 1), None),
    "pyramid: 3 scales, 3 shared": (lambda: pyramid(3, 3), None),
    "siamese: same light": (siamese, False),
    "siamese: bright and dark": (siamese, True),
    "cell: 8 rows, tanh": (lambda: rows_cell("tanh"), None),
    "cell: 8 rows, relu": (lambda: rows_cell("relu"), None),
    "cell: image, 4 steps": (lambda: image_cell(4, False), None),
    "cell: image, 4 steps, residual": (lambda: image_cell(4, True), None),
}


def score(model, data, given=None):
    """Loss and accuracy in inference, or with the moments given for every call."""
    inputs, labels = data
    if given:
        with Calls(model, given=given):
            logits = model(inputs, training=False)
    else:
        logits = model(inputs, training=False)
    loss = ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))
    right = ops.convert_to_numpy(logits).argmax(-1) == labels
    return float(loss), float(right.mean())


def away(a, b):
    """Mean over live channels of |variance of A - variance of B| / variance of B."""
    live = b[1] > 1e-6
    return np.abs(a[1] / np.where(live, b[1], 1) - 1)[live].mean()


def compared(model, train, validation, cell):
    """All figures of one trained model, whose moving averages are put back."""
    moving = assigned(model)
    scores = {"moving": score(model, validation)}
    a, calls = training_mode(model, train[0])
    shared = [name for name in calls if len(calls[name]) > 1]
    behind = behind_shared(model, shared)
    b, passes, plain = inference_mode(model, train[0], a, PLAIN_PASSES)
    moved = plain
    if plain >= STILL:
        b, _, moved = inference_mode(model, train[0], a, DAMPED_PASSES, DAMPING)
    c, _, _ = inference_mode(model, train[0], a, PLAIN_PASSES, kept=shared) if cell else (b, 0, 0)
    for kind, statistics in (("A", a), ("B", b), ("C", c)):
        assign(model, statistics)
        scores[kind] = score(model, validation)
    scores["own"] = score(model, validation, given=calls)
    assign(model, moving)
    return {
        "scores": scores,
        "behind": np.mean([away(a[name], b[name]) for name in behind]),
        "behind_c": np.mean([away(a[name], c[name]) for name in behind]),
        "most": max(away(a[name], b[name]) for name in behind),
        "shared": np.mean([away(a[name], b[name]) for name in shared]),
        "passes": passes,
        "plain": plain,
        "moved": moved,
    }


def behind_shared(model, shared):
    """Names of the layers that are called once, after the first shared one."""
    names = [layer.name for layer in batch_norms(model)]
    first = min(names.index(name) for name in shared)
    return [name for name in names[first:] if name not in shared]


def run(name, seed, epochs):
    """The figures of one seed after each number of epochs."""
    build, lit = NETWORKS[name]
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    train, validation = digits(seed)
    if lit is not None:
        train, validation = pairs(train, seed, lit), pairs(validation, seed + 1000, lit)
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, jit_compile=False, steps_per_execution=8)
    done, figures = 0, {}
    for number in epochs:
        model.fit(*train, batch_size=BATCH, initial_epoch=done, epochs=number, verbose=0)
        figures[number], done = compared(model, train, validation, name.startswith("cell")), number
    return figures


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))


def report(name, epochs, runs):
    """Losses, how far apart the definitions are, and whether the passes of B came to rest."""
    cells = []
    for kind in ("moving", "A", "B", "C", "own"):
        losses, rights = zip(*(figures["scores"][kind] for figures in runs), strict=True)
        mean, error = mean_and_error(losses)
        cells.append(f"{kind} {mean:.4f}+-{error:.4f} ({100 * np.mean(rights):.1f}%)")
    print(f"{name}, {epochs} epochs: " + "  ".join(cells))
    print("    " + difference("A", "B", runs) + "; " + difference("A", "C", runs))
    mean = {key: np.mean([figures[key] for figures in runs]) for key in ("behind", "behind_c")}
    print(
        f"    variances, |A/B - 1|: behind {mean['behind']:.1%}"
        f" (worst layer {max(f['most'] for f in runs):.0%}),"
        f" shared {np.mean([f['shared'] for f in runs]):.1%}; |A/C - 1| behind"
        f" {mean['behind_c']:.1%}"
    )
    print(
        f"    B: at rest in {sum(f['plain'] < STILL for f in runs)}/{len(runs)} after"
        f" {min(f['passes'] for f in runs)}-{max(f['passes'] for f in runs)} passes"
        f" (last move at most {max(f['plain'] for f in runs):.0e});"
        f" damped, where needed: {min(f['moved'] for f in runs):.0e} to"
        f" {max(f['moved'] for f in runs):.0e}",
        flush=True,
    )


def difference(one, other, runs):
    gaps = [np.subtract(f["scores"][one], f["scores"][other]) for f in runs]
    loss, error = mean_and_error([gap[0] for gap in gaps])
    right, right_error = mean_and_error([100 * gap[1] for gap in gaps])
    wins = sum(gap[0] > 0 for gap in gaps)
    return (
        f"{one}-{other} {loss:+.4f}+-{error:.4f}, accuracy {right:+.2f}+-{right_error:.2f}"
        f" points, {other} better in {wins}/{len(runs)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 30])
    parser.add_argument("--only", default="", help="networks whose name starts so")
    arguments = parser.parse_args()
    for name in NETWORKS:
        if not name.startswith(arguments.only):
            continue
        began = time.perf_counter()
        runs = [run(name, seed, arguments.epochs) for seed in range(arguments.seeds)]
        for epochs in arguments.epochs:
            report(name, epochs, [figures[epochs] for figures in runs])
        print(f"    {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
