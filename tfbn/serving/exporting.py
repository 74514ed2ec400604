"""`export`: a model as a SavedModel for TensorFlow Serving. `describe`: where one came from."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import tempfile
import warnings

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tfbn import keras_models
from tfbn import population as statistics
from tfbn._version import __version__
from tfbn.serving.folding import fold as folded_copy

_PROVENANCE = "assets.extra/tfbn.json"
_WARMUP = "assets.extra/tf_serving_warmup_requests"
_MAX_WARMUP_REQUESTS = 1000

# What no batch norm layer's inference needs: reductions over the data and new moving averages.
_TRAINING_OPS = {
    "Mean",
    "SquaredDifference",
    "AssignVariableOp",
    "AssignAddVariableOp",
    "AssignSubVariableOp",
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The directory of the new version.
        version: Its number.
        max_abs_difference: Largest absolute difference between what the loaded SavedModel
            and the model predicted, over all outputs, on the inputs it was verified with.
    """

    path: pathlib.Path
    version: int
    max_abs_difference: float


def export(
    model,
    path,
    version=None,
    input_signature=None,
    fold=False,
    warmup=None,
    require_population=False,
):
    """Write a model's inference network to `path/<version>/` as TensorFlow Serving wants it.

    The SavedModel has one endpoint, `serve` (`serving_default`), with the names of inputs
    and outputs that `model.export` gives. It checks the rank and the known sizes of every
    input before anything else, so that a request of a wrong shape is answered with an
    error: without the check some kernels abort the server's process. Give every size that is
    known: one that is left open is not checked. Loading it needs neither tfbn nor Keras. The
    model is not changed, and its `trainable` flags do not matter.

    Before it is put in place it is loaded again and verified, on `warmup` or on random
    numbers: it predicts what the model predicts, and the first sample's outputs do not depend
    on the other samples.

    Everything is written into a hidden directory in `path` and renamed when it is complete,
    so a server that polls `path` never sees a part of a version, and an export that fails
    leaves nothing behind.

    Args:
        model: A built Keras model, with tfbn's batch norm layers or Keras's own.
        path: The model's directory, one that a server polls. It is made if it does not
            exist.
        version: A whole number; by default one more than the highest there, or 1.
        input_signature: Shapes and dtypes of the inputs, as `model.export` takes them: a
            list of the positional arguments, each a `tf.TensorSpec` or `keras.InputSpec` or
            a list or dict of them. By default the model's own inputs, with a batch of any
            size. A subclassed model that takes other than one floating-point dtype, or
            more than one argument, needs it.
        fold: Whether to export `tfbn.fold(model)` in its place. It is verified against the
            model itself.
        warmup: Requests that a server answers for itself before it says it is ready, so that
            the first real one is not the slow one: a batch of inputs as the model takes
            them, or a `tf.data.Dataset` of batches, of which the first 1000 are taken (as many
            as TensorFlow Serving allows). Needs the extra `serving`.
        require_population: Whether stale batch norm statistics are an error, not a
            warning. They are stale if the model was never swept in this process
            (`tfbn.update_population_stats`, `tfbn.PopulationStatsCallback`), or if its
            weights or statistics have changed since.

    Returns:
        An `Exported` with the version's directory and the difference that was found.

    Raises:
        FileExistsError: If the version exists.
        ImportError: If `warmup` is given and tensorflow-serving-api is not installed.
        ValueError: If the model is not built, if an input has no known rank, if `warmup` does
            not fit the inputs, if the model cannot be folded, if a batch norm layer computes
            batch statistics even in inference mode, if statistics are stale and
            `require_population`, or if the verification fails: outputs may
            differ by 1e-3 of the largest absolute output (or of 1, if that is larger), 2e-2
            where layers compute in 16 bits.
    """
    path = _local(path)
    signature = _input_signature(model, input_signature)
    batches = None if warmup is None else functools.partial(_batches, warmup, signature)
    if batches:
        _require_serving_api()
    stale = _stale(model)
    if stale and require_population:
        raise ValueError(
            "Expected batch norm statistics from a sweep over exactly these weights. "
            f"Received: model {model.name!r}, {stale}. Run tfbn.update_population_stats(model, "
            "data) first, or export without require_population."
        )
    if stale:
        warnings.warn(
            f"The batch norm statistics of model {model.name!r} are not those of its "
            f"population: {stale}. Run tfbn.update_population_stats(model, data) before "
            "tfbn.export.",
            stacklevel=2,
        )
    network = folded_copy(model) if fold else model
    with _made(path):
        version = _next_version(path, version)
        # A server takes only whole numbers for versions, so it never looks in here.
        with tempfile.TemporaryDirectory(dir=path, prefix=".tfbn-export-") as hidden:
            partial = pathlib.Path(hidden) / "partial"
            _save(network, signature, partial)
            loaded = tf.saved_model.load(os.fspath(partial))
            inputs = next(batches()) if batches else keras.tree.map_structure(_random, signature)
            difference = _verify(model, loaded.serve, inputs)
            _write_provenance(partial, model, stale, fold, difference)
            if batches:
                _write_warmup(partial, path.name, _input_names(loaded), batches())
            try:
                os.rename(partial, path / str(version))
            except OSError as error:
                if (path / str(version)).exists():  # Another export was faster.
                    raise _exists(path, version) from error
                raise
    return Exported(path / str(version), version, difference)


