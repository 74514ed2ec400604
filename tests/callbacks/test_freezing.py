"""Tests of flags before, during and after a freeze."""

import keras
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.callbacks import freezing

X = np.random.default_rng(0).normal(3, 2, (32, 6)).astype("float32")


def encoder():
    """Build two layers with weights and a batch norm."""
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8), layers.BatchNormalization()], name="encoder"
    )


class Subclassed(keras.Model):
    """A subclassed model with an encoder and a head."""

    def __init__(self, base):
        super().__init__()
        self.base, self.norm, self.head = base, layers.BatchNormalization(), layers.Dense(1)

    def call(self, inputs, training=None):
        return self.head(self.norm(self.base(inputs, training=training), training=training))


def with_head(base, kind="functional"):
    """Compile a model with an encoder."""
    if kind == "subclassed":
        model = Subclassed(base)
        model(X[:1])
    elif kind == "sequential":
        model = keras.Sequential(
            [keras.Input((6,)), base, layers.BatchNormalization(), layers.Dense(1)]
        )
    else:
        inputs = keras.Input((6,))
        model = keras.Model(inputs, layers.Dense(1)(layers.BatchNormalization()(base(inputs))))
    return compiled(model)


def compiled(model, **options):
    """Compile the model."""
    model.compile("sgd", "mse", **options)
    return model


def fit(model, verbose=0):
    """Train one epoch with the callback, and return it."""
    callback = tfbn.PopulationStatsCallback(X)
    model.fit(X, X[:, :1], callbacks=[callback], verbose=verbose)
    return callback


def trained(model, before):
    """Return how many weights have changed.

    The variance of a layer behind another batch norm layer may change by less than a rounding, so
    moving variances do not count.
    """
    changed = [
        weight.path
        for value, weight in zip(before, model.weights, strict=True)
        if not np.array_equal(value, weight.numpy()) and "moving_variance" not in weight.path
    ]
    return len(changed)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed"])
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_stages_of_fine_tuning(kind, options):
    base = encoder()
    model = with_head(base, kind)
    base.trainable = False
    fit(compiled(model, **options))
    base.trainable = True
    before = [w.numpy() for w in model.weights]
    callback = fit(compiled(model, **options))
    assert trained(model, before) == 10  # 8 by gradients, and the means of 2 layers.
    assert len(callback.stats) == 2
    callback.unfreeze()
    assert len(model.trainable_weights) == 8


@pytest.mark.slow
def test_stages_of_fine_tuning_on_two_devices(two_devices):
    with two_devices.scope():
        base = encoder()
        model = with_head(base)
        base.trainable = False
        callback = fit(compiled(model))
        base.trainable = True
        before = [w.numpy() for w in model.weights]
        with pytest.raises(ValueError, match=r"Call `unfreeze\(\)` of the earlier"):
            fit(compiled(model))
        assert base.trainable and not model.trainable
        callback.unfreeze()
        callback = fit(compiled(model))
    assert trained(model, before) == 10
    assert len(callback.stats) == 2


def test_encoder_in_a_new_model_trains_again(capsys):
    base = encoder()
    fit(compiled(keras.Sequential([base, layers.Dense(6), layers.Dense(1)])))
    assert not base.trainable
    model = with_head(base)
    before = [w.numpy() for w in model.weights]
    with pytest.warns(UserWarning, match="fit` of another model"):
        fit(model, verbose=2)
    assert trained(model, before) == 10
    assert "left frozen by an earlier fit will train" in capsys.readouterr().out


def small():
    """Build a model to freeze and unfreeze without `fit`."""
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, name="dense"),
            layers.BatchNormalization(center=False, scale=False, name="plain"),
            layers.ReLU(name="relu"),
        ],
        name="inner",
    )
    return keras.Sequential([keras.Input((6,)), inner, layers.Dense(1, name="head")])


