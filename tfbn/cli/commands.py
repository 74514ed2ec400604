"""The commands of the command line. Each takes the parsed arguments and returns the exit code."""

import argparse
import contextlib
import io
import json
import os
from collections.abc import Callable

import tfbn
from tfbn.cli import formats, model_files
from tfbn.cli.errors import FileError, naming, reading, visible
from tfbn.files import atomic
from tfbn.models import keras_models
from tfbn.serving import provenance, versions
from tfbn.serving.recalibrate import recalibration
from tfbn.stats import drift
from tfbn.stats.blending import in_words
from tfbn.stats.layer_stats import require_same_shape

DONE, NOT_SWEPT = 0, 3


def inspect(args: argparse.Namespace) -> int:
    """List a model's batch norm layers, and say whether a sweep is recorded in its file."""
    model = model_files.load(args.model, args.unsafe)
    sweep = _recorded_sweep(model, args.model)
    state, text = _state(model, sweep)
    swept = sweep.stats
    off = swept.compare(swept.previous) if swept and swept.previous else {}
    layers = keras_models.batch_norm_layers(model)
    if args.json:
        described = {path: _layer(layer) | off.get(path, {}) for path, layer in layers.items()}
        _print_json({"model": model.name, "layers": described, "state": state, "why": text})
    else:
        _print(f"{args.model}: model {model.name!r}, {len(layers)} batch norm layers")
        head = ["layer", "channels", "momentum", "epsilon", "trainable", *drift.COLUMNS]
        rows = [
            [path, *_cells(layer), *drift.cells(off.get(path))] for path, layer in layers.items()
        ]
        _print(*drift.table(head, rows))
        if off:
            print("off by: the statistics before the sweep, against those that it found")
        _print(f"population statistics: {text}")
    return NOT_SWEPT if args.check and state not in ("swept", "none to sweep") else DONE


def recalibrate(args: argparse.Namespace) -> int:
    """Sweep data through a model and write it with the statistics found."""
    served = os.path.isdir(args.model)
    _check_out(args, served)
    options = formats.Options(args.batch_size, args.features, args.scale)
    read = formats.find_reader(args.data, options)
    return (_recalibrate_served if served else _recalibrate_file)(args, read, options)


def _recalibrate_file(args, read, options):
    model = model_files.load(args.model, args.unsafe, compiled=True)
    _require_unfrozen(model, args)
    x, batch_size = read(args.data, model, options)
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
    model_files.save(model, stats, args.out)
    _print_recalibrated(args, stats, args.out, f"{args.model} is as it was.")
    return DONE


def _recalibrate_served(args, read, options):
    with naming(args.model):
        before = recalibration.opened(args.model)
    x, batch_size = read(args.data, before.network, options)
    with _naming_images(args.data), naming(*_files(args)):
        found = recalibration.next_version(
            before,
            x,
            batch_size=batch_size,
            blend_samples=args.blend_samples or 0,
            **_sweep_options(args),
        )
    text = f"{before.path} is as it was."
    _print_recalibrated(args, found.stats, str(found.path), text)
    return DONE


def _check_out(args, served):
    """Raise `FileError` unless the options fit the kind of model, and its new place is free."""
    if served and (args.out or args.include_frozen or args.unsafe):
        raise FileError(
            "Expected a model's directory without --out, --include-frozen and --unsafe: its next "
            "version is written into it, all its layers are swept, and no code in it is run. "
            f"Received: {args.model} with one of them."
        )
    if not served and not args.out:
        raise FileError(
            f"Expected --out with a name for the new .keras file. Received: none, for {args.model}."
        )
    if not served:
        model_files.require_free(args.out)


def _files(args):
    return [path for path in (args.data, args.features, args.model) if path is not None]


def _sweep_options(args):
    return {
        "method": args.method,
        "tolerance": args.tolerance,
        "verbose": 0 if args.json else "auto",
    }


def _print_recalibrated(args, stats, out, text):
    if not args.json:
        stats.summary(print_fn=_print)
        _print(f"Wrote {out}. {text}")
        return
    found = stats.to_dict()
    for path, off in stats.compare(stats.previous).items():
        found["layers"][path] = {"count": stats[path].count, **off}
    _print_json({"out": out, **found})


