"""Restore the moving averages of a model at the end of every epoch, and if `fit` fails."""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tfbn.callbacks import freezing, swapping
from tfbn.callbacks.callback_lists import members
from tfbn.models import fingerprints

# Hooks of a `keras.callbacks.CallbackList` that may run with population statistics in the model.
_HOOKS = ("on_epoch_end", "on_test_begin", "on_test_end", "on_train_end")
_MISSING = object()


@contextlib.contextmanager
def temporary_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object within the context."""
    original = vars(owner).get(name, _MISSING)
    try:
        setattr(owner, name, value)
        yield
    finally:
        if original is not _MISSING:
            setattr(owner, name, original)
        elif name in vars(owner):
            delattr(owner, name)


class FitGuard:
    """Swap population statistics out at the end of every epoch, and if `fit` ends with an error.

    All callbacks of a `fit` share one guard. It wraps hooks of the list that `fit` calls, until
    every callback has finished `on_train_end`, which makes the statistics final.

    Args:
        callbacks: The list that `fit` calls.
        trained: The model that `fit` trains.
    """

    def __init__(self, callbacks: keras.callbacks.CallbackList, trained: keras.Model):
        self._callbacks = callbacks
        self._trained = trained
        self._networks: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self._hooks = contextlib.ExitStack()
        self._validation = contextlib.ExitStack()
        self._guards_validation = False

    @classmethod
    def install(cls, callbacks: keras.callbacks.CallbackList, trained: keras.Model) -> "FitGuard":
        """Return the guard of a `fit`: a new one, or the guard of another callback."""
        for hook in (vars(callbacks).get(_HOOKS[0]), vars(trained).get("evaluate")):
            guard = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(guard, cls):
                if guard._callbacks is callbacks and guard._trained is trained:
                    return guard
                guard.remove()  # Left over from a `fit` with Ctrl-C in a step.
        guard = cls(callbacks, trained)
        for name in _HOOKS:
            guard._wrap(name, functools.partial(guard._run, name))
        return guard

    def add(self, network: keras.Model, validation: bool) -> None:
        """Guard a network.

        Args:
            network: The model that gets population statistics.
            validation: Whether it has them while `fit` evaluates.
        """
        self._networks.add(network)
        if validation and not self._guards_validation:
            self._guards_validation = True
            self._wrap("on_train_batch_begin", self._begin_step)
            self._wrap("on_train_batch_end", self._end_step)

    def remove(self) -> None:
        """Restore all wrapped hooks."""
        self._validation.close()
        self._hooks.close()

    def on_error(self, ended: bool) -> None:
        """Restore the moving averages.

        Args:
            ended: Whether training had ended, after which callbacks freeze the model.
        """
        self.remove()
        for network in self._networks:
            if swapping.swap_out(network) is not None and ended:
                freezing.unfreeze(network)

    def _wrap(self, name: str, wrapper: Callable[..., None]) -> None:
        hook = functools.partial(wrapper, getattr(self._callbacks, name))
        self._hooks.enter_context(temporary_attribute(self._callbacks, name, hook))

    def _run(self, name: str, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            if name == "on_train_end":
                self._validation.close()
                with _kept_backups(self._callbacks):
                    hook(*args, **kwargs)
                    custom = any(map(_is_custom, members(self._callbacks)))
                    for network in self._networks:
                        if custom:
                            _warn_of_replaced_weights(network)
                        swapping.keep(network)
                self.remove()
                return
            hook(*args, **kwargs)
            if name == "on_epoch_end":
                for network in self._networks:
                    swapping.swap_out(network)
        except BaseException:  # Ctrl-C at any point.
            self.on_error(ended=name == "on_train_end")
            raise

    # The wrapper of `evaluate` is removed during training steps: after a Ctrl-C there, no hook
    # would remove it.

    def _begin_step(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._validation.close()
        hook(*args, **kwargs)

    def _end_step(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        hook(*args, **kwargs)
        self._validation.close()
        evaluate = functools.partial(self._evaluate, self._trained.evaluate)
        self._validation.enter_context(temporary_attribute(self._trained, "evaluate", evaluate))

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(*args, **kwargs)
        except BaseException:
            self.on_error(ended=False)
            raise


def _is_custom(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback may run any code; the order of the others is checked before training."""
    package = type(callback).__module__.partition(".")[0]
    return package not in ("keras", "tfbn") or type(callback) is keras.callbacks.LambdaCallback


def _warn_of_replaced_weights(network: keras.Model) -> None:
    """Warn if a callback has changed the weights after the last sweep."""
    stats = swapping.swapped_stats(network)
    if stats is not None and stats.fingerprint != fingerprints.fingerprint(network):
        warnings.warn(
            "A callback after PopulationStatsCallback has replaced the weights that were swept, so "
            "the statistics are not theirs. List it before PopulationStatsCallback.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _kept_backups(callbacks: keras.callbacks.CallbackList) -> Iterator[None]:
    """Defer the deletion of `BackupAndRestore` files to the end of the context.

    Otherwise a crash in the sweep at the end of training would lose all of the training.
    """
    ends = []
    with contextlib.ExitStack() as stack:
        for callback in members(callbacks):
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                ends.append(callback.on_train_end)
                stack.enter_context(
                    temporary_attribute(callback, "on_train_end", lambda logs=None: None)
                )
        yield
    for end in ends:
        end()
