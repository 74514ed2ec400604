import types

import keras
import pytest

from tfbn.callbacks.callback_lists import pickled_state
from tfbn.cli.errors import FileError, naming, one_line, reading, visible


def raised(function, *args):
    """Return the error of a call."""
    with pytest.raises(Exception) as error:
        function(*args)
    return error.value


OURS = raised(pickled_state, types.SimpleNamespace(x=iter([])), ("x",))
OTHERS = raised(keras.models.load_model, "missing.keras")


def test_a_sentence_of_tfbn_stays_and_an_error_of_others_begins_with_its_type():
    assert one_line(OURS) == str(OURS)
    assert one_line(OTHERS).startswith("ValueError: File not found")
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("Expected nothing of tfbn.")).startswith("ValueError: ")


def test_a_sentence_of_tfbn_about_a_file_is_no_damage():
    def read(error):
        with reading("a.npy", "an array", "Save it again."):
            raise error.with_traceback(error.__traceback__)

    with pytest.raises(FileError, match=r"^Expected an array\. Received: a\.npy, .*damaged.*again"):
        read(OTHERS)


def test_files_are_named_once():
    named = pytest.raises(FileError, match=r"^ValueError: bad a\.npy Files: b\.npy\.$")
    with named, naming("a.npy", "b.npy"):
        raise ValueError("bad a.npy")


def test_text_that_a_terminal_would_act_on_is_escaped():
    assert visible("a\x1b[31mb\rc ä") == r"a\x1b[31mb\rc ä"
