"""The check of the installation, and the registration of the layer once Keras is imported.

tfbn does not require a TensorFlow distribution by name, because `tensorflow` and
`tensorflow-cpu` provide the same package and pip would install one over the other.
So its absence shows at import, and must be said clearly there.

Keras takes seconds to import, and `tfbn --help` must not. So `import tfbn` imports neither Keras
nor TensorFlow. It checks the installation from outside, and registers the layer with Keras when
Keras is imported, before or after tfbn, by whomever.
"""

import functools
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def check() -> None:
    """Raise one clear `ImportError` unless Keras 3 runs on TensorFlow here.

    Keras itself is asked where it has been imported. Before, its version is that of the installed
    distribution, and its backend the one that the environment variable names, if it names one.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "tfbn needs TensorFlow. Received: an environment without it. Install one of "
            "its distributions: `pip install 'tfbn[tensorflow]'`, or "
            "`pip install 'tfbn[tensorflow-cpu]'` for machines without a GPU."
        )
    keras = sys.modules.get("keras")
    version = keras.__version__ if keras else _installed_version("keras")
    if not version.startswith("3."):
        raise ImportError(
            f"tfbn needs Keras 3. Received: Keras {version}. Run `pip install --upgrade keras`."
        )
    chosen = os.environ.get("KERAS_BACKEND") or "tensorflow"
    backend = keras.backend.backend() if keras else chosen
    if backend != "tensorflow":
        raise ImportError(
            "tfbn needs Keras to run on TensorFlow. "
            f"Received: the Keras backend {backend!r}. Set the environment "
            "variable KERAS_BACKEND=tensorflow before Keras is imported, or change "
            "'backend' in ~/.keras/keras.json."
        )


def register_with_keras() -> None:
    """Let `keras.models.load_model` find the layer, now or once Keras has been imported."""
    if "keras" in sys.modules:
        importlib.import_module("tfbn.layer")
    else:
        sys.meta_path.insert(0, _AfterKeras())


class _AfterKeras(importlib.abc.MetaPathFinder):
    """Imports the layer right after Keras, and leaves everything else to the other finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "keras":
            return None
        specs = (other.find_spec(name, path, target) for other in sys.meta_path if other != self)
        spec = next(filter(None, specs), None)
        if spec is not None:  # TensorFlow asks for it without importing it.
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._execute, loader.exec_module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], object], module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            check()
        except ImportError:
            return  # Others use this Keras without tfbn, whose first use raises this error.
        importlib.import_module("tfbn.layer")


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
