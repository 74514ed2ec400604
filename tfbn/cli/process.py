"""Run the command line: exit codes and stderr."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tfbn.cli import parser
from tfbn.cli.errors import one_line, visible

DONE, FAILED, INTERRUPTED = 0, 2, 130
_STDERR, _LOG_LEVEL = 2, "TF_CPP_MIN_LOG_LEVEL"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments, by default of the process.

    Returns:
        The exit code: 0 for success; 1 if `drift` detects drift, or `inspect --check` finds
        statistics without a known sweep; 2 for an error, including wrong usage; 130 for an
        interrupt.
    """
    _require_stderr()
    # Names of files and layers may contain characters that the encoding does not support.
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
            # Imports TensorFlow, which takes seconds, only after the checks.
            with _startup_notes_dropped():
                from tfbn.cli import commands
            code = commands.COMMANDS[args.command](args)
            print(end="", flush=True)
            return code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # The reader has closed the pipe: `tfbn inspect model.keras | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        _say(one_line(error))
        return FAILED


def _say(text: str) -> None:
    if sys.stderr is not None:  # `print` would use stdout if stderr is closed.
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
    """Import TensorFlow and list its devices without the notes that C++ writes to stderr.

    Some notes are written before the log level is read, and a missing GPU is logged as an error, so
    stderr is replaced by a temporary file. If the import fails, the notes are written to stderr.
    Set `TF_CPP_MIN_LOG_LEVEL` to see them, for example if the import aborts the process.
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
    """Suppress notes of TensorFlow and Keras on stderr, which is for tfbn's errors and warnings."""
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
    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        _say("warning: " + " ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = show
        yield
