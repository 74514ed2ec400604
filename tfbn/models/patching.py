"""Replace a function in one thread only."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

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