def describe(path):
    """Print where an exported model came from, as `export` wrote it down beside it.

    Args:
        path: A model's directory (its highest version is taken) or that of a version.

    Returns:
        A dict with the versions of tfbn, Keras and TensorFlow, the fingerprint of the
        model's weights, `folded`, `stale` (`None`, or why the statistics are not those of the
        population), `max_abs_difference`, and `statistics`: `None` if the model was never
        swept, else the method, samples, batches and batch size of the sweep and for each
        layer its channels, values per channel and how far its moving averages were off
        (see `PopulationStats.compare`).

    Raises:
        ValueError: If there is no such description.
    """
    path = _local(path)
    directory = path
    versions = _versions(path)
    if versions and not (path / _PROVENANCE).exists():
        directory = path / versions[max(versions)]
    try:
        found = json.loads((directory / _PROVENANCE).read_text())
    except OSError as error:
        raise ValueError(
            f"Expected a model that tfbn.export wrote. Received: {str(path)!r}, where "
            f"{str(directory / _PROVENANCE)!r} cannot be read. Give the model's directory or "
            "that of one of its versions."
        ) from error
    print(
        f"{directory}: exported by tfbn {found['tfbn']} with Keras {found['keras']} and "
        f"TensorFlow {found['tensorflow']}"
    )
    print(f"weights: {found['fingerprint']}")
    if found["folded"]:
        print("batch norm is folded away")
    print(f"differs from the model by at most {found['max_abs_difference']:.3g}")
    print(f"batch norm statistics: {_described(found)}")
    for name, layer in ((found["statistics"] or {}).get("layers") or {}).items():
        off = f", mean off by {layer['mean_shift']:.3f} std before" if "mean_shift" in layer else ""
        print(f"  {name}: {layer['channels']} channels, {layer['count']} values each{off}")
    return found


def _described(found):
    swept = found["statistics"]
    if swept is None:
        return found["stale"] or "the model has no batch norm layers"
    text = (
        f"method={swept['method']!r} over {swept['samples']} samples in {swept['batches']} "
        f"batches of at most {swept['batch_size']}"
    )
    return f"{text}, but {found['stale']}" if found["stale"] else text


def _local(path):
    if "://" in os.fspath(path):
        raise ValueError(
            f"Expected a local directory. Received: {os.fspath(path)!r}. Object stores cannot "
            "rename a directory in one step: export locally, then copy the version."
        )
    return pathlib.Path(path)


def _versions(path):
    """Names of the versions in a model's directory, by number; `007` is 7 to a server."""
    names = os.listdir(path) if path.is_dir() else []
    return {int(name): name for name in names if name.isascii() and name.isdigit()}


