"""The batch normalization layer and the kernels that it computes with."""

from tfbn.layer.batch_normalization import BatchNormalization

__all__ = ["BatchNormalization"]
