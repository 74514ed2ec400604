"""Which batch norm layers `fit` trains: those whose moving statistics its steps change."""

import keras
import numpy as np

from tfbn.models import keras_models
from tfbn.models.keras_models import Snapshot


class Movement:
    """Watches the moving statistics of a network during one `fit`.

    They are compared only when asked for, and no more for layers that have been seen to move. A
    `train_step` may train layers in some steps only, and the layers need not move in the first one.

    Args:
        network: The network.

    Attributes:
        stepped: Whether a step has begun.
    """

    def __init__(self, network: keras.Model):
        self.stepped = False
        self._network = network
        self._moved: set[str] = set()
        # Path -> a layer's statistics before the first step, on every replica.
        self._before: dict[str, Snapshot] = {}

    def begin_step(self) -> None:
        """Note the statistics before the first step, when other callbacks have set weights."""
        if not self.stepped:
            for path, layer in keras_models.batch_norm_layers(self._network).items():
                if layer.built:
                    variables = keras_models.statistics(layer).values()
                    self._before[path] = Snapshot(self._network, variables)
        self.stepped = True

    def moved(self) -> frozenset[str]:
        """The paths of the layers that have moved since, with moving averages in the model."""
        for path, layer in keras_models.batch_norm_layers(self._network).items():
            if layer.built and path not in self._moved and self._differs(path, layer):
                self._moved.add(path)
        return frozenset(self._moved)

    def cannot_move(self) -> frozenset[str]:
        """The paths of the layers with `momentum=1`, which hold their statistics in training."""
        return frozenset(
            path
            for path, layer in keras_models.batch_norm_layers(self._network).items()
            if getattr(layer, "momentum", None) == 1
        )

    def _differs(self, path: str, layer: keras.layers.BatchNormalization) -> bool:
        if path in self._before:
            return not self._before[path].holds()
        # The first step has built it.
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
    """Whether it is certain that the steps of a model's `fit` run its `call` in training mode."""
    own = {"train_step", "make_train_function"} & vars(model).keys()
    kind = type(model)
    return (
        not own
        and kind.train_step is keras.Model.train_step
        and kind.make_train_function is keras.Model.make_train_function
    )
