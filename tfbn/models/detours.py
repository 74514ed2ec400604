"""Replace a function for the calls of one thread, while all other threads run the original."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


class _Place:
    """A function where it is looked up, with the stand-ins of every thread."""

    def __init__(self, owner: type | ModuleType, name: str):
        self.owner = owner
        self.name = name
        self.original = owner.__dict__[name]
        self.users = 0
        self.threads = threading.local()

        @functools.wraps(self.original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            stand_ins = getattr(self.threads, "stand_ins", None)
            if not stand_ins:
                return self.original(*args, **kwargs)
            return stand_ins[-1](self.original, *args, **kwargs)

        self.dispatch = dispatch


_lock = threading.Lock()
_places: dict[tuple[int, str], _Place] = {}


@contextlib.contextmanager
def detour(owner: type | ModuleType, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Within the context this thread's calls of a function run `stand_in` in its place.

    Other threads keep the original, through one call more. The original is put back when the
    last context that replaced it ends. Contexts nest: the innermost stand-in of a thread counts.

    Args:
        owner: The class or module that defines the function.
        name: The function's name there.
        stand_in: Called as `stand_in(original, *args, **kwargs)`.
    """
    key = id(owner), name
    with _lock:
        place = _places.get(key)
        if place is None:
            place = _places[key] = _Place(owner, name)
            setattr(owner, name, place.dispatch)
        place.users += 1
    if not hasattr(place.threads, "stand_ins"):
        place.threads.stand_ins = []
    place.threads.stand_ins.append(stand_in)
    try:
        yield
    finally:
        place.threads.stand_ins.pop()
        with _lock:
            place.users -= 1
            if not place.users:
                del _places[key]
                # Whoever has replaced the function since calls `dispatch`, which passes on.
                if owner.__dict__[name] is place.dispatch:
                    setattr(owner, name, place.original)
