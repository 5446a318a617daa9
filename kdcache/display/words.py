"""Values as text that is safe to print, and where it goes."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

Result = dict[str, Any]

OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
ERR = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Print one line of progress to standard error."""
    ERR.print(text(line))


def brief(value: Any) -> str:
    """Return a value on one line: mappings as `key value` pairs, digests shortened."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    return str(value)


def text(value: Any) -> str:
    """Return text safe to print: markup escaped, control characters made visible.

    Stores come from strangers; a sample's id must not be able to drive the terminal.
    """
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return escape(shown)


def size(count: float) -> str:
    """Return a number of bytes with a unit of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError(count)