def _next_version(path, version):
    versions = _versions(path)
    if version is None:
        return max(versions, default=0) + 1
    if isinstance(version, bool) or not isinstance(version, (int, np.integer)) or version < 0:
        raise ValueError(
            "Expected a version that is a whole number, 0 or more, which is what TensorFlow "
            f"Serving looks for. Received: {version!r}. Leave it out for the next free one."
        )
    if version in versions:
        raise _exists(path, version)
    return int(version)


def _exists(path, version):
    return FileExistsError(
        f"Expected a version that does not exist yet. Received: {version}, and "
        f"{str(path / str(version))!r} is there. Leave the version out for the next free one."
    )


@contextlib.contextmanager
def _made(path):
    """A directory that exists; if what follows fails, what had to be made is gone again."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # Another export has put something there.
                made.rmdir()
        raise


def _input_signature(model, given):
    """The positional arguments of the endpoint as a list of structures of `tf.TensorSpec`."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r} of type {type(model)}.")
    if not model.built:
        raise ValueError(
            f"Expected a built model. Received: model {model.name!r}, which has no weights yet. "
            "Call it on a batch first."
        )
    if given is None:
        given = keras_models.input_specs(model)
        if given is None:
            raise ValueError(
                "Expected a model whose inputs are known. Received: subclassed model "
                f"{model.name!r}, of which Keras recorded {model.get_build_config() or 'nothing'}. "
                "Give input_signature, for example "
                "[tf.TensorSpec((None, 28, 28, 1), tf.float32)]."
            )
    if not isinstance(given, (list, tuple)):
        raise ValueError(
            "Expected input_signature to be a list with one entry for each positional argument "
            f"of the model. Received: {given!r}. Put it in a list."
        )
    signature = [keras.tree.map_structure(_tensor_spec, argument) for argument in given]
    try:
        inspect.signature(model.call).bind(*signature)
    except TypeError as error:
        raise ValueError(
            f"Expected inputs for every argument of model {model.name!r}. Received: {signature} "
            f"({error}). Give input_signature, with an entry for each argument."
        ) from error
    for spec in keras.tree.flatten(signature):
        if spec.shape.rank is None:
            raise ValueError(
                f"Expected inputs of known rank, so that the endpoint can check it. Received: "
                f"{spec}. Give input_signature, with None for unknown sizes."
            )
    return signature


def _tensor_spec(spec):
    if isinstance(spec, tf.TensorSpec):
        return spec
    if getattr(spec, "dtype", None) is None:
        raise ValueError(
            "Expected entries of input_signature that have a shape and a dtype. "
            f"Received: {spec!r}. Use tf.TensorSpec(shape, dtype)."
        )
    return tf.TensorSpec(spec.shape, spec.dtype, getattr(spec, "name", None))


def _stale(model):
    """Why the model's statistics are not those of its population, or `None`."""
    if not keras_models.batch_norm_layers(model):
        return None
    swept = statistics.assigned(model)
    return "they were never swept" if swept is None else swept.mismatch(model)


def _save(model, signature, path):
    def serve(*args):  # The name is part of the endpoint: unnamed inputs become `args_0`.
        # Inside the graph: whoever feeds a graph by the names of its tensors, as a server
        # does, goes past the shapes of the signature.
        checked = tf.nest.map_structure(
            lambda x, spec: tf.ensure_shape(x, spec.shape), list(args), signature
        )
        with _watched(model, found):  # Here, since saving traces more than this.
            return model(*checked, training=False)

    found = []
    archive = keras.export.ExportArchive()
    archive.track(model)  # For lookup tables, which are no variables.
    archive.add_endpoint("serve", serve, input_signature=signature)
    archive.write_out(os.fspath(path), verbose=False)
    for layer, op in found:
        raise ValueError(
            "Expected every batch norm layer to use its population statistics. Received: model "
            f"{model.name!r}, whose layer {layer!r} computes those of the batch ({op}) although "
            "the model was called with training=False. Look for training=True where the layer "
            "is called, or set its trainable to False."
        )
    _refuse_training_mode(path)


