"""A monitored network, its data, and its answers."""

import keras
from keras import layers

import tfbn

CHANNELS = 6


def network():
    """Build batch norm on the raw image, a convolution, and a second batch norm."""
    x = keras.Input((4, 4, CHANNELS), name="image")
    y = layers.BatchNormalization(name="first")(x)
    y = layers.BatchNormalization(name="second")(layers.Conv2D(4, 3, name="conv")(y))
    return keras.Model(x, layers.Flatten()(y))


def images(rng, count):
    """Return skewed data with different samples and correlated channels."""
    brightness = rng.gamma(3.0, 1.0, (count, 1, 1, 1))
    return (brightness + rng.gamma(1.0, 1.0, (count, 4, 4, CHANNELS))).astype("float32")


def served_by(path, answers):
    served = tfbn.ServedStats(path)
    for answer in answers:
        served.add(answer)
    return served
