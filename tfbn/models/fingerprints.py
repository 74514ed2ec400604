"""Digests of the weights of a model, to tell whether they are still those of a sweep."""

import hashlib
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models


def fingerprint(model: keras.Model) -> str:
    """A digest of the weights that population statistics depend on, as a string.

    These are all floating-point weights but the statistics of the batch norm layers
    themselves. Whether a weight is trainable does not matter, so freezing a model does
    not change its fingerprint; counters and random seeds do not either.
    """
    weights = _owned_weights(model)
    rows = _rows(model, [variable for _, variable in weights])
    digest = hashlib.sha256(rows)
    digest.update("".join(f"{tuple(v.shape)} {v.dtype};" for _, v in weights).encode())
    found = digest.hexdigest()
    _latest[model] = found, frozenset(_of_kinds(weights, rows))
    return found


def digests_of(model: keras.Model, known: str) -> frozenset[int] | None:
    """The digests of the weights with which a model has a fingerprint, or last had it.

    Returns:
        A set of whole numbers as of `digests`, without those of statistics; `None` if the model
        has other weights.
    """
    latest, found = _latest.get(model, (None, None))
    if known == latest:
        return found  # Without reading the weights again, in the midst of training say.
    if known and known == fingerprint(model):
        return _latest[model][1]
    return None


def digests(model: keras.Model) -> list[tuple[keras.Variable, int]]:
    """Digests of a model: 64 bits for every floating-point weight, statistics included.

    They depend on the weight's values, on its name and on the class of its layer, and neither on
    the layer's name nor on its place, so that they are the same in another model or process.

    Returns:
        A list of pairs of a variable and a whole number.
    """
    weights = _owned_weights(model)
    variables = [variable for _, variable in weights]
    found = _of_kinds(weights, _rows(model, variables))
    return [*zip(variables, found, strict=True), *digests_of_statistics(model)]


def digests_of_statistics(model: keras.Model) -> list[tuple[keras.Variable, int]]:
    """The part of `digests` that is about the statistics of batch norm layers."""
    return [
        (variable, _hash(f"{name} {held.shape}".encode() + held.tobytes()))
        for layer in keras_models.batch_norm_layers(model).values()
        for name, variable in keras_models.statistics(layer).items()
        for held in [tf.convert_to_tensor(variable).numpy()]
    ]


def _of_kinds(weights, rows):
    """Digests of weights of which those of values alone are known."""
    kinds = {kind: _hash(kind.encode()) for kind in {kind for kind, _ in weights}}
    values = rows.reshape(-1).view(np.uint64).tolist()
    return [kinds[kind] ^ value for (kind, _), value in zip(weights, values, strict=True)]


def _hash(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# By model: its weights, and the function that gives their digests.
_fingerprint_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# By model: its latest fingerprint, and the digests in it.
_latest: weakref.WeakKeyDictionary[keras.Model, tuple[str, frozenset[int]]] = (
    weakref.WeakKeyDictionary()
)


def _rows(model, weights):
    """The digests of the values of some weights, uint8, shape (weights, 8)."""
    held = tuple(map(keras_models.WeakIdentity, weights))
    known, digests = _fingerprint_functions.get(model, (None, None))
    if known != held:
        # One graph, because reading every weight by itself takes longer than its digest.
        digests = _concrete_digests([variable.value for variable in weights])
        _fingerprint_functions[model] = held, digests
    return digests().numpy()


def _concrete_digests(variables):
    def digests():
        rows = [tf.fingerprint(tf.reshape(variable, [1, -1])) for variable in variables]
        return tf.concat(rows, 0) if rows else tf.zeros([0, 8], tf.uint8)

    with tf.init_scope():
        return tf.function(digests, autograph=False).get_concrete_function()


def _owned_weights(model):
    """The floating-point weights of a model but its statistics, each once, with their kinds.

    Innermost layers come first, so that each weight is met in the one layer that owns it: the
    order of `weights` within an outer layer changes when layers are frozen.
    """
    seen, owned = set(map(id, keras_models.all_statistics(model))), []
    for layer in reversed(keras_models.layers(model).values()):
        own = [v for v in layer.weights if id(v) not in seen]
        seen.update(map(id, own))
        own.sort(key=lambda v: v.name)
        kind = type(layer).__name__
        owned += [(f"{kind}/{v.name}", v) for v in own if keras.backend.is_float_dtype(v.dtype)]
    return owned
