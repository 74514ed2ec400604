"""Replace functions in one thread only, and observe the calls of batch norm layers so."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

from tfbn.layer import BatchNormalization

Replacement = Callable[..., Any]
# (path, layer, original call, inputs, training, mask) -> outputs
Observe = Callable[
    [str, keras.Layer, Callable[..., tf.Tensor], tf.Tensor, bool | None, tf.Tensor | None],
    tf.Tensor,
]


class _Patch:
    """A dispatcher in place of a function, with a stack of replacements per thread."""

    def __init__(self, owner: type | ModuleType, name: str):
        self.original = owner.__dict__[name]
        self.users = 0
        self.threads = threading.local()

        @functools.wraps(self.original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            replacements = self.replacements()
            if not replacements:
                return self.original(*args, **kwargs)
            return replacements[-1](self.original, *args, **kwargs)

        self.dispatch = dispatch

    def replacements(self) -> list[Replacement]:
        """Return the replacements of this thread, the innermost last."""
        if not hasattr(self.threads, "replacements"):
            self.threads.replacements = []
        return self.threads.replacements


_lock = threading.Lock()
_patches: dict[tuple[int, str], _Patch] = {}


@contextlib.contextmanager
def patch_in_thread(
    owner: type | ModuleType, name: str, replacement: Replacement
) -> Iterator[None]:
    """Replace a function in this thread within the context.

    Other threads call the original, through a dispatcher. The last context to end restores the
    original. Contexts nest: the innermost replacement of a thread is called.

    Args:
        owner: The class or module that defines the function.
        name: Its name there.
        replacement: Called as `replacement(original, *args, **kwargs)`.
    """
    key = id(owner), name
    with _lock:
        patch = _patches.get(key)
        if patch is None:
            patch = _patches[key] = _Patch(owner, name)
            setattr(owner, name, patch.dispatch)
        patch.users += 1
    patch.replacements().append(replacement)
    try:
        yield
    finally:
        patch.replacements().pop()
        with _lock:
            patch.users -= 1
            if not patch.users:
                del _patches[key]
                # If other code has wrapped `dispatch` since, it stays and calls the original.
                if owner.__dict__[name] is patch.dispatch:
                    setattr(owner, name, patch.original)


@contextlib.contextmanager
def observed_calls(
    layers: Mapping[str, keras.Layer], observe: Observe, outermost: bool = False
) -> Iterator[None]:
    """Call `observe` in place of some batch norm layers within the context, in this thread.

    The two classes that define `call` are patched, so a subclass that extends `super().call()`
    keeps its additions. Other threads and layers are not affected.

    Args:
        layers: Path -> batch norm layer.
        observe: Called as `observe(path, layer, call, inputs, training, mask)`, returns the
            outputs. `call(inputs, training=..., mask=...)` is the original.
        outermost: Whether to observe the `call` of subclasses too.
    """
    classes = {keras.layers.BatchNormalization, BatchNormalization}
    if outermost:
        for layer in layers.values():
            classes.add(next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__))
    paths = {id(layer): path for path, layer in layers.items()}

    def observed(original, layer, inputs, training=None, mask=None):
        call = functools.partial(original, layer)
        if id(layer) not in paths:
            return call(inputs, training=training, mask=mask)
        return observe(paths[id(layer)], layer, call, inputs, training, mask)

    with contextlib.ExitStack() as stack:
        for cls in classes:
            stack.enter_context(patch_in_thread(cls, "call", observed))
        yield


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Inline all `tf.function`s into their caller within the context, in this thread.

    An earlier trace would lack the patches of the context, and a later call must not reuse a trace
    that has them.
    """

    def inlined(call, function, *args, **kwargs):
        return function.python_function(*args, **kwargs)

    with patch_in_thread(_Function, "__call__", inlined):
        yield


# The type that `tf.function` returns has no public name.
_Function = type(tf.function(lambda: None))
