"""The process of the command line: its exit code, and all that it writes to stderr."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence

from tfbn.cli import parser
from tfbn.cli.errors import describe, visible

DONE, FAILED, INTERRUPTED = 0, 2, 130
_STDERR, _LOG_LEVEL = 2, "TF_CPP_MIN_LOG_LEVEL"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: A list of strings; those of the process by default.

    Returns:
        The exit code: 0 if done; 1 if the answer is no, because `drift` found drift, or
        `inspect --check` statistics that are not known to be those of a sweep; 2 if it failed, as
        for wrong usage; 130 if it was interrupted.
    """
    _require_stderr()
    # Names of files and layers may hold characters that the encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    command_line = parser.build()
    args = command_line.parse_args(arguments)
    if args.command is None:
        command_line.print_help()
        return DONE
    try:
        with _quiet_libraries(), _warnings_of_one_line():
            from tfbn.cli import checks

            checks.check(args)
            # TensorFlow takes seconds to import, which help and mistakes need not wait for.
            with _startup_notes_dropped():
                from tfbn.cli import commands
            code = commands.COMMANDS[args.command](args)
            print(end="", flush=True)
            return code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # The reader has seen enough: `tfbn inspect model.keras | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        _say(describe(error))
        return FAILED


def _say(text):
    if sys.stderr is not None:  # Closed, and `print` would take stdout.
        print(f"tfbn: {visible(text)}", file=sys.stderr)


def _require_stderr() -> None:
    """Open the null device as stderr if it is closed: the next file would get its descriptor."""
    try:
        os.fstat(_STDERR)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != _STDERR:
            os.dup2(null, _STDERR)
            os.close(null)


@contextlib.contextmanager
def _startup_notes_dropped() -> Iterator[None]:
    """Import TensorFlow and look for its devices without the notes that C++ writes to stderr.

    Some are written before the log level is read, and the absence of a GPU is logged as an error,
    so only another file in the place of stderr keeps them out. If the import fails, they are
    written to stderr after all. With `TF_CPP_MIN_LOG_LEVEL` in the environment they stay, which
    also shows the last words of a process that the import aborts.
    """
    if _LOG_LEVEL in os.environ or "tensorflow" in sys.modules:
        yield
        return
    os.environ[_LOG_LEVEL] = "2"  # Errors only; read when TensorFlow is imported.
    with tempfile.TemporaryFile() as notes:
        try:
            with _in_place_of_stderr(notes.fileno()):
                yield
                import tensorflow as tf

                tf.config.list_physical_devices()
        except Exception:
            notes.seek(0)
            with open(_STDERR, "wb", closefd=False) as stderr:
                stderr.write(notes.read())
            raise


@contextlib.contextmanager
def _in_place_of_stderr(descriptor: int) -> Iterator[None]:
    saved = os.dup(_STDERR)
    try:
        os.dup2(descriptor, _STDERR)
        yield
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep notes of TensorFlow and Keras off stderr, which is for errors and our warnings."""
    loggers = [logging.getLogger(name) for name in ("absl", "tensorflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None):
        _say("warning: " + " ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = show
        yield
