"""Build the parser of the command line. Imports no TensorFlow, so that help is fast."""

import argparse
import math
from typing import TYPE_CHECKING

from tfbn._version import __version__
from tfbn.stats.methods import METHODS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Batch norm statistics of trained Keras models.

In training, batch norm keeps moving averages of mean and variance, and a model infers with
them. They may lag behind or be noisy. These commands replace them with the statistics of the
training data itself (recalibrate), show a model's statistics (inspect, compare), copy it with
tfbn's layer or without batch norm (convert, fold), write it for TensorFlow Serving (export,
describe), and compare the data that it is served with its population (drift)."""

_EPILOG = """\
exit codes: 0 done; 1 the answer is no (drift: the data has moved; inspect --check: the
statistics are not known to be those of a sweep); 2 failed, with one line on stderr that says why;
130 interrupted.

example:
  tfbn inspect model.keras
  tfbn recalibrate model.keras --data train.npz --out recalibrated.keras
  tfbn compare model.keras model.keras recalibrated.keras
  tfbn export recalibrated.keras serving/model --monitor
  tfbn drift serving/model answers.json
  tfbn recalibrate serving/model --data field.npz"""

_DATA_HELP = """\
data, already preprocessed as for model.fit:
  train.npy       one array, a sample for each entry of the first axis
  train.npz       arrays named after the model's inputs; for one input also "x", "x_train" or
                  whatever the only array is called. Other arrays are ignored.
  images/         a folder with images, also in folders in it; they are resized to the model's
                  input. Pixels are 0 to 255: give --scale 1/255 if training had them in [0, 1].
  mine.data:train the function train in mine/data.py, called without arguments. It returns what
                  model.fit takes as x: a tf.data.Dataset of TFRecords, a generator, arrays, ..."""

_COMPARE_HELP = """\
A and B: a model file, for the statistics that it holds, or a file of PopulationStats.save.
Both must fit MODEL. Differences are in standard deviations of A."""


_DRIFT_HELP = """\
answers of the signature monitor of a model that was exported with --monitor:
  answers.json  as the REST interface returns them for requests with
                "signature_name": "monitor": one, a list, or one after the other
  answers.npz   one answer, its outputs as arrays by name, text as arrays of bytes"""


def build() -> argparse.ArgumentParser:
    """Build the parser. Its namespace has the name of the command as `command`."""
    parser = argparse.ArgumentParser(
        prog="tfbn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tfbn {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    _add_inspect(commands)
    _add_recalibrate(commands)
    _add_compare(commands)
    _add_copy(commands, "convert", "copy a model with tfbn's batch norm layer for Keras's")
    _add_copy(commands, "fold", "copy a model's inference network without batch norm layers")
    _add_export(commands)
    _add_describe(commands)
    _add_drift(commands)
    return parser


def _add_inspect(commands: "Commands") -> None:
    added = _add(
        commands, "inspect", "list a model's batch norm layers and where their stats are from"
    )
    _add_model(added)
    added.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless the statistics are known to be those of a sweep",
    )


def _add_recalibrate(commands: "Commands") -> None:
    added = _add(
        commands,
        "recalibrate",
        "sweep data through a model and write it with the statistics found",
        epilog=_DATA_HELP,
    )
    _add_model(added, ", or the directory of a model that `tfbn export` wrote")
    added.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="the training data, or unlabelled data from the field, see below",
    )
    added.add_argument(
        "--out",
        metavar="MODEL2",
        help="a new .keras file. Not for a directory, into which its next version is written",
    )
    added.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="exact",
        help="exact: the same for any batch size (default). pooled: one pass, which takes less "
        "time and wants large batches. algorithm2: one pass, the paper to the letter",
    )
    added.add_argument("--batch-size", type=_size, metavar="N", help="in samples (default: 32)")
    added.add_argument(
        "--blend-samples",
        type=_size,
        metavar="N",
        help="for few samples: count the statistics that the model holds as N samples more. "
        "4 protects where fewer than 16 samples may be of data that has not moved at all, and "
        "costs where it has (default: 0)",
    )
    added.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="E",
        help="sweep no more data than it takes for means and standard deviations to have standard "
        "errors of at most E standard deviations, for example 0.02",
    )
    added.add_argument(
        "--validation",
        metavar="FILE",
        help="a .npz file with inputs, named as for --data, and targets y: print the metrics of "
        "the compiled model before and after",
    )
    added.add_argument(
        "--scale",
        type=_factor,
        metavar="FACTOR",
        help="factor for the pixels of images, for example 1/255 (default: 1)",
    )
    added.add_argument(
        "--include-frozen",
        action="store_true",
        help="sweep layers with trainable=False too, which are left alone otherwise",
    )


def _add_compare(commands: "Commands") -> None:
    added = _add(
        commands,
        "compare",
        "show how far statistics B are from statistics A, layer by layer",
        epilog=_COMPARE_HELP,
    )
    _add_model(added)
    added.add_argument("a", metavar="A")
    added.add_argument("b", metavar="B")


def _add_copy(commands: "Commands", name: str, text: str) -> None:
    added = _add(commands, name, text)
    _add_model(added)
    added.add_argument("--out", required=True, metavar="MODEL2", help="a new .keras file")


def _add_export(commands: "Commands") -> None:
    added = _add(
        commands,
        "export",
        "write a model as a SavedModel, as TensorFlow Serving wants it",
        usage="tfbn export MODEL PATH [options]",
    )
    _add_model(added)
    added.add_argument(
        "path",
        metavar="PATH",
        help="the model's directory; a new version is made in it",
    )
    added.add_argument(
        "--sample",
        metavar="FILE",
        help="a .npy or .npz file with inputs, preprocessed as for model.fit, on the first 32 of "
        "which the export is verified (default: random numbers in [0, 1))",
    )
    added.add_argument(
        "--warmup",
        metavar="FILE",
        help="a .npy or .npz file with inputs that the server answers for itself before it is "
        "ready, in requests of 32",
    )
    network = added.add_mutually_exclusive_group()
    network.add_argument(
        "--monitor",
        nargs="*",
        metavar="LAYER",
        help="add the signature that `tfbn drift` needs, for all batch norm layers or for these "
        "paths (see inspect)",
    )
    network.add_argument(
        "--fold", action="store_true", help="export the network with batch norm folded away"
    )
    added.add_argument(
        "--require-population",
        action="store_true",
        help="fail unless the statistics are known to be those of a sweep",
    )
    added.add_argument(
        "--allow-new-signature",
        action="store_true",
        help="write a version with which clients of the one before would fail",
    )


def _add_describe(commands: "Commands") -> None:
    added = _add(commands, "describe", "say where a SavedModel that export wrote comes from")
    added.add_argument("path", metavar="SAVED_MODEL", help="its directory, or a version's")


def _add_drift(commands: "Commands") -> None:
    added = _add(
        commands,
        "drift",
        "compare the data that a model was served with its population, and exit with 1 on drift",
        epilog=_DRIFT_HELP,
    )
    added.add_argument("model", metavar="MODEL", help="its directory, or a version's")
    added.add_argument("answers", metavar="ANSWERS", help="a file of the monitor's answers")


def _add(
    commands: "Commands",
    name: str,
    text: str,
    epilog: str | None = None,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.add_argument("--json", action="store_true", help="print JSON")
    return added


def _add_model(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument(
        "--unsafe",
        action="store_true",
        help="load code that is stored in the model file (Lambda layers). It can do "
        "anything you can: only for files that you trust",
    )
    command.add_argument("model", metavar="MODEL", help=f"a .keras, .h5 or .hdf5 file{more}")


def _size(text: str) -> int:
    # TensorFlow stores sizes in 64 bits.
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _tolerance(text: str) -> float:
    """Convert text to a number over 0 and up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number over 0 and up to 1")
    return number


def _factor(text: str) -> float:
    """Convert text, a number or a fraction such as `1/255`, to a finite number."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number or fraction")
    return value
