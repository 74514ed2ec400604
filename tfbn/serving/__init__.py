"""From a trained model to TensorFlow Serving."""

from tfbn.serving.exporting import Exported, describe, export
from tfbn.serving.folding import fold

__all__ = ["Exported", "describe", "export", "fold"]
