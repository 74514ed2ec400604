"""Run `tfbn export`, `describe` and `drift`."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import tfbn
from tfbn.cli import checks, formats, model_files
from tfbn.cli.errors import FileError, naming, reading
from tfbn.cli.output import print_json, print_lines
from tfbn.files import atomic

_VERIFIED = 32  # The number of inputs of --sample that are used.
_WARM_UP = 1000 * 32  # As many requests of 32 inputs as TensorFlow Serving allows.
_ANSWERS = "answers of the signature monitor, as JSON or .npz"


def export(args: argparse.Namespace) -> int:
    """Write a model as a SavedModel for TensorFlow Serving."""
    model = model_files.load(args.model, args.unsafe)
    sample, warmup = (
        None if path is None else formats.read_inputs(path, model, count)
        for path, count in ((args.sample, _VERIFIED), (args.warmup, _WARM_UP))
    )
    files = (args.model, args.path, args.sample, args.warmup)
    with naming(*(path for path in files if path is not None)):
        model_files.sweep_of(model, args.model)  # Stores the record in the layers, for export.
        exported = tfbn.export(
            model,
            args.path,
            sample=sample,
            warmup=warmup,
            fold=args.fold,
            monitor=False if args.monitor is None else args.monitor or True,
            require_population=args.require_population,
            allow_new_signature=args.allow_new_signature,
        )
    if args.json:
        print_json(
            {
                "path": str(exported.path),
                "version": exported.version,
                "max_abs_difference": exported.max_abs_difference,
            }
        )
    else:
        error = f"{exported.max_abs_difference:.1e}"
        print_lines(f"Wrote {exported.path}. It predicts as the model does, within {error}.")
    return 0


def describe(args: argparse.Namespace) -> int:
    """Print the provenance of a SavedModel that `export` wrote."""
    expected = "a model's directory, or a version's, that tfbn.export wrote"
    with reading(args.path, expected, "Export it again."):
        description = tfbn.describe(args.path)
    if args.json:
        print_json(description)
    else:
        print_lines(*str(description).splitlines())
    return 0


def drift(args: argparse.Namespace) -> int:
    """Compare the data that a served model received with its population. Return 1 for drift."""
    with naming(args.model):
        served = tfbn.ServedStats(args.model)
    with reading(args.answers, _ANSWERS, "Ask the signature 'monitor'."):
        for answer in _answers(args.answers):
            served.add(answer)
    with naming(args.model, args.answers):
        result = served.compare()
    if args.json:
        layers = {path: _known(layer) for path, layer in result.layers.items()}
        network = _known({"p_value": result.p_value, "distance": result.distance})
        verdict = {"drifted": result.drifted, "samples": result.samples}
        print_json({**verdict, **network, "layers": layers})
    else:
        result.summary(print_fn=print_lines)
    return int(result.drifted)


def _answers(path: str) -> Iterator[Any]:
    """Yield the answers in a .npz file, or in a JSON file: one, a list, or concatenated."""
    if checks.suffix(path) == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                yield dict(archive)
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            raise FileError(
                f"Remove Python objects from {path}: save numpy.asarray(text).astype(bytes)."
            ) from error
        return
    text = atomic.read(path).decode().strip()
    if not text:
        raise FileError(f"Expected {_ANSWERS}. Received: {path}, an empty file.")
    decoder = json.JSONDecoder()
    while text:
        answer, end = decoder.raw_decode(text)
        yield from answer if isinstance(answer, list) else [answer]
        text = text[end:].lstrip()


def _known(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Return name -> number, `None` for NaN, which JSON does not support."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}
