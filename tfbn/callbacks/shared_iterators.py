"""Detect iterators that both a sweep and `fit` would consume."""

import functools
import gc
import inspect
import itertools
import types
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Larger collections are data, not readers of data.
_MOST = 10_000
_STATELESS = (itertools.count, itertools.repeat)
_NOT_READ: tuple[type, ...] = (
    *(str, bytes, type, types.ModuleType),
    *(np.ndarray, tf.Tensor, tf.Variable, keras.Layer, keras.utils.PyDataset),
)
# Objects of a library are not searched, except for pipelines and their iterators.
_LIBRARIES = ("keras", "tensorflow", "numpy", "pandas", "scipy", "torch")
_PIPELINES = "tensorflow.python.data"


def refuse_shared(x: Any) -> None:
    """Raise `ValueError` if the running `fit` and `x` read the same iterator."""
    ours = {id(one) for one in iterators_in(x)}
    for theirs in iterators_in(_data_of_fit()) if ours else ():
        if id(theirs) in ours:
            raise ValueError(
                "Expected data that `fit` does not read too. Received: an iterator "
                f"({type(theirs).__name__}). Create one for each."
            )


def warn_of_shared_shuffle(x: Any) -> None:
    """Warn if reading `x` in the middle of training changes the order in which `fit` shuffles.

    A `tf.data` pipeline with a seed counts its iterations, and shuffles each differently. Without a
    seed the order is random anyway.
    """
    ours = {id(dataset) for dataset in _seeded_shuffles(x)}
    if any(
        id(dataset) in ours for data in _data_of_fit()[:1] for dataset in _seeded_shuffles(data)
    ):
        warnings.warn(
            "The callback reads the seeded tf.data.Dataset that `fit` shuffles, so the next epoch "
            "has another order than without the callback. To avoid this, give the callback another "
            "dataset, which does not shuffle.",
            stacklevel=3,
        )


def _seeded_shuffles(data: Any) -> list[tf.data.Dataset]:
    """Return the steps of a pipeline that shuffle every iteration by a seed."""
    # Private. No public attribute has the steps of a pipeline.
    steps = [data] if isinstance(data, tf.data.Dataset) else []
    for step in steps:
        steps += step._inputs()
    return [
        step
        for step in steps
        if getattr(step, "_reshuffle_each_iteration", False)
        and (int(step._seed) or int(step._seed2))
    ]


def iterators_in(data: Any) -> list[Iterator]:
    """Return the iterators that reading `data` would advance, directly or nested."""
    seen: dict[int, Any] = {}
    pending = [data]
    while pending and len(seen) < _MOST:
        value = pending.pop()
        if id(value) not in seen and not isinstance(value, _NOT_READ):
            seen[id(value)] = value
            pending += _parts(value)
    return [
        value
        for value in seen.values()
        if hasattr(type(value), "__next__") and not isinstance(value, _STATELESS)
    ]


def _parts(value: Any) -> list:
    """Return the objects that `value` may read from."""
    if isinstance(value, dict):
        return [*itertools.islice(value.values(), _MOST)]
    if isinstance(value, list | tuple | set):
        return [*itertools.islice(value, _MOST)]
    if isinstance(value, types.FunctionType):
        return _used_by(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.GeneratorType):
        # A generator function reads global names.
        used = (
            () if value.gi_frame is None else _globals_of(value.gi_code, value.gi_frame.f_globals)
        )
        running = [] if value.gi_yieldfrom is None else [value.gi_yieldfrom]
        return [*inspect.getgeneratorlocals(value).values(), *used, *running]
    module = type(value).__module__
    if module.startswith(_PIPELINES) or module.partition(".")[0] not in _LIBRARIES:
        attributes = list(getattr(value, "__dict__", {}).values())
        # Iterators of the standard library have no attributes; `gc` returns their references.
        return attributes or (gc.get_referents(value) if hasattr(type(value), "__next__") else [])
    return []


def _used_by(function: types.FunctionType) -> list:
    """Return the closure, defaults and global values of a function."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [
        *cells,
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *_globals_of(function.__code__, function.__globals__),
    ]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _globals_of(code: types.CodeType, names: dict[str, Any]) -> list:
    """Return the values of the global names in a function and its inner functions."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    used = [names[name] for name in code.co_names if name in names]
    return used + [value for part in inner for value in _globals_of(part, names)]


def _data_of_fit() -> list:
    """Return the data arguments of the innermost running `fit`, from its frame."""
    frame = inspect.currentframe()
    while frame is not None:
        values = frame.f_locals
        if frame.f_code.co_name == "fit" and isinstance(values.get("self"), keras.Model):
            return [values.get(name) for name in ("x", "y", "validation_data")]
        frame = frame.f_back
    return []
