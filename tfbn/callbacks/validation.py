"""Validate and evaluate the validation data of callbacks."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn import arguments
from tfbn.models.keras_models import Snapshot, inputs_of
from tfbn.models.random_state import unchanged_generators
from tfbn.sweep.adapters import adapt, is_arrays, is_one_shot


def check_validation_data(data: Any, steps: int | None) -> None:
    """Validate the arguments `validation_data` and `validation_steps` of a callback.

    Raises:
        ValueError: If the data is a generator, is empty, is endless without `steps`, has fewer
            batches than `steps` or arrays of different lengths, or is of a type that
            `model.evaluate` does not support.
    """
    arguments.positive(validation_steps=steps)
    x = inputs_of(data)
    if x is None or is_one_shot(x):
        raise ValueError(
            f"Expected validation_data as (x, y), tf.data.Dataset or PyDataset. Received: {data!r}."
        )
    parts = list(keras.utils.unpack_x_y_sample_weight(data))
    source = adapt(parts if is_arrays(parts) else x)
    if source.length == math.inf and steps is None:
        raise ValueError(
            f"Expected validation_steps for endless validation_data. Received: {source.kind}."
        )
    if source.length == 0:
        raise ValueError("Expected validation_data with at least one batch. Received: none.")
    if steps is not None and not is_arrays(x) and (source.length or math.inf) < steps:
        raise ValueError(
            f"Expected validation_steps up to {source.length}, the number of batches. Received: "
            f"{steps}."
        )


def check_targets(model: keras.Model, data: Any) -> None:
    """Raise `ValueError` for data without targets if the loss of `model` requires them."""
    customized = any(
        getattr(type(model), name) is not getattr(keras.Model, name)
        for name in ("test_step", "compute_loss")
    )
    if customized or model.loss is None:
        return
    batch = data.element_spec if isinstance(data, tf.data.Dataset) else data
    if isinstance(data, tf.data.Dataset) or is_arrays(inputs_of(data)):
        _, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            raise ValueError("Expected validation_data with targets. Received: none. Pass (x, y).")


def evaluate(
    model: keras.Model, data: Any, *, batch_size: int | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Return name -> metric on validation data, without a change to the model."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with unchanged(model):
        return model.evaluate(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            steps=steps,
            verbose=0,
            return_dict=True,
        )


@contextlib.contextmanager
def unchanged(model: keras.Model) -> Iterator[None]:
    """Restore metrics, counters and random generators after the context."""
    state = Snapshot(model, model.non_trainable_variables + model.metrics_variables)
    with unchanged_generators(model):
        try:
            yield
        finally:
            state.restore()
