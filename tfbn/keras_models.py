"""What tfbn needs to know of a Keras model: its batch norm layers and its weights."""

import contextlib
import functools
import hashlib
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfbn.detours import detour
from tfbn.layer import BatchNormalization

_STATISTICS = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
)


def batch_norm_layers(model):
    """Every `keras.layers.BatchNormalization` (or subclass) in a model, by path.

    The path joins the names of the layers on the way from the model, whose own name is
    left out. Siblings of the same name are told apart by `#2`, `#3` in their order, so
    paths never collide. A layer that is shared has the first of its paths.

    Returns:
        A dict from path to layer, in the order in which the model holds them.
    """
    return {
        path: layer
        for path, layer in layers(model).items()
        if isinstance(layer, keras.layers.BatchNormalization)
    }


def layers(model):
    """Every layer in a model, by path; outer layers before those inside them."""
    found = {}
    seen = set()

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        found[path] = layer
        names = {}
        # Keras has no public list of a layer's direct sublayers that also covers custom
        # layers and wrappers; `Model.layers` knows only a model's own.
        for child in layer._layers:
            name = child.name
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}#{names[name]}"
            visit(child, f"{path}/{name}" if path else name)

    # A model's own path is empty, unless it is itself the one layer of interest.
    is_batch_norm = isinstance(model, keras.layers.BatchNormalization)
    visit(model, model.name if is_batch_norm else "")
    return found


def input_specs(model):
    """What a model takes, as far as Keras knows: for each argument the specs of a batch.

    Returns:
        A list of structures of `tf.TensorSpec` with a batch axis of any size, or `None` for
        a subclassed model of which Keras has recorded nothing.
    """
    if isinstance(model, keras.Sequential):
        return [_any_batch(tensor) for tensor in model.inputs]
    if getattr(model, "inputs", None):  # Functional: one argument, in the structure of its inputs.
        return [keras.tree.map_structure(_any_batch, model.input)]
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        return None

    def spec(shape):
        return tf.TensorSpec((None, *shape[1:]), model.input_dtype)

    return [keras.tree.map_shape_structure(spec, shape)]


def _any_batch(tensor):
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)


def statistics(layer):
    """The variables that hold a batch norm layer's statistics, by attribute name.

    `moving_mean` and `moving_variance`, and with `renorm=True` also `moving_stddev`,
    `renorm_mean` and `renorm_stddev`.
    """
    found = {name: getattr(layer, name, None) for name in _STATISTICS}
    return {name: variable for name, variable in found.items() if variable is not None}


def always_passes_training_on(model):
    """Whether it is certain that every layer in a model trains where the model does.

    That is so where all code is Keras's or tfbn's own, and no call in a Functional model fixes
    `training`. Else only a trace in training mode tells.
    """
    for layer in layers(model).values():
        if type(layer).call.__module__.partition(".")[0] not in ("keras", "tfbn"):
            return False
        if isinstance(layer, keras.Function):
            for operation in layer.operations:
                # Private. No public list has the arguments of a Functional model's calls.
                for node in operation._inbound_nodes:
                    if node.arguments.kwargs.get("training") is not None:
                        return False
    return True


def structure(model):
    """All that a trace of a model depends on but its weights, to be compared with `==`.

    These are the layers and for each its path, class, `call`, dtype policy, flags, variables and
    plain attributes (epsilon, axis, an activation). Training, prediction, `compile` and
    `set_weights` do not change it. It holds objects weakly.
    """
    return tuple((path, *_structure_of(layer)) for path, layer in layers(model).items())


