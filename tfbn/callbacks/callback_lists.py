"""Find the other callbacks of a `fit`, and copy a callback."""

import copy
import inspect
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class ListPosition(NamedTuple):
    """The position of a callback in a list, directly or inside another callback.

    Attributes:
        callbacks: The `keras.callbacks.CallbackList`.
        before: The callbacks listed before it; empty if the position is unknown.
        after: The callbacks listed after it; empty if the position is unknown.
    """

    callbacks: keras.callbacks.CallbackList
    before: list
    after: list


def enclosing(callback: keras.callbacks.Callback) -> list[ListPosition]:
    """Return the lists that are calling a callback, the innermost first, the list of `fit` last."""
    # Keras stores the list in a local variable of `fit`, and passes it to no callback. The list
    # calls the callback, so it is in the call stack.
    inside, positions = [callback], []
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model) and frame.f_code.co_name == "fit":
            break
        if isinstance(caller, keras.callbacks.CallbackList):
            positions.append(_position(caller, inside))
        if isinstance(caller, keras.callbacks.Callback) and caller is not callback:
            inside.append(caller)
        frame = frame.f_back
    return positions


def argument_of_fit(name: str) -> Any:
    """Return an argument of the running `fit`, or `None` if there is no `fit`."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model) and frame.f_code.co_name == "fit":
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _position(
    callbacks: keras.callbacks.CallbackList, inside: list[keras.callbacks.Callback]
) -> ListPosition:
    for i, element in enumerate(callbacks.callbacks):
        if any(element is one for one in inside):
            return ListPosition(callbacks, callbacks.callbacks[:i], callbacks.callbacks[i + 1 :])
    return ListPosition(callbacks, [], [])


def members(callbacks: keras.callbacks.CallbackList | list) -> list[keras.callbacks.Callback]:
    """Return the callbacks in a list and in nested lists."""
    result: list[keras.callbacks.Callback] = []
    pending = list(getattr(callbacks, "callbacks", callbacks))
    while pending:
        callback = pending.pop(0)
        if any(callback is one for one in result):
            continue
        result.append(callback)
        for value in vars(callback).values():
            if isinstance(value, keras.callbacks.CallbackList):
                pending += value.callbacks
    return result


def shared_copy(
    callback: keras.callbacks.Callback, memo: dict, shared: tuple[str, ...]
) -> keras.callbacks.Callback:
    """Return a deep copy of a callback that shares the values of some attributes."""
    memo.update((id(getattr(callback, name)), getattr(callback, name)) for name in shared)
    kind: Any = type(callback)
    copied = memo[id(callback)] = kind.__new__(kind)
    copied.__dict__.update(copy.deepcopy(callback.__dict__, memo))
    return copied


def shallow_copy(callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
    """Return a shallow copy. `copy.copy` would call `pickled_state`, which may raise."""
    kind: Any = type(callback)
    copied = kind.__new__(kind)
    copied.__dict__.update(callback.__dict__)
    return copied


def pickled_state(callback: keras.callbacks.Callback, data: tuple[str, ...]) -> dict:
    """Return the attributes of a callback for pickle.

    Args:
        callback: A callback.
        data: The names of the attributes with data.

    Raises:
        TypeError: If an attribute in `data` has a `tf.data.Dataset` or an iterator.
    """
    for name in data:
        for part in keras.tree.flatten(getattr(callback, name)):
            if isinstance(part, tf.data.Dataset) or hasattr(part, "__next__"):
                kind = "a tf.data.Dataset" if isinstance(part, tf.data.Dataset) else "an iterator"
                raise TypeError(
                    f"Cannot pickle a {type(callback).__name__} with {kind}. Pass arrays or a "
                    "PyDataset, or use copy.deepcopy."
                )
    return dict(vars(callback))
