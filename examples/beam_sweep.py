"""Sweep TFRecord files through a saved model with Apache Beam.

    python examples/beam_sweep.py --demo beam-out
    python examples/beam_sweep.py --model model.keras --records "train-*.tfrecord" \\
        --features features.json --method exact --out stats.safetensors

The first needs nothing: it writes records of handwritten digits and a small model trained on them,
sweeps, and compares. The second is for your own files. Both run in two processes on this machine.
`--runner` and whatever else Beam's pipelines take (`--flink_master`, `--project`, ...) run them
elsewhere; workers there need tfbn installed, and model, records and statistics may be wherever
they can be reached (`gs://...`). Change `parser_of` if training preprocesses the records any
further: the model must see what it saw there.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import apache_beam as beam
import tensorflow as tf
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

import tfbn.beam


def main():
    """Run the example."""
    args, beam_options = parse_arguments()
    if args.demo:
        model, validation = prepare(args)
    sweep(args, beam_options)
    with FileSystems.open(args.out) as file:
        stats = tfbn.PopulationStats.from_bytes(file.read())
    stats.summary()
    if not args.demo:
        print(f"\nTo use it: tfbn.PopulationStats.load({args.out!r}).assign(model)")
        return
    print(f"\n{'validation with':24}{'loss':>8}{'accuracy':>12}")
    report("moving averages", model, validation)
    stats.assign(model)
    report("population statistics", model, validation)


def parse_arguments():
    """The command line, and what of it is for Beam."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", metavar="DIR", type=pathlib.Path, help="a directory to write to")
    parser.add_argument("--model", help="a .keras file that all workers can read")
    parser.add_argument("--records", metavar="PATTERN", help="TFRecord files of tf.train.Examples")
    parser.add_argument(
        "--features",
        metavar="FILE",
        help='JSON: {"x": {"shape": [28, 28, 1], "dtype": "float32"}}; several features must be '
        "named like the model's inputs",
    )
    parser.add_argument("--method", choices=["pooled", "algorithm2", "exact"], default="exact")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", help="the file for the statistics (default: stats.safetensors)")
    args, beam_options = parser.parse_known_args()
    if args.demo:
        args.model = str(args.demo / "model.keras")
        args.records = str(args.demo / "train-*.tfrecord")
        args.features = str(args.demo / "features.json")
    elif not (args.model and args.records and args.features):
        parser.error("give --model, --records and --features, or --demo")
    args.out = args.out or str((args.demo or pathlib.Path()) / "stats.safetensors")
    return args, beam_options


def sweep(args, beam_options):
    """From records to a file with the statistics."""
    parse = parser_of(json.loads(pathlib.Path(args.features).read_text()))
    out = args.out

    def save(stats):
        with FileSystems.create(out) as file:
            file.write(stats.to_bytes())

    elsewhere = any(option.startswith("--runner") for option in beam_options)
    options = PipelineOptions(
        beam_options or ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    )
    with beam.Pipeline(None if elsewhere else FnApiRunner(), options) as pipeline:
        _ = (
            pipeline
            | beam.io.ReadFromTFRecord(args.records)
            | beam.Map(parse)
            | beam.Reshuffle()  # Workers share even a single file.
            | tfbn.beam.Collect(args.model, method=args.method, batch_size=args.batch_size)
            | beam.Map(save)
        )


def parser_of(features):
    """The function from a record to what the model takes as x."""
    spec = {
        name: tf.io.FixedLenFeature(feature["shape"], tf.as_dtype(feature["dtype"]))
        for name, feature in features.items()
    }

    def parse(record):
        example = tf.io.parse_single_example(record, spec)
        arrays = {name: value.numpy() for name, value in example.items()}
        return arrays if len(arrays) > 1 else arrays.popitem()[1]

    return parse


def prepare(args):
    """Train a small model on digits, and write it and its training data.

    Returns:
        The model, and what to validate it with.
    """
    import keras
    from digits import build, load

    keras.utils.set_random_seed(0)
    args.demo.mkdir(parents=True, exist_ok=True)
    (x, y), validation = load("digits", 0)
    model = build(x.shape[1:])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=4, verbose=2)
    model.save(args.model)
    features = {"image": {"shape": x.shape[1:], "dtype": "float32"}}
    pathlib.Path(args.features).write_text(json.dumps(features))
    for shard in range(4):
        with tf.io.TFRecordWriter(str(args.demo / f"train-{shard}.tfrecord")) as writer:
            for image in x[shard::4]:
                values = tf.train.Feature(float_list=tf.train.FloatList(value=image.ravel()))
                example = tf.train.Example(features=tf.train.Features(feature={"image": values}))
                writer.write(example.SerializeToString())
    return model, validation


def report(name, model, validation):
    """A row of the table."""
    found = model.evaluate(*validation, batch_size=256, verbose=0, return_dict=True)
    print(f"{name:24}{found['loss']:8.4f}{found['accuracy']:12.4f}")


if __name__ == "__main__":
    main()
