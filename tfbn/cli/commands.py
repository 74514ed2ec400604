"""The command line: batch norm statistics of models that are trained already."""

import argparse
import contextlib
import fractions
import io
import json
import os
import pathlib
import sys
import tempfile
import warnings
import zipfile

OK, FAILED, USAGE, NOT_SWEPT, INTERRUPTED = 0, 1, 2, 3, 130

# The member of a .keras file in which `recalibrate` writes down its sweep. Keras ignores it,
# and leaves it out when it saves the model again after more training.
RECORD = "tfbn_population_stats.npz"

_DESCRIPTION = """\
Batch norm statistics of trained Keras models.

In training, batch norm keeps moving averages of mean and variance, and a model infers with
them. They may lag behind or be noisy. These commands replace them with the statistics of the
training data itself (recalibrate), show what a model has (inspect, compare), and write it for
TensorFlow Serving (export, describe)."""

_EPILOG = """\
exit codes: 0 done; 1 failed, with one line on stderr that says why; 2 wrong usage;
3 from inspect: the statistics are not those of a sweep; 130 interrupted.

example:
  tfbn inspect model.keras
  tfbn recalibrate model.keras --data train.npz --out recalibrated.keras
  tfbn compare model.keras model.keras recalibrated.keras
  tfbn export recalibrated.keras serving/model"""

_DATA_HELP = """\
data, already preprocessed as for model.fit:
  train.npy       one array, a sample for each entry of the first axis
  train.npz       arrays named after the model's inputs; for one input also "x", "x_train" or
                  whatever the only array is called. Other arrays are ignored.
  images/         a folder with images, also in folders in it; they are resized to the model's
                  input. Pixels are 0 to 255: give --scale 1/255 if training had them in [0, 1].
  train.tfrecord  tf.train.Examples, with --features features.json:
                  {"x": {"shape": [28, 28, 1], "dtype": "float32"}}
                  "dtype" is float32, int64, or image for encoded images, which have no shape."""


