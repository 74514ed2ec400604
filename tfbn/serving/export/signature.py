"""Create the signature of an endpoint: shapes, dtypes, and names that clients can still use."""

import inspect
import keyword
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.serving import provenance, saved_models, versions
from tfbn.serving.saved_models import DEFAULT

# Names that Keras or TensorFlow generate. They include a counter of the process, so the same model
# may have other names in another process.
_MADE_UP = re.compile(r"(keras_tensor|input_layer|args)(_\d+)*")


class Endpoint(NamedTuple):
    """The inputs and outputs that a client uses, name -> `tf.TensorSpec`.

    Attributes:
        inputs: The inputs, in the order of the model's arguments if `ordered`.
        outputs: The outputs, in the order of the model's outputs if `ordered`.
        ordered: Whether the orders are known. A SavedModel does not store them.
    """

    inputs: dict[str, tf.TensorSpec]
    outputs: dict[str, tf.TensorSpec]
    ordered: bool


def arguments(model: keras.Model, given: Any = None) -> list:
    """Return the positional arguments of an endpoint: structures of named `tf.TensorSpec`.

    Args:
        model: A built model.
        given: The argument `input_signature`, or `None` for the model's inputs.

    Raises:
        ValueError: If `given` does not fit the model, or if an input has unknown rank or is not
            dense.
    """
    keras_models.require_built(model)
    given = _own_arguments(model) if given is None else given
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"Expected a list as input_signature. Received: {given!r}. Put it in one.")
    specs = [keras.tree.map_structure(_tensor_spec, argument) for argument in given]
    try:
        inspect.signature(model.call).bind(*specs)
    except TypeError as error:
        raise ValueError(
            f"Expected input_signature with all arguments. Received: {specs} ({error})."
        ) from error
    for spec in keras.tree.flatten(specs):
        if spec.shape.rank is None:
            raise ValueError(f"Expected a known rank. Received: {spec}. Give input_signature.")
    return renamed(specs, _names(specs))


def _own_arguments(model: keras.Model) -> list:
    for tensor in getattr(model, "inputs", None) or ():
        _require_dense(tensor)
    specs = keras_models.input_specs(model)
    if specs is None:
        raise ValueError(
            f"The inputs of model {model.name!r} are not known. Give input_signature, for example "
            "[tf.TensorSpec((None, 9), tf.float32)]."
        )
    return specs


def _tensor_spec(spec: Any) -> tf.TensorSpec:
    if isinstance(spec, tf.TensorSpec):
        return spec
    _require_dense(spec)
    if getattr(spec, "dtype", None) is None:
        raise ValueError(f"Expected tf.TensorSpec(shape, dtype) as signature. Received: {spec!r}.")
    return tf.TensorSpec(spec.shape, spec.dtype, getattr(spec, "name", None))


def _require_dense(spec: Any) -> None:
    """Raise `ValueError` for a ragged or sparse tensor, or the spec of one."""
    if isinstance(spec, (tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices)):
        spec = tf.type_spec_from_value(spec)
    if (
        isinstance(spec, tf.TypeSpec)
        or getattr(spec, "sparse", False)
        or getattr(spec, "ragged", False)
    ):
        raise ValueError(
            f"Expected dense inputs. Received: {spec}. Use tf.TensorSpec in input_signature, and "
            "convert in `call`: tf.RaggedTensor.from_tensor, tf.sparse.from_dense."
        )


def _names(specs: list) -> list[str]:
    """Return the names that TensorFlow gives to the arguments of an endpoint `serve(*args)`.

    Raises:
        ValueError: If TensorFlow would change a given name.
    """

    def serve(*args: Any) -> None:
        return None

    traced = tf.function(serve, input_signature=specs, autograph=False).get_concrete_function()
    names = [tensor.op.name for tensor in traced.inputs]
    # They are also the parameters of a Python function, so they must differ.
    parameters = [re.sub(r"\W", "_", name).lower() for name in names]
    for spec, name, parameter in zip(keras.tree.flatten(specs), names, parameters, strict=True):
        kept = spec.name in (None, "", name)
        if not kept or keyword.iskeyword(name) or parameters.count(parameter) > 1:
            raise ValueError(
                f"Expected unique names of letters, digits and _. Received: {spec.name!r}. Give "
                f"input_signature: tf.TensorSpec({tuple(spec.shape)}, tf.{spec.dtype.name}, name)."
            )
    return names


