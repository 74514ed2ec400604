"""The code of examples/README.md runs as printed."""

import pathlib
import re

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_documentation import blocks

import tfbn

TEXT = (pathlib.Path(__file__).parents[1] / "examples" / "README.md").read_text()
RECIPES = {
    section.partition("\n")[0]: blocks(section)
    for section in TEXT.partition("## Recipes\n")[2].partition("\n## ")[0].split("\n### ")[1:]
}


def build():
    """A small classifier."""
    return keras.Sequential(
        [
            keras.Input((4,), name="features"),
            layers.Dense(8, use_bias=False, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Dense(2, "softmax"),
        ]
    )


class Gan(keras.Model):
    """A generator that is trained to have outputs of the data's mean."""

    def __init__(self):
        super().__init__()
        self.generator = build()

    def train_step(self, data):
        x = keras.utils.unpack_x_y_sample_weight(data)[0]
        with tf.GradientTape() as tape:
            made = self.generator(tf.random.normal(tf.shape(x)), training=True)
            loss = (tf.reduce_mean(made) - tf.reduce_mean(x)) ** 2
        variables = self.generator.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that the recipes have."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    x = (3 + 2 * np.random.default_rng(0).normal(size=(64, 4))).astype("float32")
    y = (x[:, 0] > 3).astype("int64")
    model, pretrained, gan = build(), build(), Gan()
    for each in (model, pretrained):
        each.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    gan.compile("adam")
    yield {
        **{"keras": keras, "np": np, "tf": tf, "tfbn": tfbn, "build": build, "gan": gan},
        **{"model": model, "pretrained": pretrained},
        **{"x_train": x, "y_train": y, "x_val": x[:20], "y_val": y[:20]},
    }
    keras.config.set_dtype_policy("float32")


def assert_population(model, x, dense="first", norm="norm"):
    """The layer holds mean and variance of what enters it, by NumPy."""
    entered = x.astype("float64") @ np.float64(model.get_layer(dense).kernel)
    layer = model.get_layer(norm)
    low = layer.compute_dtype == "float16"
    networks.assert_layer(layer, entered.mean(0), entered.var(0), 1e-2 if low else 1e-4)


def test_there_are_ten_short_recipes():
    assert [name.split(".")[0] for name in RECIPES] == [str(n) for n in range(1, 11)]
    for name, code in RECIPES.items():
        [block] = code
        assert len([line for line in block.splitlines() if line.strip()]) <= 15, name


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", [name for name in RECIPES if "KerasHub" not in name])
def test_recipes(names, name, two_devices):
    [code] = RECIPES[name]
    # Two such strategies in one process would mix up their collective operations.
    code = code.replace("tf.distribute.MirroredStrategy()", "two_devices")
    names["two_devices"] = two_devices
    exec(code, names)
    model, x = names["model"], names["x_train"]
    if "GAN" in name:
        assert_population(names["gan"].generator, names["noise"])
    elif "stages" in name:
        assert_population(names["base"], x)
    elif "loop" in name:
        assert_population(keras.models.load_model("latest.keras"), x)
        with pytest.raises(AssertionError):  # It trains on from the moving averages.
            assert_population(model, x)
    else:
        assert_population(model, x)
    if "order" in name:
        assert_population(keras.models.load_model("best.keras"), x)
    if "Resume" in name:
        assert_population(keras.models.load_model("serve.keras"), x)
        assert model.optimizer.iterations == 8


@pytest.mark.slow
def test_the_recipe_of_keras_hub(names, monkeypatch):
    """With a small network in the place of the preset, which would be downloaded."""
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    small = hub.models.ImageClassifier(backbone=backbone, num_classes=2)
    monkeypatch.setattr(hub.models.ImageClassifier, "from_preset", lambda *args, **options: small)
    images = np.random.default_rng(0).random((8, 16, 16, 3)).astype("float32")
    names |= {"keras_hub": hub, "images": images, "labels": np.arange(8) % 2}
    [[code]] = [code for name, code in RECIPES.items() if "KerasHub" in name]
    exec(code, names)
    actual = tfbn.PopulationStats.read(names["classifier"])
    swept = tfbn.collect(names["classifier"], images, include_frozen=True, verbose=0)
    for path, stats in swept.items():
        np.testing.assert_allclose(actual[path].mean, stats.mean, rtol=1e-3, atol=1e-4)


def test_what_to_look_at(names):
    """The block above the table, and the line of every row."""
    section = TEXT.partition("## Validation is bad")[2].partition("\n## ")[0]
    [code] = blocks(section)
    exec(code, names)
    rows = re.findall(r"^\|.*\| `([^`]+)` \|$", section, re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        exec(row, names)
    assert_population(names["model"], names["x_train"])
    assert pathlib.Path("models/digits/1/saved_model.pb").is_file()
