import keras
import numpy as np
import pytest
from keras import layers

from tfbn.callbacks.change_detector import ChangeDetector, runs_call

X = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("float32")


def network():
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.BatchNormalization(name="first"),
            layers.BatchNormalization(name="second"),
            layers.BatchNormalization(name="fixed", momentum=1.0),
        ]
    )


def test_only_layers_whose_statistics_change_are_reported():
    model = network()
    detector = ChangeDetector(model)
    detector.begin_step()
    assert detector.changed() == frozenset()
    model.get_layer("second")(X, training=True)
    model.get_layer("fixed")(X, training=True)
    assert detector.changed() == {"second"}
    assert detector.constant() == {"fixed"}


def test_a_change_is_remembered_when_the_statistics_return():
    model = network()
    detector = ChangeDetector(model)
    detector.begin_step()
    layer = model.get_layer("first")
    before = layer.get_weights()
    layer(X, training=True)
    assert detector.changed() == {"first"}
    layer.set_weights(before)
    detector.begin_step()
    assert detector.changed() == {"first"}


def test_later_steps_are_compared_with_the_beginning():
    model = network()
    detector = ChangeDetector(model)
    detector.begin_step()
    model.get_layer("first")(X, training=True)
    detector.begin_step()
    assert detector.changed() == {"first"}


def test_weights_that_are_set_before_the_first_step_are_no_change():
    model = network()
    detector = ChangeDetector(model)
    model.get_layer("first").moving_mean.assign([1.0, 2.0, 3.0])
    detector.begin_step()
    assert detector.changed() == frozenset()


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_the_first_step_builds_is_compared_with_its_initial_values(training):
    model = keras.Sequential(
        [layers.BatchNormalization(name="late", moving_mean_initializer="ones")]
    )
    detector = ChangeDetector(model)
    detector.begin_step()
    model(X, training=training)
    assert detector.changed() == ({"late"} if training else frozenset())


class OwnStep(keras.Model):
    def train_step(self, data):
        """Do what the base class does, which no one can know."""
        return super().train_step(data)


def test_whether_steps_run_call():
    assert runs_call(network())
    assert not runs_call(OwnStep())
    model = network()
    model.train_step = lambda data: {}
    assert not runs_call(model)
