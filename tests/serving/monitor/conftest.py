"""An exported model with a monitor."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from monitored_models import images, network

import tfbn
from tfbn import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    model = network()
    tfbn.update_population_stats(model, images(np.random.default_rng(0), 2000), verbose=0)
    return export(model, tmp_path_factory.mktemp("model"), monitor=True).path


@pytest.fixture(scope="module")
def ask(exported):
    loaded = tf.saved_model.load(os.fspath(exported))

    def ask(x):
        outputs = loaded.signatures["monitor"](image=tf.constant(x))
        return {name: y.numpy() for name, y in outputs.items()}

    return ask
