"""Values from files of a run, as far as a report can show them."""

import math
from typing import Any

from tdlrt.errors import RunError

__all__ = ["plain_value", "printable"]

LARGEST = 2.0**63
"""Magnitude from which on a finite number is refused: sums of squares of them are still finite."""

MAX_DEPTH = 20
MAX_VALUES = 1_000_000


def printable(text: str) -> str:
    r"""A text in one line, with escapes in place of characters that cannot be printed.

    >>> printable("a\n\n b\0\ud800")
    'a b\\x00\\ud800'
    """
    words = " ".join(text.split())
    if words.isprintable():
        return words
    return "".join(one if one.isprintable() else _escape(one) for one in words)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def plain_value(value: Any) -> Any:
    """A value of JSON or YAML with printable texts, the names of mappings included.

    Values of other types, such as dates, become texts.

    Raises:
        RunError: It is nested too deeply, has too many parts, or a number that is too large.
    """
    return _Copy().plain(value, MAX_DEPTH)


class _Copy:
    """Counts the parts of a value while it is copied."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def plain(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth < 0:
            raise RunError(f"more than {MAX_DEPTH} levels of lists and mappings")
        if self._left < 0:
            raise RunError(f"more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            return {
                self.plain(str(name), depth): self.plain(one, depth - 1)
                for name, one in value.items()
            }
        if isinstance(value, list):
            return [self.plain(one, depth - 1) for one in value]
        if isinstance(value, int | float):
            if LARGEST <= abs(value) < math.inf:
                raise RunError("a number beyond 64 bits")
            return value
        return value if value is None else printable(str(value))
