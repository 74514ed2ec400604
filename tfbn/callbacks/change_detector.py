"""Detect which batch norm layers `fit` trains, by changes of their moving statistics."""

import keras
import numpy as np

from tfbn.models import keras_models
from tfbn.models.keras_models import Snapshot


class ChangeDetector:
    """Detect which layers of a network change their moving statistics during one `fit`.

    Statistics are compared on demand, not in every step. A `train_step` may train a layer in some
    steps only, so an unchanged layer may change later.

    Args:
        network: The network.

    Attributes:
        stepped: Whether a step has begun.
    """

    def __init__(self, network: keras.Model):
        self.stepped = False
        self._network = network
        self._changed: set[str] = set()
        # Path -> a layer's statistics before the first step, on every replica.
        self._before: dict[str, Snapshot] = {}

    def begin_step(self) -> None:
        """Store the statistics before the first step, after other callbacks have set weights."""
        if not self.stepped:
            for path, layer in keras_models.batch_norm_layers(self._network).items():
                if layer.built:
                    variables = keras_models.statistics(layer).values()
                    self._before[path] = Snapshot(self._network, variables)
        self.stepped = True

    def changed(self) -> frozenset[str]:
        """Return the paths of the layers that have changed. Requires moving averages in them."""
        for path, layer in keras_models.batch_norm_layers(self._network).items():
            if layer.built and path not in self._changed and self._differs(path, layer):
                self._changed.add(path)
        return frozenset(self._changed)

    def constant(self) -> frozenset[str]:
        """Return the paths of the layers with `momentum=1`, whose statistics never change."""
        return frozenset(
            path
            for path, layer in keras_models.batch_norm_layers(self._network).items()
            if getattr(layer, "momentum", None) == 1
        )

    def _differs(self, path: str, layer: keras.layers.BatchNormalization) -> bool:
        if path in self._before:
            return not self._before[path].holds()
        # The first step has built the layer.
        initial = {
            "moving_mean": layer.moving_mean_initializer,
            "moving_variance": layer.moving_variance_initializer,
        }
        return any(
            not np.array_equal(variable, initializer(variable.shape, variable.dtype))
            for name, initializer in initial.items()
            for variable in [getattr(layer, name)]
        )


def runs_call(model: keras.Model) -> bool:
    """Whether the steps of a model's `fit` certainly run its `call` in training mode."""
    names = ("train_step", "make_train_function")
    return not vars(model).keys() & set(names) and all(
        getattr(type(model), name) is getattr(keras.Model, name) for name in names
    )
