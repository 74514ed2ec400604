"""The other callbacks of a `fit`, found from one of them, and copies of a callback."""

import copy
import inspect
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class Place(NamedTuple):
    """A list that a callback is in, itself or in another callback that forwards to it.

    Attributes:
        callbacks: The `keras.callbacks.CallbackList`.
        before: The callbacks in it that are listed before.
        after: Those that are listed after; none, as before, where it cannot be told.
    """

    callbacks: keras.callbacks.CallbackList
    before: list
    after: list


def enclosing(callback: keras.callbacks.Callback) -> list[Place]:
    """The lists that are just calling a callback, the innermost first, `fit`'s own last."""
    # A callback is not told of the others, and Keras keeps their list in a local variable of `fit`.
    # The list itself calls the callback, so it is among the callers.
    inside, places = [callback], []
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model) and frame.f_code.co_name == "fit":
            break
        if isinstance(caller, keras.callbacks.CallbackList):
            places.append(_place(caller, inside))
        if isinstance(caller, keras.callbacks.Callback) and caller is not callback:
            inside.append(caller)
        frame = frame.f_back
    return places


def argument_of_fit(name: str) -> Any:
    """An argument of the `fit` that is calling a callback, `None` if there is no `fit`."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model) and frame.f_code.co_name == "fit":
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _place(
    callbacks: keras.callbacks.CallbackList, inside: list[keras.callbacks.Callback]
) -> Place:
    for i, element in enumerate(callbacks.callbacks):
        if any(element is one for one in inside):
            return Place(callbacks, callbacks.callbacks[:i], callbacks.callbacks[i + 1 :])
    return Place(callbacks, [], [])


def members(callbacks: keras.callbacks.CallbackList | list) -> list[keras.callbacks.Callback]:
    """The callbacks in a list, and those in the lists that they hold."""
    found: list[keras.callbacks.Callback] = []
    pending = list(getattr(callbacks, "callbacks", callbacks))
    while pending:
        callback = pending.pop(0)
        if any(callback is one for one in found):
            continue
        found.append(callback)
        for held in vars(callback).values():
            if isinstance(held, keras.callbacks.CallbackList):
                pending += held.callbacks
    return found


def shared_copy(
    callback: keras.callbacks.Callback, memo: dict, shared: tuple[str, ...]
) -> keras.callbacks.Callback:
    """A deep copy of a callback that shares the values of some attributes with it."""
    memo.update((id(getattr(callback, name)), getattr(callback, name)) for name in shared)
    kind: Any = type(callback)
    copied = memo[id(callback)] = kind.__new__(kind)
    copied.__dict__.update(copy.deepcopy(callback.__dict__, memo))
    return copied


def shallow_copy(callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
    """As `copy.copy` has it for other classes; it would ask `pickled_state`."""
    kind: Any = type(callback)
    copied = kind.__new__(kind)
    copied.__dict__.update(callback.__dict__)
    return copied


def pickled_state(callback: keras.callbacks.Callback, data: tuple[str, ...]) -> dict:
    """The attributes of a callback, for pickle.

    Args:
        callback: A callback.
        data: The attributes that may hold data which cannot be pickled.

    Raises:
        TypeError: If one does.
    """
    for name in data:
        for part in keras.tree.flatten(getattr(callback, name)):
            if isinstance(part, tf.data.Dataset) or hasattr(part, "__next__"):
                kind = "a tf.data.Dataset" if isinstance(part, tf.data.Dataset) else "an iterator"
                raise TypeError(
                    f"Expected data that can be pickled. Received: a {type(callback).__name__} "
                    f"with {kind}, which belongs to its process. Give it arrays or a "
                    "keras.utils.PyDataset, or make it in the process that uses it; copy.deepcopy "
                    "works, and shares the data."
                )
    return dict(vars(callback))
