"""Compute digests of a model's weights, to check whether they changed since a sweep."""

import hashlib
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models


def fingerprint(model: keras.Model) -> str:
    """Return a digest of the weights that population statistics depend on.

    It covers all floating-point weights but the statistics of batch norm layers. Freezing a model,
    counters and random seeds do not change it.
    """
    weights = _owned_weights(model)
    rows = _rows(model, [variable for _, variable in weights])
    digest = hashlib.sha256(rows)
    digest.update("".join(f"{tuple(v.shape)} {v.dtype};" for _, v in weights).encode())
    _latest[model] = digest.hexdigest(), frozenset(_digests(weights, rows))
    return _latest[model][0]


def digests_of(model: keras.Model, expected: str) -> frozenset[int] | None:
    """Return the digests of a model's weights if its latest or current fingerprint is `expected`.

    Returns:
        The integers of `digests` without the ones for statistics, or `None` for another
        fingerprint.
    """
    latest, digests = _latest.get(model, (None, None))
    if expected == latest:
        return digests  # Without a pass over the weights, for example during training.
    if expected and expected == fingerprint(model):
        return _latest[model][1]
    return None


def digests(model: keras.Model) -> list[tuple[keras.Variable, int]]:
    """Return (variable, 64-bit digest) for every floating-point weight, including statistics.

    A digest depends on the weight's values, its name and the class of its layer. It does not depend
    on the layer's name or position, so it is the same in another model or process.
    """
    weights = _owned_weights(model)
    variables = [variable for _, variable in weights]
    values = _digests(weights, _rows(model, variables))
    return [*zip(variables, values, strict=True), *digests_of_statistics(model)]


def digests_of_statistics(model: keras.Model) -> list[tuple[keras.Variable, int]]:
    """Return the pairs of `digests` for the statistics of batch norm layers."""
    return [
        (variable, _hash(f"{name} {value.shape}".encode() + value.tobytes()))
        for layer in keras_models.batch_norm_layers(model).values()
        for name, variable in keras_models.statistics(layer).items()
        for value in [tf.convert_to_tensor(variable).numpy()]
    ]


def _digests(weights, rows):
    """Combine the digests of values in `rows` with digests of the kinds of weights."""
    kinds = {kind: _hash(kind.encode()) for kind in {kind for kind, _ in weights}}
    values = rows.reshape(-1).view(np.uint64).tolist()
    return [kinds[kind] ^ value for (kind, _), value in zip(weights, values, strict=True)]


def _hash(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# model -> its weights, and a function that returns their digests
_fingerprint_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# model -> its latest fingerprint, and its digests
_latest: weakref.WeakKeyDictionary[keras.Model, tuple[str, frozenset[int]]] = (
    weakref.WeakKeyDictionary()
)


def _rows(model, weights):
    """Return the digests of the values of some weights, uint8, shape (weights, 8)."""
    key = tuple(map(keras_models.WeakIdentity, weights))
    cached_key, digests = _fingerprint_functions.get(model, (None, None))
    if cached_key != key:
        # One graph for all: reading a weight eagerly takes longer than its digest.
        digests = _concrete_digests([variable.value for variable in weights])
        _fingerprint_functions[model] = key, digests
    return digests().numpy()


def _concrete_digests(variables):
    def digests():
        rows = [tf.fingerprint(tf.reshape(variable, [1, -1])) for variable in variables]
        return tf.concat(rows, 0) if rows else tf.zeros([0, 8], tf.uint8)

    with tf.init_scope():
        return tf.function(digests, autograph=False).get_concrete_function()


def _owned_weights(model):
    """Return (kind, variable) for the floating-point weights of a model but its statistics.

    Innermost layers come first, so that each weight belongs to the layer that created it: the
    order of `weights` in an outer layer changes when layers are frozen.
    """
    seen, owned = set(map(id, keras_models.all_statistics(model))), []
    for layer in reversed(keras_models.layers(model).values()):
        new = sorted((v for v in layer.weights if id(v) not in seen), key=lambda v: v.name)
        seen.update(map(id, new))
        kind = type(layer).__name__
        owned += [(f"{kind}/{v.name}", v) for v in new if keras.backend.is_float_dtype(v.dtype)]
    return owned
