"""Load and trace the model once in each process of a cluster, for all tasks."""

import dataclasses
import os
import threading
import uuid
import weakref
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.sweep.replica import Replica
from tfbn.sweep.trained_layers import layers_to_sweep

# The path of a `.keras` file, or a function that returns the model.
Source = str | Callable[[], keras.Model]


@dataclasses.dataclass(frozen=True)
class ReplicaSpec:
    """The model and settings of a sweep, sent with every task.

    Attributes:
        source: The path of the model, or a function that returns it, see `LocalModel`.
        include_frozen: Whether to sweep layers too that `fit` does not train.
        paths: The layers to sweep, by their names in the process that began the sweep: unnamed
            layers of a subclassed model have other numbers in every process.
        sweep: A unique name of the sweep.
    """

    source: Source
    include_frozen: bool = False
    paths: tuple[str, ...] | None = None
    sweep: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


class LocalModel:
    """A model for tasks that stay in this process."""

    def __init__(self, model: keras.Model):
        self.model = model

    def __call__(self) -> keras.Model:
        """Return the model."""
        return self.model

    def __reduce__(self):
        # Keras would serialize the whole model into every task, and load it in every task.
        raise ValueError(
            f"Expected a model that other processes can load. Received: model {self.model.name!r} "
            "itself, and a map that sends tasks to processes. Pass the path of a .keras file or a "
            "function."
        )


def source_of(model: keras.Model | str | os.PathLike | Callable[[], keras.Model]) -> Source:
    """Return the source of a model, from the user's argument `model`.

    Raises:
        ValueError: See `check_source`.
    """
    return LocalModel(model) if isinstance(model, keras.Model) else check_source(model)


def check_source(model: str | os.PathLike | Callable[[], keras.Model]) -> Source:
    """Validate the path or function that returns a model in any process.

    Raises:
        ValueError: For anything but a function or the path of an existing `.keras` file.
    """
    keras_models.refuse_keras_2(model)
    known = False
    if isinstance(model, str | os.PathLike):
        known = str(model).endswith(".keras")
        if known and tf.io.gfile.exists(os.fspath(model)):
            return os.fspath(model)
    elif callable(model) and not isinstance(model, keras.Model):
        return model
    raise ValueError(
        "Expected the path of a .keras file, or a function that returns the model. Received: "
        f"model={model!r}"
        + (", which does not exist" if known else "")
        + ". Save the model where all workers can load it."
    )


def load(source: Source) -> keras.Model:
    """Load the model from a source of `check_source`.

    Raises:
        ValueError: If Keras cannot load the file.
    """
    if callable(source):
        return source()
    try:
        return keras.models.load_model(source, compile=False)
    except Exception as error:
        raise ValueError(
            f"Expected a .keras file that Keras can load. Received: {source!r} "
            f"({type(error).__name__}: {error}). Pass a function that returns the model."
        ) from error


def make_replica(spec: ReplicaSpec) -> Replica:
    """Load the model of a sweep and create its `Replica`."""
    model = load(spec.source)
    layers = layers_to_sweep(model, spec.include_frozen)
    # Other layers have another fingerprint, which `sweep_shard` refuses.
    if spec.paths is not None and len(spec.paths) == len(layers):
        layers = dict(zip(spec.paths, layers.values(), strict=True))
    return Replica(model, layers, include_frozen=spec.include_frozen)


# Global, because tasks are new objects in every transfer. Sweep -> its replica, as long as it is
# referenced; `_latest` references the replica of the last sweep.
_replicas: weakref.WeakValueDictionary[str, Replica] = weakref.WeakValueDictionary()
_latest: list[Replica] = []
_lock = threading.Lock()
# Ids of this process, once TensorFlow runs in it, and of the processes it was forked from.
_processes: set[int] = set()


def replica_here(spec: ReplicaSpec) -> Replica:
    """Return the `Replica` of a sweep in this process, created in the first call.

    Raises:
        ValueError: If the model cannot be loaded or swept, or the process cannot run TensorFlow.
    """
    _processes.add(os.getpid())
    if len(_processes) > 1:
        raise ValueError(
            "TensorFlow may hang in a process forked from its own. Use "
            "multiprocessing.get_context('spawn')."
        )
    with _lock:
        replica = _replicas.get(spec.sweep)
        if replica is None:
            _latest.clear()
            replica = _replicas[spec.sweep] = make_replica(spec)
        _latest[:] = [replica]
        return replica


def forget(spec: ReplicaSpec) -> None:
    """Release the model in this process."""
    with _lock:
        if _replicas.get(spec.sweep) in _latest:
            _latest.clear()
