"""Convert errors to one line of text that names the user's file."""

import contextlib
import re
import traceback
from collections.abc import Iterator

# The largest number of characters of an error: Keras prints complete configs.
_LONGEST, _LONGEST_OF_OTHERS = 800, 300
# Names of graph nodes and operations, and colors, in the errors of TensorFlow and Keras.
_NOISE = re.compile(r"\{\{[^}]*\}\}|\[\[[^]]*\]\]|\[Op:\w+\]( name: ?)?|\x1b\[\d*m")


class FileError(ValueError):
    """An error with a complete text for the user, which names the file."""


@contextlib.contextmanager
def reading(path: str, expected: str, advice: str) -> Iterator[None]:
    """Convert every error to a `FileError`: the file is not of the kind `expected`.

    Args:
        path: The user's path of the file.
        expected: The kind of file, with an article.
        advice: The last sentence of the error.
    """
    with naming(path):
        try:
            yield
        except Exception as error:  # The errors for damaged files are not documented.
            if _is_ours(error):
                raise
            why = f"which is damaged or another kind of file ({one_line(error)}). {advice}"
            if isinstance(error, OSError) and error.strerror:
                why = f"which cannot be read ({error.strerror})."
            raise FileError(f"Expected {expected}. Received: {path}, {why}") from error


@contextlib.contextmanager
def naming(*paths: str) -> Iterator[None]:
    """Convert every error to a `FileError` that names the user's files."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        if not error.strerror:
            raise FileError(f"{one_line(error)} Files: {', '.join(paths)}.") from error
        # The error may name a file inside one of the paths, or a hidden file.
        within = [path for path in paths if str(error.filename or "").startswith(path)]
        files = ", ".join(within or paths)
        raise FileError(f"Cannot read or write {files} ({error.strerror}).") from error
    except Exception as error:
        text = one_line(error)
        missing = [path for path in paths if path not in text]
        raise FileError(f"{text} Files: {', '.join(missing)}." if missing else text) from error


def one_line(error: Exception) -> str:
    """Return the text of an error in one line. Errors of other libraries start with their type."""
    if isinstance(error, FileError):
        return str(error)
    # `str` of TensorFlow's errors includes nodes and stacks.
    text = " ".join(_NOISE.sub("", str(getattr(error, "message", error))).split())
    if _is_ours(error):
        return _cut(text, _LONGEST)
    kind = type(error).__name__
    return f"{kind}: {_cut(text, _LONGEST_OF_OTHERS)}" if text else kind


def visible(text: str) -> str:
    """Return a line of text with unprintable characters as escapes.

    Names of files and layers may contain any character.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_ours(error: Exception) -> bool:
    """Return whether code of tfbn raised an error with a complete sentence."""
    raised_by = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        raised_by = frame.f_globals.get("__name__", "")
    sentence = isinstance(error, ValueError | TypeError | RuntimeError | ImportError)
    sentence = sentence and str(error)[:1].isupper()
    return isinstance(error, FileError) or (sentence and raised_by.startswith("tfbn."))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
