"""Tests of what `import tfbn` needs and says."""

import subprocess
import sys

HIDE = """
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hide = name.partition(".")[0] == "tensorflow"
        return None if hide else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
"""


def run(code, **environment):
    """Run code in a process of its own; returns its exit code and last line of errors."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr else ""


def test_without_tensorflow_one_error_says_what_to_install():
    code, error = run(HIDE + "import tfbn")
    assert code == 1
    assert error.startswith("ImportError: tfbn needs TensorFlow.")
    assert "pip install 'tfbn[tensorflow]'" in error and "'tfbn[tensorflow-cpu]'" in error


def test_under_another_backend_one_error_says_what_to_set():
    fake = """
import sys, types, importlib.machinery
keras = types.ModuleType("keras", "")
keras.__version__ = "3.99"
keras.__spec__ = importlib.machinery.ModuleSpec("keras", None)
keras.backend = types.SimpleNamespace(backend=lambda: "jax")
sys.modules["keras"] = keras
import tfbn
"""
    code, error = run(fake)
    assert code == 1
    assert error.startswith("ImportError: tfbn needs Keras to run on TensorFlow.")
    assert "'jax'" in error and "KERAS_BACKEND=tensorflow" in error


def test_under_keras_2_one_error_says_what_to_do():
    fake = "import sys, types; k = types.ModuleType('keras'); k.__version__ = '2.15.0'\n"
    code, error = run(fake + "sys.modules['keras'] = k; import tfbn")
    assert code == 1
    assert error.startswith("ImportError: tfbn needs Keras 3. Received: Keras 2.15.0.")


def test_importing_does_not_need_the_extras():
    blocked = ("matplotlib", "sklearn", "tensorflow_serving", "apache_beam", "hypothesis")
    code, error = run(f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import tfbn")
    assert code == 0, error
