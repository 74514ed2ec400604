"""Tests of the check of the installation."""

import subprocess
import sys

import keras
import pytest

import tfbn

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
    """Run code in a fresh process; return its exit code and the last line of stderr."""
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


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A file with a model whose last layer is ours."""
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.Sequential([keras.Input((3,)), tfbn.BatchNormalization()]).save(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import keras, tfbn", "import tfbn, tensorflow; keras = tensorflow.keras"]
)
def test_after_a_bare_import_keras_loads_models_with_our_layer(model_file, imports):
    code, error = run(f"{imports}; keras.models.load_model({model_file!r})")
    assert code == 0, error


def test_a_backend_chosen_in_the_environment_is_seen_before_keras_is_imported():
    code, error = run("import tfbn", KERAS_BACKEND="jax")
    assert code == 1
    assert error.startswith("ImportError: tfbn needs Keras to run on TensorFlow.")


def test_a_backend_that_only_keras_knows_is_told_at_the_first_use(tmp_path):
    """And Keras still imports, for those in the same process that use it without tfbn."""
    (tmp_path / "keras.py").write_text(
        "import types; __version__ = '3.99'\n"
        "backend = types.SimpleNamespace(backend=lambda: 'numpy')"
    )
    code, error = run("import tfbn, keras; keras.backend; tfbn.collect", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert error.startswith("ImportError: tfbn needs Keras to run on TensorFlow.")
    assert "'numpy'" in error


@pytest.mark.slow
def test_importing_does_not_need_the_extras():
    blocked = ("matplotlib", "sklearn", "tensorflow_serving", "apache_beam", "hypothesis")
    code, error = run(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from tfbn import *"
    )
    assert code == 0, error


def test_nothing_heavy_is_imported_before_it_is_used():
    heavy = ("tensorflow", "keras", "numpy", "h5py")
    code, error = run(
        f"import sys, tfbn; names = dir(tfbn); assert not {{*sys.modules}} & {{*{heavy!r}}}\n"
        "assert {*tfbn.__all__} <= {*names} and tfbn.__version__\n"
        "try: tfbn.no_such_name\n"
        "except AttributeError as error: assert 'no_such_name' in str(error)\n"
        f"assert not {{*sys.modules}} & {{*{heavy!r}}}"
    )
    assert code == 0, error
