"""The layers that a sweep inside `fit` covers: those that `fit` trains and inference uses."""

import warnings
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbn.callbacks.movement import Movement, runs_call
from tfbn.models import keras_models
from tfbn.sweep.first_trace import FirstTrace
from tfbn.sweep.trained_layers import require_trained


class SweptLayers:
    """Decides during one `fit` which layers to sweep, and reports early what cannot be swept.

    Before the first step a trace of `call` shows which layers may train. After it the moving
    statistics decide. The trace decides again if no layer of the network has moved, and the network
    was named by the user (its weights may be an average that no step trains), or runs in each step.

    Args:
        trained: The model whose `fit` runs.
        network: The network to sweep.
        named: Whether the user has named it.
        trace: `check_batch` of the network and the data, a function of its two last arguments.

    Attributes:
        checked: Whether a batch was traced, for which the network has to be built.
        known: Whether the trace has shown anything, and the warnings have been given.
    """

    def __init__(
        self,
        trained: keras.Model,
        network: keras.Model,
        named: bool,
        trace: Callable[..., FirstTrace | None],
    ):
        self.checked = self.known = False
        self._first: FirstTrace | None = None
        self._latest: FirstTrace | None = None
        self._network = network
        self._named = named
        self._by_call = network is trained and runs_call(trained)
        self._make_trace = trace
        self._movement = Movement(network)
        self._reported: set[str] = set()
        self._first_step = True
        self._diverged = False

    def check(self) -> None:
        """Trace one batch, as soon as the network has weights, which the first step may create.

        Raises:
            ValueError: All that can be said before the first step.
        """
        network = self._network
        _require_call(network)
        if not keras_models.has_weights(network):
            return
        certain = self._by_call and not self._named
        try:
            first = self._make_trace(trained=None, may_train_others=not certain)
        except ValueError as error:
            if self._by_call or self._named:
                raise
            raise ValueError(
                f"{error} If `fit` does not call the model: {_advice(network)}."
            ) from error
        self._first = self._latest = first
        self.checked, self.known = True, self._first is not None
        if certain:
            self._report()

    def begin_step(self) -> None:
        """Note the moving statistics before the first step."""
        self._movement.begin_step()

    def end_step(self) -> None:
        """Check after the first step what only that shows.

        Raises:
            ValueError: If the network is not built, or if neither `call` nor the step trains it.
        """
        if not self._first_step:
            return
        self._first_step = False
        if not self.checked:
            self.check()
        if not self.checked:
            raise ValueError(
                f"Expected `fit` to call model {self._network.name!r}. Received: a model that the "
                f"first step has not built. {_advice(self._network)}, or call it once before `fit`."
            )
        if self._first is None or self._paths() != frozenset():
            return
        if not self._movement.moved() and not self._first.trained & self._first.used:
            layers = keras_models.batch_norm_layers(self._network)
            require_trained(self._network, layers, frozenset(layers))
        warnings.warn(
            "The first step of `fit` has changed no statistics that inference of model "
            f"{self._network.name!r} uses. They stay as they are, unless a later step trains them. "
            f"{_advice(self._network)}.",
            stacklevel=3,
        )

    def paths(self) -> frozenset[str] | None:
        """The paths of the layers to sweep; `None` for those that a trace of `call` trains.

        They are empty, with a warning, if training has diverged. The moving averages have to be in
        the model.
        """
        diverged = _not_finite(self._network)
        if diverged is None:
            return self._paths()
        if not self._diverged:
            warnings.warn(
                f"Weights are not finite ({diverged}): training has diverged. The model keeps its "
                "moving averages, and is not swept.",
                stacklevel=3,
            )
        self._diverged = True
        return frozenset()

    def _paths(self) -> frozenset[str] | None:
        paths = self._trained()
        if self._first is None:
            return paths
        if paths is None:
            self._latest = self._first
        elif self._latest is None or paths != self._latest.trained:
            self._latest = self._make_trace(trained=paths, may_train_others=True)
        if self._latest is None or not self._latest.trained & self._latest.used:
            return frozenset()
        self._report()
        return paths

    @property
    def by_batch(self) -> frozenset[str]:
        """The paths of the layers that inference normalizes by the batch."""
        return frozenset() if self._latest is None else self._latest.by_batch

    @property
    def partly(self) -> frozenset[str]:
        """The paths of the layers that `call` trains in some calls only."""
        return frozenset() if self._latest is None else self._latest.partly

    def _trained(self) -> frozenset[str] | None:
        moved = self._movement.moved()
        if not self._movement.stepped or not (moved or not (self._by_call or self._named)):
            return None
        # With momentum=1 nothing moves.
        may = self._movement.cannot_move()
        return moved | (may if self._first is None else may & self._first.trained)

    def _report(self) -> None:
        if self._latest is not None:
            self._latest.warn(self._reported)
            self._reported |= self._latest.trained


def _require_call(network: keras.Model) -> None:
    """Raise `ValueError` for a model that is only a container of others."""
    if type(network).call is keras.Model.call:
        raise ValueError(
            f"Expected a model with a `call` of its own. Received: model {network.name!r}, which "
            f"only holds others, as a GAN holds its generator. {_advice(network)}."
        )


def _advice(network: keras.Model) -> str:
    inner = (
        name
        for name, value in vars(network).items()
        if isinstance(value, keras.Model) and keras_models.batch_norm_layers(value)
    )
    name = next(inner, "generator")
    return f"Name the network to sweep: PopulationStatsCallback(x, model=gan.{name})"


def _not_finite(model: keras.Model) -> str | None:
    """The name of a weight that is not finite; the statistics that a sweep replaces may be."""
    replaced = set(map(id, keras_models.all_statistics(model)))
    for weight in model.weights:
        counts = id(weight) not in replaced and keras.backend.is_float_dtype(weight.dtype)
        if counts and not tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(weight))):
            return weight.path
    return None
