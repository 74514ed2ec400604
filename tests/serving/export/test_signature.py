"""Tests of names, dtypes and shapes of an endpoint, and of clients of the version before."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_models import (
    ONES,
    STRUCTURES,
    TwoInputs,
    called,
    dense_model,
    everything_under,
    serve,
    signature_of,
)
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tfbn import describe, export
from tfbn.serving.export import signature


@pytest.mark.quick(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_clients_of_keras_export_need_no_change(tmp_path, structure):
    model = STRUCTURES[structure]()
    model.export(tmp_path / "keras", verbose=False)
    assert signature_of(export(model, tmp_path / "m").path) == signature_of(tmp_path / "keras")


@pytest.mark.filterwarnings("ignore")
def test_a_given_signature_is_that_of_the_endpoint(tmp_path):
    model = TwoInputs()
    model.build((None, 4))
    given = [keras.InputSpec(shape=(2, 4), dtype="float32")]
    [name] = signature_of(export(model, tmp_path, input_signature=given).path)[0][1]
    spec = signature_of(tmp_path / "1")[0][1][name]
    assert (spec.shape, spec.dtype) == ((2, 4), tf.float32)


NESTED = {
    "dict of lists": (lambda u, v, w: {"a": [u, v], "b": w}, ["a_0", "a_1", "b"]),
    "dict of dicts": (lambda u, v, w: {"a": {"p": (u,), "q": v}, "b": w}, ["a_p_0", "a_q", "b"]),
    "lists": (lambda u, v, w: [[u, v], w], ["output_0", "output_1", "output_2"]),
    "list of dicts": (lambda u, v, w: [{"p": u, "q": v}, w], ["output_0", "output_1", "output_2"]),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("structure", NESTED)
def test_nested_outputs_are_named_by_the_way_to_them(tmp_path, structure, fold):
    x = keras.Input((4,), name="x")
    flat = [layers.BatchNormalization()(layers.Dense(n)(x)) for n in (1, 2, 3)]
    nest, names = NESTED[structure]
    model = keras.Model(x, nest(*flat))
    with pytest.warns(UserWarning, match="no sweep"):
        exported = export(model, tmp_path, fold=fold)
    answers = serve(exported.path)(x=ONES)
    assert sorted(answers) == names
    for name, expected in zip(names, keras.tree.flatten(model(ONES)), strict=True):
        np.testing.assert_allclose(answers[name], expected, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="no sweep"):
        assert export(model, tmp_path).version == 2  # Clients still work.


def test_nested_outputs_of_one_name_are_refused(tmp_path):
    x = keras.Input((4,), name="x")
    y = layers.Dense(2)(x)
    with pytest.raises(ValueError, match=r"different keys.*'a_0', 'a_0'"):
        export(keras.Model(x, {"a": [y], "a_0": x}), tmp_path)
    assert everything_under(tmp_path) == []


def test_errors_of_models_and_signatures(tmp_path):
    with pytest.raises(ValueError, match="Expected a Keras model"):
        export(layers.Dense(2), tmp_path)
    with pytest.raises(ValueError, match="Expected a built model"):
        export(keras.Sequential([layers.Dense(2)]), tmp_path)
    model = dense_model()
    with pytest.raises(ValueError, match="a list"):
        export(model, tmp_path, input_signature=tf.TensorSpec((None, 4)))
    with pytest.raises(ValueError, match="known rank"):
        export(model, tmp_path, input_signature=[tf.TensorSpec(None, tf.float32)])
    with pytest.raises(ValueError, match="shape, dtype"):
        export(model, tmp_path, input_signature=[keras.InputSpec(shape=(None, 4))])

    class NoShapes(keras.Model):
        def call(self, x, y):
            return x + y

    model = NoShapes()
    model(ONES, ONES)
    with pytest.raises(ValueError, match="argument: 'y'"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []


# Clients of the version before.


def unnamed(width=4, outputs=2):
    """Build a model whose input has a new generated name each time."""
    inputs = keras.Input((width,))
    return keras.Model(inputs, layers.Dense(outputs)(inputs))


def named(*names, width=4):
    inputs = [keras.Input((width,), name=name) for name in names]
    return keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([inputs[0], *inputs])))


def test_clients_of_an_unnamed_input_go_on(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    first, second, third = unnamed(), unnamed(), named("image")
    assert first.inputs[0].name != second.inputs[0].name
    for model in (first, second, third):
        version = export(model, tmp_path).path
        served = serve(version)(**{first.inputs[0].name: x})
        np.testing.assert_allclose(served["output_0"], model(x), rtol=1e-5, atol=1e-5)
    assert describe(tmp_path)["inputs"] == [first.inputs[0].name]


def test_clients_of_a_named_input_and_output_go_on(tmp_path):
    inputs = keras.Input((4,), name="image")
    outputs = layers.Dense(2)(inputs)
    export(keras.Model({"image": inputs}, {"logits": outputs}), tmp_path)
    model = unnamed()
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    served = serve(export(model, tmp_path).path)(image=x)
    np.testing.assert_allclose(served["logits"], model(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        serve(export(model, tmp_path, fold=True).path)(image=x)["logits"], model(x), rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_clients_of_stock_exports_go_on(tmp_path):
    unnamed().export(tmp_path / "7", verbose=False)
    (tmp_path / "8").mkdir()  # Contains no model, so it has no clients.
    [(name, _)] = signature_of(tmp_path / "7")[0][1].items()
    export(unnamed(), tmp_path)
    assert [*signature_of(tmp_path / "9")[0][1]] == [name]


def test_several_unnamed_inputs_keep_their_order(tmp_path):
    def model(reverse):
        a, b = keras.Input((4,)), keras.Input((4,))
        inputs = [b, a] if reverse else [a, b]  # The numbers in their names, or the reverse.
        first, second = layers.Dense(2)(inputs[0]), layers.Dense(2)(inputs[1])
        return keras.Model(inputs, layers.Subtract()([first, second]))

    old, new = model(reverse=False), model(reverse=True)
    export(old, tmp_path)
    version = export(new, tmp_path).path
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    served = serve(version)(**dict(zip([t.name for t in old.inputs], (x, y), strict=True)))
    np.testing.assert_allclose(served["output_0"], new([x, y]), rtol=1e-5, atol=1e-5)


def test_named_inputs_go_by_name_in_any_order(tmp_path):
    export(named("a", "b"), tmp_path)
    model = named("b", "a")
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    served = serve(export(model, tmp_path).path)(b=x, a=y)
    np.testing.assert_allclose(served["output_0"], model([x, y]), rtol=1e-5, atol=1e-5)


def specs(**shapes):
    return {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in shapes.items()}


V, W, M = (None, 4), (None, 5), (None, 8, 8)

# The inputs of the old version in order, the inputs of the new version, and the old names that
# the new ones go by, in their order; `None` if clients would fail.
MATCHES = [
    (specs(a=V), specs(b=V), ["a"]),
    (specs(a=V), specs(a=W), None),
    (specs(a=V), specs(keras_tensor_3=W), None),
    (specs(a=V), specs(a=V, b=V), None),
    (specs(a=V, b=V), specs(a=V), None),
    (specs(a=V), specs(a=(None, None)), ["a"]),
    (specs(a=(None, None)), specs(a=V), None),
    (specs(a=V), specs(a=(2, 4)), None),
    (specs(height=V, weight=V), specs(weight=V, height=V), ["weight", "height"]),
    (specs(height=V, weight=V), specs(weight=V, size=V), ["weight", "height"]),
    (specs(height=V, weight=V), specs(mass=V, size=V), None),
    (specs(image=M, word=V), specs(text=V, picture=M), ["word", "image"]),
    (specs(keras_tensor=V, keras_tensor_1=V), specs(x=V, y=V), ["keras_tensor", "keras_tensor_1"]),
    (specs(x=V, y=V), specs(keras_tensor_7=V, keras_tensor_8=V), ["x", "y"]),
    (specs(keras_tensor_1=V, keras_tensor=V), specs(keras_tensor=V, keras_tensor_1=V), [0, 1]),
    (specs(args_0=V, args_0_1=V), specs(args_0=V, args_0_1=V), ["args_0", "args_0_1"]),
    (specs(keras_tensor=M, keras_tensor_1=V), specs(keras_tensor_1=M, keras_tensor_2=V), [0, 1]),
    (specs(keras_tensor=M, keras_tensor_1=V), specs(keras_tensor_1=V, keras_tensor_2=M), [1, 0]),
    (specs(), specs(), []),
]


@pytest.mark.parametrize(("old", "new", "want"), MATCHES)
def test_which_old_name_each_new_input_goes_by(old, new, want):
    before = (3, signature.Endpoint(old, {}, ordered=True))
    if want is None:
        with pytest.raises(ValueError, match=r"^Clients of version 3 .*allow_new_signature"):
            signature.kept_names("inputs", new, before, allow_new=False)
        kept = signature.kept_names("inputs", new, before, allow_new=True)
        assert list(kept.values()) == list(new)
    else:
        want = [name if isinstance(name, str) else list(old)[name] for name in want]
        kept = signature.kept_names("inputs", new, before, allow_new=False)
        assert list(kept.items()) == list(zip(new, want, strict=True))


def test_without_an_order_two_unnamed_inputs_of_one_kind_cannot_be_told_apart():
    old = specs(keras_tensor=V, keras_tensor_1=V)
    before = (1, signature.Endpoint(old, {}, ordered=False))
    with pytest.raises(ValueError, match="Clients of version 1"):
        signature.kept_names("inputs", specs(a=V, b=V), before, allow_new=False)
    kept = signature.kept_names("inputs", old, before, allow_new=False)
    assert kept == {name: name for name in old}


names = st.lists(
    st.sampled_from(["a", "b", "c", "keras_tensor", "keras_tensor_1", "input_layer_2", "args_0"]),
    unique=True,
    max_size=4,
)


@given(names, names, st.lists(st.sampled_from([V, W, M]), min_size=4, max_size=4), st.booleans())
def test_old_requests_always_fit(old, new, shapes, ordered):
    old = specs(**dict(zip(old, shapes, strict=False)))
    new = specs(**dict(zip(new, shapes[::-1], strict=False)))
    try:
        kept = signature.kept_names(
            "inputs", new, (1, signature.Endpoint(old, {}, ordered)), allow_new=False
        )
    except ValueError:
        # Equal chosen names with equal specs are always allowed.
        assert old != new or any(name[0] in "kia" and len(name) > 1 for name in new)
        return
    assert sorted(kept.values()) == sorted(old)
    assert all(old[b].shape == new[a].shape for a, b in kept.items())


def test_outputs_are_compared_where_sizes_are_known():
    def kept(old, new):
        before = (1, signature.Endpoint({}, old, ordered=True))
        return signature.kept_names("outputs", new, before, allow_new=False)

    assert kept(specs(y=(None, None)), specs(output_0=V)) == {"output_0": "y"}
    assert kept(specs(y=V), specs(output_0=(None, None))) == {"output_0": "y"}
    with pytest.raises(ValueError, match="cannot use the outputs"):
        kept(specs(y=V), specs(y=W))


def test_another_structure_is_refused_unless_told_to(tmp_path):
    export(named("a"), tmp_path)
    before = everything_under(tmp_path)
    for other in (unnamed(width=5), named("a", "b"), unnamed(outputs=3)):
        with pytest.raises(ValueError, match=r"^Clients of version 1 .*\(None, "):
            export(other, tmp_path)
        assert everything_under(tmp_path) == before
    model = unnamed(width=5)
    export(model, tmp_path, allow_new_signature=True)
    assert [*signature_of(tmp_path / "2")[0][1]] == [model.inputs[0].name]
    # With allow_new, names are still kept if the structure is the same.
    export(unnamed(width=5), tmp_path, allow_new_signature=True)
    assert signature_of(tmp_path / "3") == signature_of(tmp_path / "2")


@pytest.mark.quick(2)
@pytest.mark.parametrize("content", [b"", b"\x00\xff not a model", None])
def test_a_version_that_cannot_be_read_has_no_clients(tmp_path, content):
    (tmp_path / "4").mkdir()
    if content is not None:
        (tmp_path / "4" / "saved_model.pb").write_bytes(content)
    assert export(unnamed(), tmp_path).version == 5


def test_outputs_that_are_no_tensors_are_refused(tmp_path):
    class Deep(keras.Model):
        def call(self, x):
            return {"a": [x, "text"]}

    with pytest.raises(ValueError, match="Output 'a_1' is 'text' and not a tensor"):
        export(called(Deep(), ONES), tmp_path)
    assert everything_under(tmp_path) == []


RAGGED = tf.RaggedTensorSpec([None, None], tf.int32)
SPARSE = tf.SparseTensorSpec([None, 4], tf.float32)
NOT_DENSE = {
    "ragged": [RAGGED],
    "sparse": [SPARSE],
    "ragged in a dict": [{"a": tf.TensorSpec((None, 4), tf.float32), "b": RAGGED}],
    "sparse in a list": [[SPARSE]],
    "sparse in a dict in a list": [[{"a": SPARSE}]],
    "a second argument": [tf.TensorSpec((None, 4), tf.float32), SPARSE],
    "a ragged tensor": [tf.ragged.constant([[1], [2, 3]])],
    "a sparse tensor": [tf.sparse.from_dense(ONES)],
    "a sparse Keras tensor": [keras.KerasTensor((None, 4), sparse=True)],
    "a dataset": [tf.data.DatasetSpec(tf.TensorSpec((None, 4), tf.float32))],
}


@pytest.mark.parametrize("given", NOT_DENSE.values(), ids=list(NOT_DENSE))
def test_signatures_that_are_not_dense_are_refused_before_the_model_runs(tmp_path, given):
    class Uncalled(keras.Model):
        def build(self, shape):
            self.built = True

        def call(self, x, y=None):
            raise AssertionError("called")

    model = Uncalled()
    model.build((None, 4))
    with pytest.raises(ValueError, match=r"Expected dense inputs.*Received: .*tf\.TensorSpec"):
        export(model, tmp_path, input_signature=given)
    assert everything_under(tmp_path) == []


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_models_with_inputs_that_are_not_dense(tmp_path, kind, nested):
    """They raise an error with advice that works: a dense input, converted in `call`."""
    inputs = keras.Input((4,), name="x", **{kind: True})
    dense = inputs if kind == "sparse" else keras.ops.convert_to_tensor(inputs)
    model = keras.Model({"x": inputs} if nested else inputs, layers.Dense(2)(dense))

    class Converted(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = model

        def call(self, x):
            x = tf.sparse.from_dense(x) if kind == "sparse" else tf.RaggedTensor.from_tensor(x)
            return self.inner({"x": x} if nested else x)

    with pytest.raises(ValueError, match=rf"Expected dense inputs.*{kind}=True"):
        export(model, tmp_path)
    assert everything_under(tmp_path) == []
    spec = tf.TensorSpec((None, 4), tf.float32)
    converted = Converted()
    converted(ONES)
    path = export(converted, tmp_path, input_signature=[spec]).path
    [argument] = signature_of(path)[0][1]
    [answer] = serve(path)(**{argument: ONES}).values()
    expected = ONES @ model.layers[-1].kernel.numpy()
    np.testing.assert_allclose(answer, expected, rtol=1e-5)


BAD_NAMES = [
    ["my input"],
    ["größe"],
    ["a:0"],
    ["_x"],
    ["-a"],
    ["class"],
    ["A", "a"],
    ["a-b", "a_b"],
]


@pytest.mark.parametrize("names", BAD_NAMES)
def test_a_name_that_would_not_be_kept_is_refused(tmp_path, names):
    given = [[tf.TensorSpec((None, 4), tf.float32, name) for name in [*names, "z"]]]
    model = named("first", "second", *["third"] * (len(names) - 1))
    with pytest.raises(ValueError, match="Expected unique names") as refused:
        export(model, tmp_path, input_signature=given)
    assert "tf.TensorSpec((None, 4), tf.float32, name)" in str(refused.value)
    assert everything_under(tmp_path) == []


def test_a_model_whose_name_would_not_be_kept_is_exported_under_another(tmp_path):
    model = named("my input")
    with pytest.raises(ValueError, match=r"'my input'.*input_signature"):
        export(model, tmp_path)
    given = [[tf.TensorSpec((None, 4), tf.float32, "image")]]
    answer = serve(export(model, tmp_path, input_signature=given).path)(image=ONES)
    np.testing.assert_allclose(answer["output_0"], model(ONES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["a-b", "a.b", "1a", "Size_2"])
def test_names_that_a_server_keeps_are_served(name):
    [spec] = signature.renamed([tf.TensorSpec((None, 4))], [name])
    assert spec.name == name
