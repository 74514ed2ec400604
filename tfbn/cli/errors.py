"""Errors in one sentence that names the file, as the user gave it."""

import contextlib
from collections.abc import Iterator

# Of the text of another library's error. Keras prints whole configs.
_LONGEST = 300


class FileError(ValueError):
    """An error whose text is ready for the user and names its file."""


@contextlib.contextmanager
def reading(path: str, expected: str, advice: str) -> Iterator[None]:
    """Whatever is raised on a file becomes a `FileError`: it is not the kind of file `expected`.

    Args:
        path: The file, as the user gave it.
        expected: The kind of file, with its article.
        advice: A sentence that says what to do.
    """
    with naming(path):
        try:
            yield
        except Exception as error:  # What a damaged file raises is not documented anywhere.
            if _is_ours(error):
                raise
            raise FileError(
                f"Expected {expected}. Received: {path}, which is damaged or another kind of file "
                f"({describe(error)}). {advice}"
            ) from error


@contextlib.contextmanager
def naming(*paths: str) -> Iterator[None]:
    """Whatever is raised becomes a `FileError` that names these files, as the user gave them."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        text = describe(error)
        missing = [path for path in paths if path not in text]
        raise FileError(f"{text} ({', '.join(missing)})" if missing else text) from error


def describe(error: Exception) -> str:
    """An error's text in one line. That of another library has its type, and is cut."""
    if isinstance(error, FileError):
        return str(error)
    # TensorFlow's `str` adds nodes and stacks to its message.
    text = " ".join(str(getattr(error, "message", error)).split())
    if _is_ours(error):
        return text
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_ours(error):
    """Whether an error is one of tfbn's sentences: what was expected, or what must be installed."""
    return isinstance(error, ImportError) or str(error).startswith("Expected")
