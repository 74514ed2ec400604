"""From a trained model to TensorFlow Serving.

`exporting` is the list of steps; `signature` names inputs and outputs, `endpoint` writes the
graph, `checks` has the tests that a version must pass, `provenance` and `warmup` write the files
beside it, and `versions` puts it in place. `folding` removes batch norm from a network.
"""

from tfbn.serving.exporting import Exported, export
from tfbn.serving.folding import fold
from tfbn.serving.provenance import describe

__all__ = ["Exported", "describe", "export", "fold"]
