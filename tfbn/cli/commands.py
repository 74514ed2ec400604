"""Run the commands: functions that take the parsed arguments and return the exit code."""

import argparse
from collections.abc import Callable
from typing import Any

import keras

import tfbn
from tfbn.cli import checks, model_files
from tfbn.cli.errors import FileError, naming, reading
from tfbn.cli.output import print_json, print_lines
from tfbn.cli.recalibrate import recalibrate
from tfbn.cli.served import describe, drift, export
from tfbn.files import atomic
from tfbn.models import keras_models
from tfbn.serving import sweeps
from tfbn.stats import drift as layer_drift
from tfbn.stats.blending import in_words
from tfbn.stats.layer_stats import require_same_shape

# Exit codes. `inspect --check` and `drift` may return NO.
DONE, NO = 0, 1


def inspect(args: argparse.Namespace) -> int:
    """Print a model's batch norm layers, and whether their statistics come from a sweep."""
    model = model_files.load(args.model, args.unsafe)
    sweep = model_files.sweep_of(model, args.model)
    state, text = _state(model, sweep)
    swept = sweep.stats
    moved = swept.compare(swept.previous) if swept and swept.previous else {}
    layers = keras_models.batch_norm_layers(model)
    if args.json:
        values = {path: _layer(layer) | moved.get(path, {}) for path, layer in layers.items()}
        print_json({"model": model.name, "layers": values, "state": state, "why": text})
    else:
        print_lines(f"{args.model}: model {model.name!r}, {len(layers)} batch norm layers")
        head = ["layer", "channels", "momentum", "epsilon", "trainable", *layer_drift.COLUMNS]
        rows = [
            [path, *_cells(layer), *layer_drift.cells(moved.get(path))]
            for path, layer in layers.items()
        ]
        print_lines(*layer_drift.table(head, rows))
        if moved:
            print("off by: the statistics before the sweep, compared with the sweep")
        print_lines(f"population statistics: {text}")
    return NO if args.check and state not in ("swept", "none to sweep") else DONE


def compare(args: argparse.Namespace) -> int:
    """Print the differences between statistics A and B."""
    model = model_files.load(args.model, args.unsafe)
    current = tfbn.PopulationStats.read(model)
    a, b = (_statistics(path, args.unsafe) for path in (args.a, args.b))
    for stats, name in ((a, args.a), (b, args.b)):
        strange = [path for path in stats if path not in current]
        if strange or not stats:
            received = f"with layer {strange[0]!r}" if strange else "without any"
            raise FileError(
                f"Expected statistics of the layers of {args.model}. Received: {name}, {received}."
            )
        with naming(name, args.model):
            for path in stats:
                require_same_shape(path, current[path], stats[path])
    # Sweeps skip frozen layers, so valid statistics may have no layer in common.
    if not any(path in b for path in a):
        raise FileError(
            f"Expected the same layers. Received: {args.a} with {next(iter(a))!r} and {args.b} "
            f"with {next(iter(b))!r}. Sweep both with --include-frozen."
        )
    differences = layer_drift.of_layers(a, b)
    others = [
        name for name, s in ((args.a, a), (args.b, b)) if s.fingerprint != current.fingerprint
    ]
    if args.json:
        print_json({"layers": differences, "of_other_weights": others})
        return DONE
    rows = [[path, *layer_drift.cells(of_layer)] for path, of_layer in differences.items()]
    title = f"{args.b} against {args.a}, layers that differ most first:"
    notes = [f"Note that {name} is of other weights than those of {args.model}." for name in others]
    print_lines(title, *layer_drift.table(["layer", *layer_drift.COLUMNS], rows), *notes)
    return DONE


def convert(args: argparse.Namespace) -> int:
    """Write a copy of a model with `tfbn.BatchNormalization` in place of Keras's layer."""
    return _write_copy(args, tfbn.convert, "with tfbn.BatchNormalization")


def fold(args: argparse.Namespace) -> int:
    """Write a copy of a model's inference network without batch norm layers."""
    return _write_copy(args, tfbn.fold, "for inference, with batch norm folded away")


def _write_copy(
    args: argparse.Namespace, copied: Callable[[keras.Model], keras.Model], text: str
) -> int:
    model = model_files.load(args.model, args.unsafe)
    sweep = model_files.sweep_of(model, args.model)
    with naming(args.model):
        copy = copied(model)
    count = len(keras_models.batch_norm_layers(copy))
    stats = sweep.stats if count and sweep.stale is None else None
    model_files.save(copy, stats, args.out)
    if args.json:
        print_json({"out": args.out, "batch_norm_layers": count})
    else:
        print_lines(f"Wrote {args.out}, {text}. It is not compiled. {args.model} is as it was.")
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    command.__name__: command
    for command in (inspect, recalibrate, compare, convert, fold, export, describe, drift)
}


def _state(model: keras.Model, sweep: sweeps.Sweep) -> tuple[str, str]:
    """Return the origin of a model's statistics as a word for programs and as a sentence."""
    if not keras_models.batch_norm_layers(model):
        return "none to sweep", "the model has no batch norm layers"
    swept = sweep.stats
    if swept is None:
        recorders = "only `tfbn recalibrate` and layers of tfbn record one in a file"
        return "not known", f"not known: {sweep.stale}; {recorders}"
    if sweep.stale is not None:
        return "stale", f"stale: {sweep.stale}"
    return (
        "swept",
        f"swept, method={swept.method!r}, {swept.samples} samples in {swept.batches} "
        f"batches of at most {swept.batch_size}"
        + (f", {words}" if (words := in_words(swept.samples, swept.prior_samples)) else ""),
    )


def _statistics(path: str, unsafe: bool) -> tfbn.PopulationStats:
    if checks.is_model(path):
        return tfbn.PopulationStats.read(model_files.load(path, unsafe))
    kind = "a model file, or one that PopulationStats.save wrote"
    with reading(path, kind, "Collect the statistics again."):
        return model_files.unpack(atomic.read(path), path, kind)


def _layer(layer: keras.layers.BatchNormalization) -> dict[str, Any]:
    return {
        "class": type(layer).__name__,
        "channels": int(layer.moving_mean.shape[0]),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "trainable": layer.trainable,
    }


def _cells(layer: keras.layers.BatchNormalization) -> list[Any]:
    return [
        int(layer.moving_mean.shape[0]),
        f"{layer.momentum:g}",
        f"{layer.epsilon:g}",
        "yes" if layer.trainable else "no",
    ]