@contextlib.contextmanager
def _watched(model, found):
    """Add (path, op type) to `found` for each op of training that a batch norm layer makes.

    Only the layer itself knows which ops are its own: names of ops may be shared, and a
    mean elsewhere in the model is none of our business.
    """
    layers = keras_models.batch_norm_layers(model)

    def watch(path, call):
        @functools.wraps(call)  # Keras looks at the arguments of a layer's call.
        def watched(*args, **kwargs):
            graph = tf.compat.v1.get_default_graph()
            before = len(graph.get_operations())
            outputs = call(*args, **kwargs)
            for op in graph.get_operations()[before:]:
                if op.type in _TRAINING_OPS or _is_training(op.type, op.node_def):
                    found.append((path, op.type))
            return outputs

        return watched

    for path, layer in layers.items():
        layer.call = watch(path, layer.call)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.call


def _is_training(op_type, node):
    # A written graph leaves out attributes that have their default value, which here is True.
    return op_type.startswith("FusedBatchNorm") and (
        "is_training" not in node.attr or node.attr["is_training"].b
    )


def _refuse_training_mode(path):
    """Look through the written graph too: a cached trace or a custom layer may hide there."""
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        for node in nodes:
            if _is_training(node.op, node):
                raise ValueError(
                    "Expected no batch norm in training mode in an inference network. "
                    f"Received: {node.op} {node.name!r} with is_training=True. Look for "
                    "training=True in the layer of that name."
                )


def _verify(model, served, inputs):
    """Compare the written model with the original one; the largest absolute difference."""
    predict = tf.function(lambda *inputs: model(*inputs, training=False))
    try:
        expected = predict(*inputs)
    except Exception as error:
        raise ValueError(
            "Expected a model that can be called on what its export is verified with: warmup, or "
            "random numbers in [0, 1), with 64 for unknown sizes. Received: "
            f"{error}. Give the sizes it needs in input_signature, or inputs of its own as warmup."
        ) from error
    outputs = served(*inputs)
    tolerance = _tolerance(model)
    difference, scale = _difference(outputs, expected)
    if not difference <= tolerance * scale:
        raise ValueError(
            f"Expected the SavedModel to predict what model {model.name!r} predicts, within "
            f"{tolerance * scale:.3g}. Received: outputs that differ by {difference:.3g}. Look "
            "for layers that draw random numbers in inference mode too."
        )
    others = served(*keras.tree.map_structure(_only_first_kept, inputs))
    leak, scale = _difference(_first(others), _first(outputs))
    if not leak <= tolerance * scale:
        raise ValueError(
            "Expected outputs of a sample that do not depend on the other samples of its "
            f"batch. Received: model {model.name!r}, where they differ by {leak:.3g} between "
            "two batches. Look for layers that compute over the batch axis, as batch norm does "
            "in training mode."
        )
    return difference


def _require_serving_api():
    try:
        from tensorflow_serving.apis import prediction_log_pb2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Expected tensorflow-serving-api, which has the format of warm-up requests. Received: "
            "an environment without it. Run `pip install 'tfbn[serving]'`; beside "
            "tensorflow-cpu, `pip install --no-deps tensorflow-serving-api` in the version of "
            "TensorFlow."
        ) from error


def _batches(warmup, signature):
    """The requests of `warmup`, each with the structure and the dtypes of the signature."""
    if isinstance(warmup, tf.data.Dataset):
        requests = (
            keras.utils.unpack_x_y_sample_weight(element)[0]
            for element in warmup.take(_MAX_WARMUP_REQUESTS)
        )
    else:
        requests = [warmup]
    specs = keras.tree.flatten(signature)
    request = None
    for request in requests:
        inputs = [tf.convert_to_tensor(x) for x in keras.tree.flatten(request)]
        if not _fit(inputs, specs):
            raise ValueError(
                f"Expected batches of {specs} in warmup. Received: shapes "
                f"{[tuple(x.shape) for x in inputs]} of {[x.dtype.name for x in inputs]}. Give "
                "inputs as the model takes them, with their batch axis."
            )
        cast = [tf.cast(x, spec.dtype) for x, spec in zip(inputs, specs, strict=True)]
        yield keras.tree.pack_sequence_as(signature, cast)
    if request is None:
        raise ValueError(
            f"Expected batches in warmup. Received: {warmup!r}, which is empty. Leave it out."
        )