def renamed(specs: list, names: list[str]) -> list:
    """Return the arguments with other names, one for each tensor, in order.

    Raises:
        ValueError: If TensorFlow would change one of the names.
    """
    flat = [
        tf.TensorSpec(spec.shape, spec.dtype, name)
        for spec, name in zip(keras.tree.flatten(specs), names, strict=True)
    ]
    _names(flat)
    return keras.tree.pack_sequence_as(specs, flat)


def named_inputs(specs: list) -> dict[str, tf.TensorSpec]:
    """Return the inputs of an endpoint, name -> spec, in the order of its arguments."""
    return {spec.name: spec for spec in keras.tree.flatten(specs)}


def named_outputs(outputs: Any) -> dict[str, Any]:
    """Return the outputs of a model, name -> output, with the names of TensorFlow's endpoints.

    The outputs of an endpoint are flat. Nested outputs of a dict are named by the joined keys
    (`boxes_0`); the outputs of a list are numbered.

    Raises:
        ValueError: If two outputs have the same name.
    """
    if not isinstance(outputs, Mapping):
        return {f"output_{i}": output for i, output in enumerate(tf.nest.flatten(outputs))}
    pairs = [pair for name, value in outputs.items() for pair in _named(name, value)]
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"Expected different keys when joined. Received: {names}. Rename one.")
    return named


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    items: Iterable[tuple]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [pair for key, inner in items for pair in _named(f"{name}_{key}", inner)]


def are_flat(outputs: Any) -> bool:
    """Return whether an endpoint can return a model's outputs without a change of structure."""
    inner = outputs.values() if isinstance(outputs, Mapping) else outputs
    return tf.is_tensor(outputs) or all(map(tf.is_tensor, inner))


def of_highest_version(directory: pathlib.Path) -> tuple[int, Endpoint] | None:
    """Return the number and signature of the highest readable version in a model's directory.

    Returns `None` without one. Any tool may have written it.
    """
    for version in versions.newest(directory):
        endpoint = read(version)
        if endpoint is not None:
            return int(version.name), endpoint
    return None


def read(version: str | os.PathLike) -> Endpoint | None:
    """Return the default signature of a SavedModel, or `None` if the directory has none."""
    version = pathlib.Path(version)
    try:
        graph = saved_models.meta_graph(version)
    except (OSError, ValueError):
        return None
    if DEFAULT not in graph.signature_def:
        return None
    signature = graph.signature_def[DEFAULT]
    inputs, outputs = (
        {name: _spec(info, name) for name, info in side.items()}
        for side in (signature.inputs, signature.outputs)
    )
    orders = provenance.names(version)
    if orders is None or list(map(sorted, orders)) != [sorted(inputs), sorted(outputs)]:
        return Endpoint(inputs, outputs, ordered=False)
    inputs, outputs = (
        {name: side[name] for name in order}
        for order, side in zip(orders, (inputs, outputs), strict=True)
    )
    return Endpoint(inputs, outputs, ordered=True)


def _spec(info: Any, name: str) -> tf.TensorSpec:
    shape = tf.TensorShape(info.tensor_shape)
    return tf.TensorSpec(shape, tf.dtypes.as_dtype(info.dtype), name)


def kept_names(
    side: str,
    new: dict[str, tf.TensorSpec],
    before: tuple[int, Endpoint] | None,
    *,
    allow_new: bool,
) -> dict[str, str]:
    """Return name of a new tensor -> name that clients of an older version can use.

    Args:
        side: `"inputs"`: every request for the old version must fit the new one, so dtypes are
            equal, and sizes are equal or unknown. `"outputs"`: dtypes are equal, and sizes are
            equal if both are known.
        new: The tensors of the new version.
        before: Number and endpoint of an older version, or `None` without one.
        allow_new: Whether to return the new names if old clients cannot use the version.

    Raises:
        ValueError: If old clients cannot use the version, unless `allow_new`.
    """
    unchanged = {name: name for name in new}
    if before is None:
        return unchanged
    version, endpoint = before
    old = getattr(endpoint, side)
    names = _matched(new, old, endpoint.ordered, _FITS[side])
    if names is None and not allow_new:
        raise ValueError(
            f"Clients of version {version} cannot use the {side} {_in_words(new)} in place of "
            f"{_in_words(old)}. Set allow_new_signature=True (--allow-new-signature)."
        )
    return unchanged if names is None else {name: names[name] for name in new}


