"""Observe the calls of batch norm layers, by functions that are replaced in one thread only."""

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.layer import BatchNormalization

Replacement = Callable[..., Any]


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


class LayerCall(NamedTuple):
    """A call of an observed batch norm layer.

    Attributes:
        path: The path of the layer.
        number: The number of calls of the layer before this one, in the context.
        layer: The layer.
        run: Calls the original. `run(training=True)` changes an argument of the base class.
        inputs, training, mask: The arguments.
        of_subclass: Whether a subclass of Keras's or tfbn's layer defines this `call`. The call of
            the base class in it is the same call, and has the same number.
        counts: Path -> number of calls so far.
    """

    path: str
    number: int
    layer: keras.layers.BatchNormalization
    run: Callable[..., tf.Tensor]
    inputs: tf.Tensor
    training: bool | None
    mask: tf.Tensor | None
    of_subclass: bool
    counts: Mapping[str, int]

    @property
    def contained_another(self) -> bool:
        """Whether the call of a subclass, after `run`, has called its base class."""
        return self.of_subclass and self.counts[self.path] > self.number


Observe = Callable[[LayerCall], tf.Tensor]


@contextlib.contextmanager
def observed_calls(
    layers: Mapping[str, keras.Layer], observe: Observe, outermost: bool = False
) -> Iterator[None]:
    """Call `observe` in place of some batch norm layers within the context, in this thread.

    The two classes that define `call` are patched, so a subclass that extends `super().call()`
    keeps its additions. Other threads and layers are not affected.

    Args:
        layers: Path -> batch norm layer.
        observe: Receives a call, and returns the outputs.
        outermost: Whether to observe the `call` of subclasses too.
    """
    bases = {keras.layers.BatchNormalization, BatchNormalization}
    classes = set(bases)
    if outermost:
        for layer in layers.values():
            classes.add(next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__))
    paths = {id(layer): path for path, layer in layers.items()}
    counts: collections.Counter[str] = collections.Counter()

    def observed(of_subclass, original, layer, inputs, *args, **kwargs):
        if id(layer) not in paths:
            return original(layer, inputs, *args, **kwargs)
        path = paths[id(layer)]
        number = counts[path]
        training, mask = _training_and_mask(*args, **kwargs)
        if of_subclass:  # It may have other arguments, or no mask.
            run = functools.partial(original, layer, inputs, *args, **kwargs)
        else:
            run = functools.partial(original, layer, inputs, training=training, mask=mask)
        arguments = inputs, training, mask
        outputs = observe(LayerCall(path, number, layer, run, *arguments, of_subclass, counts))
        counts[path] = max(counts[path], number + 1)
        return outputs

    with contextlib.ExitStack() as stack:
        for cls in classes:
            replacement = functools.partial(observed, cls not in bases)
            stack.enter_context(patch_in_thread(cls, "call", replacement))
        yield


def _training_and_mask(
    training: Any = None, mask: Any = None, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    return training, mask


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
