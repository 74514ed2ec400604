"""The process of the command line: its exit code, and all that it writes to stderr."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from tfbn.cli import parser
from tfbn.cli.errors import describe, visible

FAILED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: A list of strings; those of the process by default.

    Returns:
        The exit code: 0 if done, 1 if it failed, 3 if `inspect --check` found statistics that are
        not known to be those of a sweep, 130 if it was interrupted. Wrong usage exits with 2.
    """
    # Names of files and layers may hold characters that the encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser.build().parse_args(arguments)
    try:
        with _quiet_libraries(), _warnings_of_one_line():
            # TensorFlow takes seconds to import, which help and wrong usage need not wait for.
            from tfbn.cli import commands

            code = commands.COMMANDS[args.command](args)
            sys.stdout.flush()
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
    print(f"tfbn: {visible(text)}", file=sys.stderr)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep notes of TensorFlow and Keras off stderr, which is for errors and our warnings."""
    # Read when TensorFlow is imported: 2 leaves errors alone. A user's own choice stands.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