_FITS = {
    "inputs": lambda old, new: old.dtype == new.dtype and old.shape.is_subtype_of(new.shape),
    "outputs": lambda old, new: old.dtype == new.dtype and old.shape.is_compatible_with(new.shape),
}


def _matched(
    new: dict[str, tf.TensorSpec],
    old: dict[str, tf.TensorSpec],
    ordered: bool,
    fits: Callable[[tf.TensorSpec, tf.TensorSpec], bool],
) -> dict[str, str] | None:
    """Return new name -> old name, or `None` without a unique match.

    A chosen name matches if both sides have it. Generated names match by order. Other chosen names
    match by dtype and shape, if this is unique.
    """
    same = {name: name for name in new if name in old and not _MADE_UP.fullmatch(name)}
    left, unused = ([name for name in side if name not in same] for side in (new, old))
    if len(left) != len(unused) or not all(fits(old[name], new[name]) for name in same):
        return None
    made_up = any(side and all(map(_MADE_UP.fullmatch, side)) for side in (left, unused))
    by_order = dict(zip(left, unused, strict=True))
    by_name = dict(zip(left, left, strict=True))
    for guess in [by_order] if ordered and made_up else [by_name]:
        if all(b in unused and fits(old[b], new[a]) for a, b in guess.items()):
            return same | guess
    choices = {a: [b for b in unused if fits(old[b], new[a])] for a in left}
    by_spec = {a: names[0] for a, names in choices.items() if len(names) == 1}
    return same | by_spec if len(set(by_spec.values())) == len(left) else None


def _in_words(specs: Mapping[str, tf.TensorSpec]) -> str:
    return ", ".join(f"{name}: {spec.dtype.name} {spec.shape}" for name, spec in specs.items())


def batches(data: Any, specs: list, argument: str) -> Iterator[list]:
    """Yield a batch of inputs, or the batches of a dataset, as the arguments of an endpoint.

    Args:
        data: A batch for the model, or a `tf.data.Dataset` of batches.
        specs: The endpoint's arguments.
        argument: The name of the user's argument, for messages.

    Yields:
        Batches with the structure and the dtypes of `specs`, without empty batches.

    Raises:
        ValueError: If a batch does not fit `specs`, or if all batches are empty.
    """
    given: Iterable[Any] = [data]
    if isinstance(data, tf.data.Dataset):
        given = map(keras_models.inputs_of, data)
    empty = True
    for batch in given:
        inputs = _as_arguments(batch, specs, argument)
        sizes = [x.shape[0] for x in keras.tree.flatten(inputs) if x.shape.rank]
        if any(sizes) or not sizes:
            empty = False
            yield inputs
    if empty:
        raise ValueError(f"No batches in {argument} {data!r}. Give some, or leave it out.")


def _as_arguments(data: Any, specs: list, argument: str) -> list:
    flat = keras.tree.flatten(specs)
    inputs = [tf.convert_to_tensor(x) for x in keras.tree.flatten(data)]
    fitting = len(inputs) == len(flat) and all(
        spec.shape.is_compatible_with(x.shape)
        and (spec.dtype == tf.string) == (x.dtype == tf.string)
        for x, spec in zip(inputs, flat, strict=True)
    )
    if not fitting:
        raise ValueError(
            f"Expected batches of {flat} in {argument}, with a batch axis. Received: shapes "
            f"{[tuple(x.shape) for x in inputs]} of {[x.dtype.name for x in inputs]}."
        )
    cast = [tf.cast(x, spec.dtype) for x, spec in zip(inputs, flat, strict=True)]
    return keras.tree.pack_sequence_as(specs, cast)
