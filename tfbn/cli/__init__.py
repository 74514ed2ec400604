"""The command line, `tfbn` or `python -m tfbn`."""

from tfbn.cli.commands import RECORD, main

__all__ = ["RECORD", "main"]
