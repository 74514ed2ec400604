"""Run `tfbn recalibrate`: sweep data through a model file or a served model."""

import argparse
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

import tfbn
from tfbn.callbacks import report, validation
from tfbn.cli import formats, model_files
from tfbn.cli.errors import FileError, naming
from tfbn.cli.output import print_json, print_lines
from tfbn.models import keras_models
from tfbn.serving.recalibrate import recalibration

# Moving averages are far off beyond this number of standard deviations, or this factor of one.
_FAR = 10


def recalibrate(args: argparse.Namespace) -> int:
    """Sweep data through a model, and write it with the new statistics."""
    options = formats.Options(args.batch_size, args.scale)
    read = formats.find_reader(args.data, options)
    return (_served if os.path.isdir(args.model) else _file)(args, read, options)


def _file(args: argparse.Namespace, read: formats.Reader, options: formats.Options) -> int:
    model = model_files.load(args.model, args.unsafe, compiled=True)
    _require_unfrozen(model, args)
    x, batch_size = read(args.data, model, options)
    evaluate = _evaluation(model, args)
    before = evaluate()
    with _naming_images(args.data), naming(*_files(args)):
        stats = tfbn.collect(
            model,
            x,
            batch_size=batch_size,
            include_frozen=args.include_frozen,
            **_sweep_options(args),
        )
        if args.blend_samples and stats.previous is not None:
            stats = stats.blend(stats.previous, samples=args.blend_samples)
        stats.assign(model)
    changes = {
        name: (value, after[name]) for after in [evaluate()] for name, value in before.items()
    }
    model_files.save(model, stats, args.out)
    _print_recalibrated(args, stats, args.out, f"{args.model} is as it was.", changes)
    return 0


def _served(args: argparse.Namespace, read: formats.Reader, options: formats.Options) -> int:
    with naming(args.model):
        before = recalibration.open_version(args.model)
    x, batch_size = read(args.data, before.network, options)
    with _naming_images(args.data), naming(*_files(args)):
        written = recalibration.next_version(
            before,
            x,
            batch_size=batch_size,
            blend_samples=args.blend_samples or 0,
            **_sweep_options(args),
        )
    text = f"{before.path} is as it was."
    _print_recalibrated(args, written.stats, str(written.path), text, {})
    return 0


def _evaluation(model: keras.Model, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Return a function that computes the model's metrics on `--validation`; `{}` without it."""
    if args.validation is None:
        return dict
    if not model.compiled:
        raise FileError(f"Expected a compiled model. Received: {args.model}. Compile and save it.")
    data = formats.read_labelled(args.validation, model)

    def evaluate() -> dict[str, float]:
        with naming(args.model, args.validation):
            return validation.evaluate(model, data)

    return evaluate


def _files(args: argparse.Namespace) -> list[str]:
    return [args.data, args.model]


def _sweep_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "method": args.method,
        "tolerance": args.tolerance,
        "verbose": 0 if args.json else "auto",
    }


def _print_recalibrated(
    args: argparse.Namespace,
    stats: tfbn.PopulationStats,
    out: str,
    text: str,
    changes: Mapping[str, tuple[float, float]],
) -> None:
    far = beyond_lag(stats)
    if far is not None:
        warnings.warn(
            f"The moving averages of layer {far!r} are further off than lag explains. Is "
            f"{args.data} preprocessed as in fit? Pixels are 0 to 255 unless --scale is given.",
            stacklevel=2,
        )
    if not args.json:
        stats.summary(print_fn=print_lines)
        if changes:
            print_lines(report.validation_in_words(changes))
        print_lines(f"Wrote {out}. {text}")
        return
    content = stats.to_dict()
    moved = {} if stats.previous is None else stats.compare(stats.previous)
    for path, drift in moved.items():
        content["layers"][path] = {"count": stats[path].count, **drift}
    print_json({"out": out, **content, **({"validation": changes} if changes else {})})


def beyond_lag(stats: tfbn.PopulationStats) -> str | None:
    """Return the layer with the largest drift that lag cannot explain, or `None`.

    A moving average that lags is between its initial value (mean 0, variance 1) and the
    population's. A layer is far off if its mean differs by more than 10 standard deviations, or its
    standard deviation by more than a factor of 10, in the root mean square over channels.
    """
    if stats.previous is None:
        return None
    for path, drift in stats.compare(stats.previous).items():
        ours, before = stats[path], stats.previous[path]
        spread = np.sqrt(ours.variance)
        low, high = np.minimum(0, ours.mean) - spread, np.maximum(0, ours.mean) + spread
        mean_lags = (low <= before.mean) & (before.mean <= high)
        low, high = np.minimum(1, ours.variance) / 4, np.maximum(1, ours.variance) * 4
        variance_lags = (low <= before.variance) & (before.variance <= high)
        far = drift["mean_shift"] > _FAR and np.mean(mean_lags) < 0.5
        ratio = drift["std_ratio"]
        if far or (not 1 / _FAR < ratio < _FAR and np.mean(variance_lags) < 0.5):
            return path
    return None


def _require_unfrozen(model: keras.Model, args: argparse.Namespace) -> None:
    layers = keras_models.batch_norm_layers(model).values()
    if layers and not args.include_frozen and not any(layer.trainable for layer in layers):
        raise FileError(f"All layers of {args.model} are frozen. Give --include-frozen.")


@contextlib.contextmanager
def _naming_images(folder: str) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        file = formats.damaged_image(folder)
        if file is None:
            raise
        raise FileError(
            f"Expected a valid image. Received: {file}. Repair or remove it."
        ) from error
