"""Shapes and tables as plain text, for printed reports."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_bytes", "format_count", "format_shape", "format_table"]


def format_shape(sizes: Sequence[int]) -> str:
    """A shape or a tuple of ranks, written as one word.

    >>> format_shape([20, 1, 5, 5])
    '20x1x5x5'
    """
    return "x".join(map(str, sizes))


def format_bytes(number: int) -> str:
    """Write a number of bytes with three digits.

    >>> [format_bytes(number) for number in (512, 71_834, 1_720_000)]
    ['512 B', '71.8 KB', '1.72 MB']
    """
    return format_count(number, ("GB", "MB", "KB", "B"))


def format_count(number: int, units: Sequence[str] = ("G", "M", "k", "")) -> str:
    """Write a number of at least a thousand with three digits, in one of four units.

    >>> [format_count(number) for number in (512, 71_834, 1_720_000)]
    ['512', '71.8 k', '1.72 M']
    """
    for size, unit in zip((10**9, 10**6, 10**3), units, strict=False):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} {units[-1]}".rstrip()


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns by spaces: text to the left, numbers to the right.

    >>> print(format_table(["layer", "size"], [["a", "10"], ["bcd", "5"]]))
    layer  size
    a        10
    bcd       5
    """
    columns = list(zip(header, *rows, strict=True))
    numeric = [all(_is_number(cell) for cell in column[1:]) and rows for column in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return not cell.strip("0123456789.,+-% ")
