"""A sweep sees the data that `fit` feeds to the network of a KerasHub task."""

import numpy as np
import pytest

import tfbn

keras_hub = pytest.importorskip("keras_hub")
pytestmark = pytest.mark.interop


class Scaling:
    """A preprocessor that makes another network input of an image."""

    def __call__(self, x, y=None, sample_weight=None):
        x = x / 255.0
        return x if y is None else (x, y) if sample_weight is None else (x, y, sample_weight)


def classifier(preprocessor):
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 128],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    return keras_hub.models.ImageClassifier(
        backbone=backbone, num_classes=2, preprocessor=preprocessor
    )


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_the_models_own_preprocessing_comes_first(method):
    raw = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3)).astype("float32")
    model = classifier(Scaling())
    swept = tfbn.collect(model, raw, method=method, batch_size=8, verbose=0)
    model.preprocessor = None
    expected = tfbn.collect(model, raw / 255.0, method=method, batch_size=8, verbose=0)
    for path, drift in swept.compare(expected).items():
        assert drift["mean_shift_max"] < 1e-5 and drift["std_ratio_max"] < 1 + 1e-5, path
