"""Lookup by name, with suggestions in the error message."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from tdlrt.errors import UnknownNameError

__all__ = ["pick"]

T = TypeVar("T")


def pick(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`; the error for an unknown name suggests similar ones.

    Args:
        kind: What the name stands for, in the error message ("model", "data set").
        name: The name to look up.
        table: Values by name.

    Raises:
        UnknownNameError: `name` is not in `table`.

    >>> pick("model", "lenet", {"lenet5": 1, "vgg16": 2})
    Traceback (most recent call last):
    ...
    tdlrt.errors.UnknownNameError: unknown model 'lenet'; did you mean lenet5? Known: lenet5, vgg16
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UnknownNameError(f"unknown {kind} {name!r}{hint} Known: {', '.join(table)}")
