"""Validate a sweep on one batch, before `fit` spends time on training."""

from collections.abc import Collection
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models.keras_models import Structure
from tfbn.stats.methods import METHODS
from tfbn.sweep import data, results
from tfbn.sweep.adapters import specs_of
from tfbn.sweep.batches import Batch, empty, flatten
from tfbn.sweep.network import Network, devices
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.replica import naming
from tfbn.sweep.state import NetworkFacts
from tfbn.sweep.trained_layers import all_layers, layers_to_sweep, require_trained, trained_calls
from tfbn.sweep.uncut_passes import UncutPasses


class FirstTrace(NamedTuple):
    """The layers of a network, from a trace of the first batch.

    Attributes:
        trained: Paths of the layers that `call` trains, or that the caller has named.
        partly: Paths of the layers that `call` trains in some calls only.
        used: Paths of the layers whose statistics inference uses.
        by_batch: Paths of the layers that inference normalizes by the batch.
        looping: Paths of the layers in loops that feed themselves, for a method by levels.
    """

    trained: frozenset[str]
    partly: frozenset[str]
    used: frozenset[str]
    by_batch: frozenset[str] = frozenset()
    looping: frozenset[str] = frozenset()

    def warn(self, known: Collection[str] = ()) -> None:
        """Warn as `collect` would, except for known layers."""
        results.warn_of_loops(self.looping - {*known})
        left_out = self.trained - self.used - {*known}
        results.warn_of_left_out(left_out, self.by_batch - {*known})


def check_batch(
    model: keras.Model,
    x: Any,
    options: SweepOptions,
    *,
    trained: Collection[str] | None = None,
    may_train_others: bool = False,
) -> FirstTrace | None:
    """Create the traces of `collect` on one batch; `collect` reuses them.

    A `tf.data.Dataset` is not read, because that would change the order of a shuffled one in `fit`;
    its specs are used instead. A generator is read.

    Args:
        model: See `collect`.
        x: See `collect`.
        options: The `SweepOptions`.
        trained: The paths of the layers that training has changed; `None` for the layers that
            `call` trains.
        may_train_others: Whether to allow that `call` trains no layer, or that inference uses no
            layer, because a custom `train_step` may train others.

    Returns:
        The `FirstTrace`; `None` if it requires the data.

    Raises:
        ValueError: Every error that `collect` would raise before it has run the first batch.
    """
    layers = all_layers(model)
    if trained is not None or not may_train_others:
        layers = layers_to_sweep(model, False, trained)
    else:
        layers = {path: layer for path, layer in layers.items() if layer.trainable}
    batches = data.batches(x, options, model)
    if isinstance(x, tf.data.Dataset):
        inputs = specs_of(x)
        unknown = any(spec.shape.rank is None for spec in keras.tree.flatten(inputs))
        if unknown or hasattr(model, "preprocess_samples"):
            return None
        batches.prepare(inputs)
    else:
        first = batches.first()
        if first is None:
            raise empty()
        inputs = first.inputs
    frozen, partly, ignored = trained_calls(model, layers, inputs)
    if trained is None:
        if not may_train_others:
            require_trained(model, layers, frozen)
        layers = {path: layer for path, layer in layers.items() if path not in frozen}
    network = Network(model, layers, ignored, devices(model)[0])
    with naming(model, Batch(0, inputs, 0, 0, 0)):
        calls, facts = _traced(network, inputs, options.method, static=batches.static)
    used = frozenset(layers if calls is None else calls)
    if not (used or may_train_others):
        raise results.unused(model, layers, facts.by_batch)
    looping = facts.looping if METHODS[options.method].by_level else frozenset()
    return FirstTrace(frozenset(layers), partly, used, facts.by_batch, looping)


def _traced(
    network: Network, inputs: Structure, method: str, *, static: bool
) -> tuple[list[str] | None, NetworkFacts]:
    """Create the trace that a sweep runs.

    Returns:
        The paths of the called layers, `None` if they require the data; and the facts.
    """
    if not network.model.run_eagerly:
        trace = network.trace(inputs, settled=METHODS[method].by_level, static=static)
        return [call.path for call in trace.calls], trace.facts
    if not all(map(tf.is_tensor, flatten(inputs))):
        return None, NetworkFacts()
    passes = UncutPasses(network, static, eager=True)
    observed = passes.run(Batch(0, inputs, 0, 0, 0), None, 1, {})
    return [site.path for site, _ in observed.calls], observed.facts
