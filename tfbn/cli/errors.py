"""Errors in one sentence that names the file, as the user gave it."""

import contextlib
import re
import traceback
from collections.abc import Iterator

# Characters of an error's text: Keras prints whole configs, and terminals have an end.
_LONGEST, _LONGEST_OF_OTHERS = 800, 300
# Names of graph nodes, operations and colors, in the texts of TensorFlow and Keras.
_NOISE = re.compile(r"\{\{[^}]*\}\}|\[\[[^]]*\]\]|\[Op:\w+\]( name: ?)?|\x1b\[\d*m")


class FileError(ValueError):
    """An error whose text is ready for the user and names its file."""


@contextlib.contextmanager
def reading(path: str, expected: str, advice: str) -> Iterator[None]:
    """Whatever is raised on a file becomes a `FileError`: it is not the kind of file `expected`.

    Args:
        path: The file, as the user gave it.
        expected: The kind of file, with its article.
        advice: The sentence of advice at the end.
    """
    with naming(path):
        try:
            yield
        except Exception as error:  # The errors of damaged files are documented nowhere.
            if _is_ours(error):
                raise
            why = f"which is damaged or another kind of file ({describe(error)}). {advice}"
            if isinstance(error, OSError) and error.strerror:
                why = f"which cannot be read ({error.strerror})."
            raise FileError(f"Expected {expected}. Received: {path}, {why}") from error


@contextlib.contextmanager
def naming(*paths: str) -> Iterator[None]:
    """Whatever is raised becomes a `FileError` that names these files, as the user gave them."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        if not error.strerror:
            raise FileError(f"{describe(error)} Files: {', '.join(paths)}.") from error
        # The error may name a file inside one of these, or a hidden one.
        within = [path for path in paths if str(error.filename or "").startswith(path)]
        raise FileError(
            "Expected files that can be read and written. "
            f"Received: {', '.join(within or paths)} ({error.strerror})."
        ) from error
    except Exception as error:
        text = describe(error)
        missing = [path for path in paths if path not in text]
        raise FileError(f"{text} Files: {', '.join(missing)}." if missing else text) from error


def describe(error: Exception) -> str:
    """An error's text in one line. That of another library begins with its type."""
    if isinstance(error, FileError):
        return str(error)
    # TensorFlow's `str` adds nodes and stacks to its message.
    text = " ".join(_NOISE.sub("", str(getattr(error, "message", error))).split())
    if _is_ours(error):
        return _cut(text, _LONGEST)
    kind = type(error).__name__
    return f"{kind}: {_cut(text, _LONGEST_OF_OTHERS)}" if text else kind


def visible(text: str) -> str:
    """One line of text, with characters that a terminal would act on or not show as escapes.

    Names of files and layers may hold any.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_ours(error: Exception) -> bool:
    """Whether code of tfbn has raised an error with a sentence, no part of one."""
    raised_by = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        raised_by = frame.f_globals.get("__name__", "")
    sentence = isinstance(error, ValueError | TypeError | RuntimeError | ImportError)
    sentence = sentence and str(error)[:1].isupper()
    return isinstance(error, FileError) or (sentence and raised_by.startswith("tfbn."))


def _cut(text, length):
    return text if len(text) <= length else f"{text[:length]}..."
