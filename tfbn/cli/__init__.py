"""The command line, `tfbn` or `python -m tfbn`."""

from tfbn.cli.process import main

__all__ = ["main"]
