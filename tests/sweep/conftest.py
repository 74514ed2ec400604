"""Fixtures shared by the tests of sweeps."""

import concurrent.futures
import multiprocessing

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

import tfbn

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def pool():
    """Return a pool of two processes, shared by all tests because importing TensorFlow is slow."""
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture(scope="module")
def digits():
    """Return real images, sorted by class."""
    images, labels = load_digits(return_X_y=True)
    order = np.argsort(labels, kind="stable")
    return (images[order] / 16).astype("float32").reshape(-1, 8, 8, 1)


@pytest.fixture(scope="module")
def model():
    """Build a convolutional network with four batch norm layers, one of them on vectors."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 1), name="image")
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.ReLU()(tfbn.BatchNormalization()(x))
    x = layers.Dense(16)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(4)(layers.BatchNormalization()(x)))


@pytest.fixture(scope="module")
def population(model, digits):
    """Return the statistics of all images."""
    return tfbn.collect(model, digits, verbose=0)