def _fit(inputs, specs):
    return len(inputs) == len(specs) and all(
        spec.shape.is_compatible_with(x.shape)
        and (spec.dtype == tf.string) == (x.dtype == tf.string)
        for x, spec in zip(inputs, specs, strict=True)
    )


def _input_names(loaded):
    """Names of the inputs in requests, in the order of the endpoint's arguments."""
    [function] = loaded.serve.concrete_functions
    names = loaded.signatures["serving_default"].structured_input_signature[1]
    # Operations are in the order of the arguments, but TensorFlow makes their names lower case.
    by_operation = {name.lower(): name for name in names}
    return [by_operation[tensor.op.name] for tensor in function.inputs[: len(names)]]


def _write_warmup(path, model_name, input_names, batches):
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    with tf.io.TFRecordWriter(os.fspath(path / _WARMUP)) as file:
        for inputs in batches:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model_name
            request.model_spec.signature_name = "serving_default"
            for name, x in zip(input_names, keras.tree.flatten(inputs), strict=True):
                request.inputs[name].CopyFrom(tf.make_tensor_proto(x))
            log = prediction_log_pb2.PredictionLog(
                predict_log=prediction_log_pb2.PredictLog(request=request)
            )
            file.write(log.SerializeToString())


def _random(spec):
    shape = [64 if size is None else size for size in spec.shape]
    if shape and spec.shape[0] is None:
        shape[0] = 3
    generator = np.random.default_rng(0)
    if spec.dtype == tf.string:
        return tf.fill(shape, "a")
    # Non-negative and small, so that logarithms of images and indices of two classes are fine.
    if spec.dtype.is_integer or spec.dtype.is_bool:
        return tf.cast(generator.integers(0, 2, shape), spec.dtype)
    return tf.cast(generator.random(shape), spec.dtype)


def _only_first_kept(x):
    return tf.concat([x[:1], tf.zeros_like(x[1:])], 0) if x.shape.rank else x


def _first(outputs):
    return keras.tree.map_structure(lambda y: y[:1] if y.shape.rank else y, outputs)


def _tolerance(model):
    """Relative to the largest output. Graphs that are optimised apart may round apart."""
    dtypes = {layer.compute_dtype for layer in keras_models.layers(model).values()}
    return 2e-2 if dtypes & {"float16", "bfloat16"} else 1e-3


def _difference(outputs, expected):
    """Largest absolute difference, and largest absolute value that was expected, at least 1."""
    difference, scale = 0.0, 1.0
    for got, want in zip(keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True):
        if got.shape != want.shape:
            return np.inf, scale
        if want.dtype == tf.string:
            difference = max(difference, 0.0 if np.array_equal(got, want) else np.inf)
            continue
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(got - want))
        difference = max(difference, float(np.max(np.nan_to_num(apart, nan=np.inf), initial=0.0)))
        finite = np.abs(want[np.isfinite(want)])
        scale = max(scale, float(np.max(finite, initial=0.0)))
    return difference, scale


def _write_provenance(path, model, stale, folded, difference):
    provenance = {
        "tfbn": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "fingerprint": keras_models.fingerprint(model),
        "stale": stale,
        "folded": folded,
        "max_abs_difference": difference,
        "statistics": _swept(statistics.assigned(model)),
    }
    file = path / _PROVENANCE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(provenance, indent=1))


def _swept(swept):
    if swept is None:
        return None
    off = swept.compare(swept.previous) if swept.previous is not None else {}
    return {
        "method": swept.method,
        "samples": swept.samples,
        "batches": swept.batches,
        "batch_size": swept.batch_size,
        "fingerprint": swept.fingerprint,
        "layers": {
            path: {"channels": len(layer.mean), "count": layer.count, **off.get(path, {})}
            for path, layer in swept.items()
        },
    }