def compare(args: argparse.Namespace) -> int:
    """Show how far statistics B are from statistics A."""
    model = model_files.load(args.model, args.unsafe)
    held = tfbn.PopulationStats.read(model)
    a, b = (_statistics(path, args.unsafe) for path in (args.a, args.b))
    for stats, name in ((a, args.a), (b, args.b)):
        strange = [path for path in stats if path not in held]
        if strange or not stats:
            received = f"with layer {strange[0]!r}" if strange else "without any"
            raise FileError(
                f"Expected statistics of the layers of {args.model}. Received: {name}, {received}."
            )
        with naming(name, args.model):
            for path in stats:
                require_same_shape(path, held[path], stats[path])
    # Sweeps leave frozen layers out, so both can be right and have none in common.
    if not any(path in b for path in a):
        raise FileError(
            f"Expected two files with statistics of the same layers. Received: {args.a} with "
            f"{next(iter(a))!r} and {args.b} with {next(iter(b))!r}. Sweep both with "
            "--include-frozen."
        )
    off = drift.of_layers(a, b)
    others = [name for name, s in ((args.a, a), (args.b, b)) if s.fingerprint != held.fingerprint]
    if args.json:
        _print_json({"layers": off, "of_other_weights": others})
        return DONE
    rows = [[path, *drift.cells(of_layer)] for path, of_layer in off.items()]
    title = f"{args.b} against {args.a}, layers that differ most first:"
    notes = [f"Note that {name} is of other weights than those of {args.model}." for name in others]
    _print(title, *drift.table(["layer", *drift.COLUMNS], rows), *notes)
    return DONE


def export(args: argparse.Namespace) -> int:
    """Write a model as a SavedModel, as TensorFlow Serving wants it."""
    with naming(args.path):
        versions.target(args.path)  # Before the model and the sample are read.
    model = model_files.load(args.model, args.unsafe)
    sample = None if args.sample is None else formats.read_sample(args.sample, model)
    files = [path for path in (args.model, args.path, args.sample) if path is not None]
    with naming(*files):
        _recorded_sweep(model, args.model)  # It lets `tfbn.export` know.
        exported = tfbn.export(
            model, args.path, sample=sample, allow_new_signature=args.allow_new_signature
        )
    if args.json:
        _print_json(
            {
                "path": str(exported.path),
                "version": exported.version,
                "max_abs_difference": exported.max_abs_difference,
            }
        )
    else:
        off = f"{exported.max_abs_difference:.1e}"
        _print(f"Wrote {exported.path}. It predicts as the model does, within {off}.")
    return DONE


def describe(args: argparse.Namespace) -> int:
    """Say where a SavedModel that `export` wrote comes from."""
    text = io.StringIO()
    expected = "a model's directory, or a version's, that tfbn.export wrote"
    with reading(args.path, expected, "Export it again."), contextlib.redirect_stdout(text):
        found = tfbn.describe(args.path)
    if args.json:
        _print_json(found)
    else:
        _print(*text.getvalue().split("\n")[:-1])
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    command.__name__: command for command in (inspect, recalibrate, compare, export, describe)
}


def _recorded_sweep(model, path):
    """The sweep that a file records, as `recalibrate` does or in the layers of tfbn."""
    recorded = model_files.recorded_sweep(path)
    why = None if recorded is None else recorded.mismatch(model)
    if why is not None:
        return provenance.Sweep(recorded, why)
    if recorded is not None:
        recorded.assign(model)  # Its own values: now its layers know of it, those of Keras too.
    return provenance.sweep_of(model)


def _state(model, sweep):
    """A word, and a sentence for people, on where a model's statistics are from."""
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
        + (f", {words}" if (words := in_words(swept.samples, swept.source_weight)) else ""),
    )


def _require_unfrozen(model, args):
    layers = keras_models.batch_norm_layers(model).values()
    if layers and not args.include_frozen and not any(layer.trainable for layer in layers):
        raise FileError(
            "Expected a model with batch norm layers that are not frozen. Received: "
            f"{args.model}, all of whose {len(layers)} have trainable=False. Give "
            "--include-frozen to sweep them all the same."
        )


@contextlib.contextmanager
def _naming_images(folder):
    try:
        yield
    except FileError as error:
        file = formats.damaged_image(folder)
        if file is None:
            raise
        raise FileError(
            f"Expected images in {folder} that can be decoded. Received: {file}, which cannot. "
            "Mend it, or move it away."
        ) from error


def _statistics(path, unsafe):
    if model_files.is_model(path):
        return tfbn.PopulationStats.read(model_files.load(path, unsafe))
    kind = "a model file, or one that PopulationStats.save wrote"
    with reading(path, kind, "Collect the statistics again."):
        return model_files.unpack(atomic.read(path), path, kind)


def _layer(layer):
    return {
        "class": type(layer).__name__,
        "channels": int(layer.moving_mean.shape[0]),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "trainable": layer.trainable,
    }


def _cells(layer):
    return [
        int(layer.moving_mean.shape[0]),
        f"{layer.momentum:g}",
        f"{layer.epsilon:g}",
        "yes" if layer.trainable else "no",
    ]


def _print_json(content):
    print(json.dumps(content, indent=1))


def _print(*lines):
    for line in lines:
        print(visible(line))
