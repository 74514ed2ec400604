"""Choose the layers to sweep inside `fit`: layers that `fit` trains and inference uses."""

import warnings
from collections.abc import Callable, Collection

import keras
import tensorflow as tf

from tfbn.callbacks.change_detector import ChangeDetector, runs_call
from tfbn.models import keras_models
from tfbn.sweep.first_trace import FirstTrace
from tfbn.sweep.trained_layers import require_trained


class SweptLayers:
    """Choose during one `fit` which layers to sweep, and report early what cannot be swept.

    Before the first step a trace of `call` determines which layers may train, after it the changes
    of the moving statistics. If no statistics change, the trace is used for a network that the user
    has named (its weights may be an average that no step trains) or that runs in every step.

    Args:
        trained: The model that `fit` trains.
        network: The network to sweep.
        named: Whether the user has named the network.
        trace: Calls `check_batch` with the network, the data and the given options.

    Attributes:
        checked: Whether a batch was traced, which requires a built network.
        warned: Whether the trace succeeded, and its warnings were issued.
    """

    def __init__(
        self,
        trained: keras.Model,
        network: keras.Model,
        named: bool,
        trace: Callable[..., FirstTrace | None],
    ):
        self.checked = self.warned = False
        self._first: FirstTrace | None = None
        self._latest: FirstTrace | None = None
        self._network = network
        self._named = named
        self._by_call = network is trained and runs_call(trained)
        self._make_trace = trace
        self._changes = ChangeDetector(network)
        self._reported: set[str] = set()
        self._first_step = True
        self._diverged = False

    def check(self) -> None:
        """Trace one batch, if the network has weights, which the first step may create.

        Raises:
            ValueError: For everything that can be checked before the first step.
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
                f"{error} If `train_step` converts the data, pass it converted: "
                "x=dataset.map(preprocess). If `fit` does not call the model: "
                f"{_advice(network)}."
            ) from error
        self._first = self._latest = first
        self.checked, self.warned = True, self._first is not None
        if certain:
            self._report()

    def begin_step(self) -> None:
        """Store the moving statistics before the first step."""
        self._changes.begin_step()

    def end_step(self) -> None:
        """Check after the first step that it has built and trained the network.

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
                f"The first step of `fit` has not built model {self._network.name!r}. "
                f"{_advice(self._network)}, or call it once before `fit`."
            )
        if self._first is None or self._paths() != frozenset():
            return
        if not self._changes.changed() and not self._first.trained & self._first.used:
            layers = keras_models.batch_norm_layers(self._network)
            require_trained(self._network, layers, frozenset(layers))
        warnings.warn(
            "The first step of `fit` has changed no statistics that inference of model "
            f"{self._network.name!r} uses. They stay as they are, unless a later step trains them. "
            f"{_advice(self._network, self._changes.changed())}.",
            stacklevel=3,
        )

    def paths(self) -> frozenset[str] | None:
        """Return the paths of the layers to sweep; `None` for the layers that `call` trains.

        Returns an empty set, with a warning, if training has diverged. Requires moving averages in
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
        changed = self._changes.changed()
        if not self._changes.stepped or (not changed and (self._by_call or self._named)):
            return None
        # Layers with momentum=1 may train without a change.
        constant = self._changes.constant()
        return changed | (constant if self._first is None else constant & self._first.trained)

    def _report(self) -> None:
        if self._latest is not None:
            self._latest.warn(self._reported)
            self._reported |= self._latest.trained


def _require_call(network: keras.Model) -> None:
    """Raise `ValueError` for a model that is only a container of others."""
    if type(network).call is keras.Model.call:
        raise ValueError(f"Model {network.name!r} has no `call`. {_advice(network)}.")


def _advice(network: keras.Model, unused: Collection[str] = ()) -> str:
    """Return how to name a network inside a model, preferably one without layers in `unused`."""
    layers = keras_models.batch_norm_layers(network)
    unwanted = {layers[path] for path in unused}
    inner = {
        name: not unwanted.isdisjoint(parts)
        for name, value in vars(network).items()
        if isinstance(value, keras.Model)
        and (parts := keras_models.batch_norm_layers(value).values())
    }
    name = min(inner, key=lambda name: inner[name], default="generator")
    return f"Name the network to sweep: PopulationStatsCallback(x, model=gan.{name})"


def _not_finite(model: keras.Model) -> str | None:
    """Return the path of a weight with NaN or infinity, apart from batch norm statistics."""
    replaced = set(map(id, keras_models.all_statistics(model)))
    for weight in model.weights:
        counts = id(weight) not in replaced and keras.backend.is_float_dtype(weight.dtype)
        if counts and not tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(weight))):
            return weight.path
    return None