def _structure_of(layer):
    # Keras's own layers keep caches under private names: the dropout mask of an RNN's cell.
    private = type(layer).__module__.partition(".")[0] == "keras"
    attributes = [
        (name, _comparable(value))
        for name, value in sorted(vars(layer).items())
        if name not in _bookkeeping()
        and not isinstance(value, keras.Layer)
        and not (private and name.startswith("_"))
    ]
    return (
        _Same(layer),
        type(layer),
        getattr(type(layer).call, "__wrapped__", type(layer).call),
        layer.trainable,
        str(layer.dtype_policy.get_config()) if layer.dtype_policy else "",
        tuple(map(_Same, layer.variables)),
        tuple(attributes),
    )


class _Same:
    """An object held weakly, equal only to itself for as long as it lives."""

    def __init__(self, value):
        self._reference = weakref.ref(value)
        self._hash = id(value)

    def __eq__(self, other):
        value = self._reference()
        return isinstance(other, _Same) and value is not None and value is other._reference()

    def __hash__(self):
        return self._hash


def _comparable(value):
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return tuple((str(key), _comparable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    try:
        return _Same(value)
    except TypeError:  # No weak reference to it: objects of built-in types that were not met yet.
        return type(value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@functools.cache
def _bookkeeping():
    """The attributes by which Keras keeps its own books on any layer or model."""
    layer, model = keras.Layer(), keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    books = {*vars(layer), *(vars(model)), *vars(keras.Model())}
    # These come with `fit`, `evaluate` and `predict`; `evaluate` while a callback watches over it.
    later = {"history", "stop_training", "stop_evaluating", "stop_predicting", "optimizer"}
    return frozenset(books | later | {"_eval_epoch_iterator", "evaluate"})


@contextlib.contextmanager
def observed_calls(layers, observe, outermost=False):
    """Within the context this thread's calls of some batch norm layers run `observe`.

    The call is replaced in the two classes that define it, so that a subclass that adds to
    `super().call()` keeps its additions. Other threads, and other layers, are not affected.

    Args:
        layers: Batch norm layers by path.
        observe: Called as `observe(path, layer, call, inputs, training, mask)`, gives the
            outputs. `call(inputs, training=..., mask=...)` is the layer's own.
        outermost: Whether to observe what subclasses add too, in their own `call`.
    """
    classes = {keras.layers.BatchNormalization, BatchNormalization}
    if outermost:
        for layer in layers.values():
            classes.add(next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__))
    paths = {id(layer): path for path, layer in layers.items()}

    def stand_in(original, layer, inputs, training=None, mask=None):
        call = functools.partial(original, layer)
        if id(layer) not in paths:
            return call(inputs, training=training, mask=mask)
        return observe(paths[id(layer)], layer, call, inputs, training, mask)

    with contextlib.ExitStack() as stack:
        for cls in classes:
            stack.enter_context(detour(cls, "call", stand_in))
        yield


@contextlib.contextmanager
def inlined_functions():
    """Within the context this thread runs what `tf.function` gave as part of its caller.

    A trace from before would not have the changes of the context, and one from now must not be
    found later.
    """

    def inlined(call, function, *args, **kwargs):
        return function.python_function(*args, **kwargs)

    with detour(_Function, "__call__", inlined):
        yield


# The type of what `tf.function` returns has no public name.
_Function = type(tf.function(lambda: None))


class Snapshot:
    """The values of some variables of a model, on every replica, to be put back.

    Under a distribution strategy each replica has moving averages of its own.

    Args:
        model: A built model.
        variables: Variables of it.
    """

    def __init__(self, model, variables):
        strategy = model.distribute_strategy
        self._values = [
            (local, local.numpy().copy())
            for variable in variables
            for local in strategy.experimental_local_results(variable.value)
        ]

    def restore(self):
        """Write all values back."""
        for variable, value in self._values:
            variable.assign(value)

    def holds(self):
        """Whether every variable still has its value, to the bit."""
        return all(
            variable.numpy().tobytes() == value.tobytes() for variable, value in self._values
        )


def all_statistics(model):
    """The variables that hold the statistics of all batch norm layers of a model, in order."""
    return [
        variable
        for layer in batch_norm_layers(model).values()
        for variable in statistics(layer).values()
    ]


def fingerprint(model):
    """A digest of the weights that population statistics depend on, as a string.

    These are all floating-point weights but the statistics of the batch norm layers
    themselves. Whether a weight is trainable does not matter, so freezing a model does
    not change its fingerprint; counters and random seeds do not either.
    """
    weights = _owned_weights(model)
    rows = _rows(model, [variable for _, variable in weights])
    digest = hashlib.sha256(rows)
    digest.update("".join(f"{tuple(v.shape)} {v.dtype};" for _, v in weights).encode())
    found = _FINGERPRINT_2 + digest.hexdigest()
    _latest[model] = found, frozenset(_of_kinds(weights, rows))
    return found


def has_fingerprint(model, known):
    """Whether a model's weights are those of a fingerprint, from this version or an older one."""
    if known.startswith(_FINGERPRINT_2):
        return known == fingerprint(model)
    return known == _sha256(model)


def digests_of(model, known):
    """The digests of the weights with which a model has a fingerprint, or last had it.

    Returns:
        A set of whole numbers as of `digests`, without those of statistics; `None` if the model
        has other weights.
    """
    latest, found = _latest.get(model, (None, None))
    if known == latest:
        return found  # Without reading the weights again, in the midst of training say.
    if known and has_fingerprint(model, known):
        fingerprint(model)
        return _latest[model][1]
    return None


def digests(model):
    """What a model holds: 64 bits for every floating-point weight, statistics included.

    They depend on the weight's values, on its name and on the class of its layer, and neither on
    the layer's name nor on its place, so that they are the same in another model or process.

    Returns:
        A list of pairs of a variable and a whole number.
    """
    weights = _owned_weights(model)
    variables = [variable for _, variable in weights]
    found = _of_kinds(weights, _rows(model, variables))
    return [*zip(variables, found, strict=True), *digests_of_statistics(model)]


def digests_of_statistics(model):
    """The part of `digests` that is about the statistics of batch norm layers."""
    return [
        (variable, _hash(f"{name} {held.shape}".encode() + held.tobytes()))
        for layer in batch_norm_layers(model).values()
        for name, variable in statistics(layer).items()
        for held in [tf.convert_to_tensor(variable).numpy()]
    ]


def _of_kinds(weights, rows):
    """Digests of weights of which those of values alone are known."""
    kinds = {kind: _hash(kind.encode()) for kind in {kind for kind, _ in weights}}
    values = rows.reshape(-1).view(np.uint64).tolist()
    return [kinds[kind] ^ value for (kind, _), value in zip(weights, values, strict=True)]


def _hash(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# The first version took SHA-256 of all bytes, which is ten times slower.
_FINGERPRINT_2 = "2:"

_fingerprint_functions = weakref.WeakKeyDictionary()
_latest = weakref.WeakKeyDictionary()  # By model: its latest fingerprint, and the digests in it.


def _rows(model, weights):
    """The digests of the values of some weights, uint8, shape (weights, 8)."""
    held = tuple(map(_Same, weights))
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


def _sha256(model):
    digest = hashlib.sha256()
    for _, variable in _owned_weights(model):
        value = tf.convert_to_tensor(variable).numpy()
        digest.update(f"{value.shape} {variable.dtype};".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _owned_weights(model):
    """The floating-point weights of a model but its statistics, each once, with their kinds.

    Innermost layers come first, so that each weight is met in the one layer that owns it: the
    order of `weights` within an outer layer changes when layers are frozen.
    """
    seen, owned = set(map(id, all_statistics(model))), []
    for layer in reversed(layers(model).values()):
        own = [v for v in layer.weights if id(v) not in seen]
        seen.update(map(id, own))
        own.sort(key=lambda v: v.name)
        kind = type(layer).__name__
        owned += [(f"{kind}/{v.name}", v) for v in own if keras.backend.is_float_dtype(v.dtype)]
    return owned