def main(arguments=None):
    """Run the command line.

    Args:
        arguments: A list of strings; those of the process by default.

    Returns:
        The exit code: 0 if done, 1 if it failed, 3 if `inspect` found statistics that are not
        those of a sweep, 130 if it was interrupted. Wrong usage exits with 2.
    """
    args = _parser().parse_args(arguments)
    try:
        with _warnings_of_one_line():
            return args.run(args)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, "interrupted")
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return _say(FAILED, str(error))
    except Exception as error:  # Whatever Keras raises on a model that it cannot read.
        return _say(FAILED, f"{type(error).__name__}: {error}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="tfbn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run, text, *, loads=True, **options):
        added = commands.add_parser(
            run.__name__.strip("_"),
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        added.set_defaults(run=run, unsafe=False)
        added.add_argument("--json", action="store_true", help="print JSON")
        if loads:
            added.add_argument(
                "--unsafe",
                action="store_true",
                help="load code that is stored in the model file (Lambda layers). It can do "
                "anything you can: only for files that you trust",
            )
            added.add_argument("model", metavar="MODEL", help="a .keras file")
        return added

    command(_inspect, "list a model's batch norm layers, and say whether a sweep was made")

    added = command(
        _recalibrate,
        "sweep the training data through a model and write it with the statistics found",
        epilog=_DATA_HELP,
    )
    added.add_argument("--data", required=True, metavar="FILE", help="the training data, see below")
    added.add_argument(
        "--out", required=True, metavar="MODEL2", type=pathlib.Path, help="a new .keras file"
    )
    added.add_argument(
        "--method",
        choices=["pooled", "algorithm2", "exact"],
        default="pooled",
        help="pooled: one pass, which wants large batches (default). algorithm2: one pass, the "
        "paper to the letter. exact: the same for any batch size, for more time",
    )
    added.add_argument("--batch-size", type=_positive, metavar="N", help="in samples (default: 32)")
    added.add_argument("--features", metavar="JSON", help="for a TFRecord file, see below")
    added.add_argument(
        "--scale",
        type=_fraction,
        metavar="FACTOR",
        help="what the pixels of images are multiplied by, for example 1/255 (default: 1)",
    )
    added.add_argument(
        "--include-frozen",
        action="store_true",
        help="sweep layers with trainable=False too, which are left alone otherwise",
    )

    added = command(
        _compare,
        "show how far statistics B are from statistics A, layer by layer",
        epilog="A and B: a .keras file, for what its layers hold, or a file that "
        "PopulationStats.save wrote.\nBoth must fit MODEL. Differences are in standard deviations "
        "of A.",
    )
    added.add_argument("a", metavar="A", type=pathlib.Path)
    added.add_argument("b", metavar="B", type=pathlib.Path)

    added = command(_export, "write a model as a SavedModel, the way TensorFlow Serving wants it")
    added.add_argument(
        "path", metavar="PATH", help="the model's directory; a new version is made in it"
    )

    added = command(_describe, "say where a SavedModel that export wrote comes from", loads=False)
    added.add_argument("path", metavar="SAVED_MODEL", help="its directory, or that of a version")
    return parser


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _fraction(text):
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number or fraction") from error


# The commands.


def _inspect(args):
    from tfbn import keras_models

    model = _load_model(args.model, args.unsafe)
    recorded = _recorded(args.model)
    state, text = _state(model, recorded)
    drift = recorded.compare(recorded.previous) if recorded and recorded.previous else {}
    layers = {
        path: {
            "class": type(layer).__name__,
            "channels": int(layer.moving_mean.shape[0]),
            "momentum": layer.momentum,
            "epsilon": layer.epsilon,
            "trainable": layer.trainable,
            **drift.get(path, {}),
        }
        for path, layer in keras_models.batch_norm_layers(model).items()
    }
    if args.json:
        _print_json({"model": model.name, "layers": layers, "state": state, "why": text})
    else:
        print(f"{args.model}: model {model.name!r}, {len(layers)} batch norm layers")
        _print_table(
            ["layer", "channels", "momentum", "epsilon", "trainable", *_DRIFT_COLUMNS],
            [
                [
                    path,
                    layer["channels"],
                    f"{layer['momentum']:g}",
                    f"{layer['epsilon']:g}",
                    "yes" if layer["trainable"] else "no",
                    *_drift_cells(layer),
                ]
                for path, layer in layers.items()
            ],
        )
        if drift:
            print("off by: what was there before the sweep, against what it found")
        print(f"population statistics: {text}")
    return OK if state in ("swept", "none to sweep") else NOT_SWEPT


def _recalibrate(args):
    import tfbn
    from tfbn import keras_models
    from tfbn.cli import formats as files

    _refuse_existing(args.out)
    if args.out.suffix != ".keras":
        raise ValueError(f"Expected a name for --out that ends in .keras. Received: {args.out}.")
    model = _load_model(args.model, args.unsafe, compiled=True)
    layers = keras_models.batch_norm_layers(model).values()
    if layers and not args.include_frozen and not any(layer.trainable for layer in layers):
        raise ValueError(
            "Expected a model with batch norm layers that are not frozen. Received: "
            f"{args.model}, all of whose {len(layers)} have trainable=False. Give "
            "--include-frozen to sweep them all the same."
        )
    x, batch_size = files.read(args.data, model, args.batch_size, args.features, args.scale)
    stats = tfbn.update_population_stats(
        model,
        x,
        method=args.method,
        batch_size=batch_size,
        include_frozen=args.include_frozen,
        verbose=0 if args.json else "auto",
    )
    _save(model, stats, args.out)
    if args.json:
        found = stats.to_dict()
        for path, off in stats.compare(stats.previous).items():
            found["layers"][path] = {"count": stats[path].count, **off}
        _print_json({"out": str(args.out), **found})
    else:
        stats.summary()
        print(f"Wrote {args.out}. {args.model} is as it was.")
    return OK


def _compare(args):
    import tfbn
    from tfbn import keras_models

    model = _load_model(args.model, args.unsafe)
    held = tfbn.PopulationStats.read(model)
    a, b = (_statistics(path, args.unsafe) for path in (args.a, args.b))
    # Sweeps leave frozen layers out, and what a file's layers hold has them.
    shared = [path for path in a if path in b]
    for stats, name in ((a, args.a), (b, args.b)):
        strange = [path for path in stats if path not in held]
        if strange or not shared:
            raise ValueError(
                f"Expected statistics of the layers of {args.model}. Received: {name}, with layer "
                f"{(strange or list(stats) or [None])[0]!r}."
            )
    a, b, held = (_only(stats, shared) for stats in (a, b, held))
    held.compare(a)  # An error if the shapes are others.
    drift = a.compare(b)
    fingerprint = keras_models.fingerprint(model)
    others = [str(p) for p, s in ((args.a, a), (args.b, b)) if s.fingerprint != fingerprint]
    if args.json:
        _print_json({"layers": drift, "of_other_weights": others})
        return OK
    print(f"{args.b} against {args.a}, layers that differ most first:")
    _print_table(
        ["layer", *_DRIFT_COLUMNS],
        [[path, *_drift_cells(off)] for path, off in drift.items()],
    )
    for name in others:
        print(f"Note that {name} is of other weights than those of {args.model}.")
    return OK


def _export(args):
    import tfbn

    model = _load_model(args.model, args.unsafe)
    recorded = _recorded(args.model)
    if recorded is not None and recorded.mismatch(model) is None:
        recorded.assign(model)  # What is there already; it lets `export` know of the sweep.
    exported = tfbn.export(model, args.path)
    if args.json:
        _print_json(
            {
                "path": str(exported.path),
                "version": exported.version,
                "max_abs_difference": exported.max_abs_difference,
            }
        )
    else:
        print(
            f"Wrote {exported.path}. It predicts what the model does, within "
            f"{exported.max_abs_difference:.1e}."
        )
    return OK


def _describe(args):
    import tfbn

    with contextlib.redirect_stdout(io.StringIO() if args.json else sys.stdout):
        found = tfbn.describe(args.path)
    if args.json:
        _print_json(found)
    return OK


# Model files.


def _load_model(path, unsafe, compiled=False):
    import keras

    if not zipfile.is_zipfile(path) or pathlib.Path(path).suffix != ".keras":
        raise ValueError(
            f"Expected a .keras file, as model.save writes it. Received: {path}"
            + (", no such file." if not os.path.exists(path) else ".")
        )
    try:
        return keras.models.load_model(path, compile=compiled, safe_mode=not unsafe)
    except ValueError as error:
        if unsafe or "safe_mode" not in str(error):
            raise
        raise ValueError(
            f"Expected a model without code in it. Received: {path}, with a Lambda layer or "
            "another function that would run whatever its author wrote. If you trust the file, "
            "give --unsafe."
        ) from error


def _recorded(path):
    """The sweep that is written down in a .keras file, or `None`."""
    import tfbn

    with zipfile.ZipFile(path) as archive:
        if RECORD not in archive.namelist():
            return None
        content = archive.read(RECORD)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / RECORD
        file.write_bytes(content)
        return tfbn.PopulationStats.load(file)


def _state(model, recorded):
    """A word, and a sentence for people, on where a model's statistics are from."""
    from tfbn import keras_models

    if not keras_models.batch_norm_layers(model):
        return "none to sweep", "the model has no batch norm layers"
    if recorded is None:
        return "never", "never swept, or not by `tfbn recalibrate`: no sweep is written in the file"
    why = recorded.mismatch(model)
    if why is not None:
        return "stale", f"stale: {why}"
    return (
        "swept",
        f"swept, method={recorded.method!r}, {recorded.samples} samples in {recorded.batches} "
        f"batches of at most {recorded.batch_size}",
    )


def _statistics(path, unsafe):
    import tfbn

    if path.suffix == ".keras":
        return tfbn.PopulationStats.read(_load_model(path, unsafe))
    return tfbn.PopulationStats.load(path)


def _only(stats, paths):
    import tfbn

    return tfbn.PopulationStats(
        {path: stats[path] for path in paths}, method=stats.method, fingerprint=stats.fingerprint
    )


def _save(model, stats, path):
    """Write a .keras file with its sweep, whole or not at all, where there is none yet."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tfbn-") as hidden:
        partial = pathlib.Path(hidden) / "model.keras"
        record = pathlib.Path(hidden) / RECORD
        model.save(partial)
        stats.save(record)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.write(record, RECORD)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # Takes the name or fails, unlike a rename, so another process's file is safe too.
        try:
            path.open("x").close()
        except FileExistsError:
            _refuse_existing(path)
        os.replace(partial, path)


def _refuse_existing(path):
    if path.exists():
        raise FileExistsError(
            f"Expected a name that is free. Received: {path}, which exists. Nothing is ever "
            "overwritten: give another name, or move it away."
        )


# What is printed.

_DRIFT_COLUMNS = ["mean off by", "largest", "std ratio", "largest"]


def _drift_cells(off):
    if "mean_shift" not in off:
        return ["-"] * 4
    return [
        f"{off['mean_shift']:.3f} std",
        f"{off['mean_shift_max']:.3f} std",
        f"{off['std_ratio']:.3f}",
        f"x {off['std_ratio_max']:.3f}",
    ]


def _print_table(head, rows):
    rows = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells))


def _print_json(found):
    print(json.dumps(found, indent=1))


def _say(code, text):
    print("tfbn: " + " ".join(text.split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def _warnings_of_one_line():
    def show(message, category, filename, lineno, file=None, line=None):
        print("tfbn: warning: " + " ".join(str(message).split()), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = show
        yield