def flags(model):
    """Return layer -> `trainable`."""
    inner = model.get_layer("inner")
    return {layer.name: bool(layer.trainable) for layer in [*model.layers, *inner.layers]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda model, inner: None, {}),
        (lambda model, inner: setattr(inner, "trainable", True), {}),
        (lambda model, inner: setattr(inner.layers[0], "trainable", True), {}),
        (
            lambda model, inner: (
                setattr(inner, "trainable", True), setattr(inner.layers[0], "trainable", False)
            ),
            {"dense": False},
        ),
        (
            lambda model, inner: (
                setattr(model, "trainable", True), setattr(inner.layers[1], "trainable", False)
            ),
            {"plain": False},
        ),
    ],
)  # fmt: skip
def test_flags_set_since_the_freeze_stay(change, expected):
    model = small()
    freezing.freeze(model)
    assert not any(flags(model).values()) and not model.trainable_variables
    change(model, model.get_layer("inner"))
    freezing.unfreeze(model)
    assert flags(model) == {**dict.fromkeys(flags(model), True), **expected}
    assert model.trainable
    assert freezing.unfreeze(model) == 0


def test_flags_before_the_freeze_are_restored():
    model = small()
    model.get_layer("inner").layers[0].trainable = False
    before = flags(model)
    freezing.freeze(model)
    assert freezing.unfreeze(model) == 7  # All but the frozen one, and the model.
    assert flags(model) == before
    freezing.freeze(model)
    model.layers[1].trainable = True
    with pytest.raises(KeyError), freezing.unchanged_on_error(model):
        freezing.unfreeze(model)
        raise KeyError
    assert [name for name, flag in flags(model).items() if flag] == ["head"]
    freezing.unfreeze(model)
    assert flags(model) == before


def test_layers_of_a_model_whose_own_flag_is_false_are_frozen():
    """TensorFlow skips `model.trainable = False` if it is False already."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization()])
    model.trainable = False
    model.layers[1].trainable = True
    freezing.freeze(model)
    assert not any(layer.trainable for layer in model.layers)
    assert freezing.unfreeze(model) == 1
    assert [layer.trainable for layer in model.layers] == [False, True]
    assert not model.trainable


def test_flags_of_weights_are_restored():
    """LoRA freezes the kernel of a layer that trains."""
    model = compiled(with_head(encoder()))
    dense = model.get_layer("encoder").layers[0]
    dense.enable_lora(2)
    wanted = [weight.path for weight in model.trainable_weights]
    kernel = dense.weights[0].numpy()
    for _ in range(2):
        fit(compiled(model)).unfreeze()
        assert [weight.path for weight in model.trainable_weights] == wanted
        assert not dense._kernel.trainable and dense.lora_kernel_a.trainable
    with pytest.raises(KeyError), freezing.unchanged_on_error(model):
        raise KeyError
    assert [weight.path for weight in model.trainable_weights] == wanted
    np.testing.assert_array_equal(dense.weights[0], kernel)


def test_whole_model_trains_again_if_a_part_is_swept_next():
    model = with_head(encoder())
    fit(model)
    before = [w.numpy() for w in model.weights]
    callback = tfbn.PopulationStatsCallback(X, model=model.get_layer("encoder"), freeze=False)
    model.fit(X, X[:, :1], callbacks=[callback], verbose=0)
    assert trained(model, before) == 10


def test_layers_outside_the_network_that_another_fit_froze_stay_frozen():
    """A teacher next to the swept student."""
    teacher, student = encoder(), encoder()
    student.name = "student"
    fit(compiled(keras.Sequential([teacher, layers.Dense(1)])))
    before = [w.numpy() for w in teacher.weights]
    inputs = keras.Input((6,))
    model = compiled(keras.Model(inputs, layers.Subtract()([student(inputs), teacher(inputs)])))
    model.fit(
        *(X, np.zeros((32, 8))),
        callbacks=[tfbn.PopulationStatsCallback(X, model=student)],
        verbose=0,
    )
    assert trained(teacher, before) == 0


def test_reused_layers_are_reported_and_the_advice_works():
    base = encoder()
    earlier = fit(compiled(keras.Sequential([base, layers.Dense(1)])))
    model = with_head(base)
    with pytest.warns(UserWarning, match="'encoder', frozen by the `fit` of another") as caught:
        latest = fit(model)
    assert "call `unfreeze()`" in str(caught[0].message)
    latest.unfreeze()
    fit(model)  # The same model as before: no warning.
    earlier.unfreeze()
    base.trainable = False
    before = [w.numpy() for w in base.weights]
    fit(compiled(with_head(base)))
    assert trained(base, before) == 0
