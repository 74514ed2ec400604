"""Print lines and JSON to stdout."""

import json
from typing import Any

from tfbn.cli.errors import visible


def print_json(content: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(content, indent=1))


def print_lines(*lines: str) -> None:
    """Print lines, with unprintable characters as escapes."""
    for line in lines:
        print(visible(line))
