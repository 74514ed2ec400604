"""Validation data that callbacks evaluate several times: checked before `fit` spends time."""

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
        ValueError: If the data is a generator, is empty, is endless and has no `steps`, has
            fewer batches than `steps`, has arrays of different lengths, or is of a type that
            `model.evaluate` does not take.
    """
    arguments.positive(validation_steps=steps)
    x = inputs_of(data)
    if x is None or is_one_shot(x):
        raise ValueError(
            "Expected validation_data that can be read in every epoch, as (x, y), a "
            f"tf.data.Dataset or a PyDataset. Received: {data!r}."
        )
    parts = list(keras.utils.unpack_x_y_sample_weight(data))
    source = adapt(parts if is_arrays(parts) else x)
    if source.length == math.inf and steps is None:
        raise ValueError(
            f"Expected validation_data that ends. Received: an endless {source.kind}. Say with "
            "`validation_steps` how many batches to evaluate."
        )
    if source.length == 0:
        raise ValueError("Expected validation_data with at least one batch. Received: none.")
    if steps is not None and not is_arrays(x) and (source.length or math.inf) < steps:
        raise ValueError(
            f"Expected validation_data of validation_steps={steps} batches. Received: "
            f"{source.length} batches. Lower validation_steps, or leave it out."
        )


def check_targets(model: keras.Model, data: Any) -> None:
    """Raise `ValueError` for data without targets, where the loss of `model` needs them."""
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
            raise ValueError(
                "Expected validation_data with targets, for a model that is compiled with a loss. "
                "Received: inputs alone. Pass (x, y)."
            )


def evaluate(
    model: keras.Model, data: Any, *, batch_size: int | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Return the metrics of a model on validation data, by name, and leave no trace in it."""
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
    """A context after which metrics, counters and random generators are as before."""
    state = Snapshot(model, model.non_trainable_variables + model.metrics_variables)
    with unchanged_generators(model):
        try:
            yield
        finally:
            state.restore()
