"""The batch normalization layer and its kernels."""

from tfbn.layer.batch_normalization import BatchNormalization

__all__ = ["BatchNormalization"]
