"""The run option `rank`, in configurations and on the command line."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tdlrt.errors import RankError
from tdlrt.text_tables import format_shape

__all__ = ["RankOption", "check_rank", "format_rank", "number_or_word", "parse_rank"]

LayerRank: TypeAlias = float | int | str | list[int]
RankOption: TypeAlias = float | int | str | dict[str, LayerRank]
"""A rank for all layers (a share of each mode, an integer or "full"), or ranks by name pattern."""

ONE = "a share in (0, 1], an integer from 1, or 'full'"
PER_LAYER = "a share in (0, 1], an integer from 1, a list of one integer per mode, or 'full'"


def check_rank(rank: Any) -> RankOption:
    """Check a rank and convert it to plain types: a number, "full", or a dict of these and lists.

    Raises:
        RankError: The rank has another form or is out of range.
    """
    if not isinstance(rank, Mapping):
        if not _is_rank(rank):
            raise RankError(f"rank {rank!r}: expected {ONE}, or a dict of these by layer name")
        plain: RankOption = rank
        return plain
    if not rank:
        raise RankError("rank {}: expected at least one layer name; write {'*': 0.5} for all")
    return {pattern: _layer_rank(pattern, value) for pattern, value in rank.items()}


def _layer_rank(pattern: object, value: Any) -> LayerRank:
    if not isinstance(pattern, str) or not pattern:
        raise RankError(
            f"rank: got {pattern!r} as the name of a layer; expected a text such as 'conv2'"
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)
        fits = bool(value) and all(isinstance(one, int) and _is_rank(one) for one in value)
    else:
        fits = _is_rank(value)
    if not fits:
        raise RankError(f"rank of {pattern} {value!r}: expected {PER_LAYER}")
    layer_rank: LayerRank = value
    return layer_rank


def _is_rank(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return value >= 1
    return value == "full" or (isinstance(value, float) and 0 < value <= 1)


def number_or_word(text: str) -> float | int | str:
    """Read a number as int or float, and leave a word such as "full" or "auto" as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_rank(text: str) -> RankOption:
    """Read a rank from the command line.

    >>> parse_rank("conv2=16x8x5x5,fc1=12,*=0.5")
    {'conv2': [16, 8, 5, 5], 'fc1': 12, '*': 0.5}
    >>> parse_rank("0.25")
    0.25

    Raises:
        RankError: A part has no layer name, or a name occurs twice.
    """
    if "=" not in text:
        return number_or_word(text)
    ranks: dict[str, LayerRank] = {}
    for part in text.split(","):
        pattern, equals, value = (word.strip() for word in part.rpartition("="))
        if not equals or not pattern or pattern in ranks:
            fault = "repeats a layer" if pattern in ranks else "has no layer"
            raise RankError(
                f"rank {text!r}: {part!r} {fault};"
                " expected LAYER=RANK,LAYER=RANK,... such as conv2=16x8x5x5,fc1=12,*=0.5"
            )
        ranks[pattern] = _parse_layer_rank(value)
    return ranks


def _parse_layer_rank(text: str) -> LayerRank:
    sizes = text.split("x")
    if len(sizes) > 1 and all(size.isdecimal() for size in sizes):
        return [int(size) for size in sizes]
    return number_or_word(text)


def format_rank(rank: RankOption) -> str:
    """Write a rank in the form that `parse_rank` reads.

    >>> format_rank({"conv2": [16, 8, 5, 5], "*": 0.5})
    'conv2=16x8x5x5,*=0.5'
    """
    if not isinstance(rank, dict):
        return str(rank)
    return ",".join(
        f"{pattern}={format_shape(value) if isinstance(value, list) else value}"
        for pattern, value in rank.items()
    )
