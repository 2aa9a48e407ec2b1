"""How the matrix of a linear layer is read as a tensor: its rows and its columns as modes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias

from tdlrt.errors import RankError
from tdlrt.scalars import as_int

__all__ = ["Reshape", "check_reshape", "tensor_shape"]

Reshape: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the modes of the rows (outputs) and of the columns (inputs) of a matrix."""

_EXPECTED = (
    "two tuples of sizes, whose products are out_features and in_features, such as "
    "((500,), (50, 4, 4)) for 500 outputs and a flattened map of 50 x 4 x 4"
)


def check_reshape(reshape: object, matrix: Sequence[int], where: str = "reshape") -> Reshape:
    """A reshape in its plain form, two tuples of ints.

    Args:
        reshape: What the user gave.
        matrix: Shape of the weight, out_features x in_features.
        where: Name of the argument, for messages.

    Raises:
        RankError: It is not two sequences of positive ints, or their products are not the sizes of
            the matrix.
    """
    parts = tuple(reshape) if isinstance(reshape, Sequence) else ()
    if len(parts) != 2 or not all(_are_sizes(part) for part in parts):
        raise RankError(f"{where}: got {reshape!r}, expected {_EXPECTED}")
    rows, columns = (tuple(operator.index(n) for n in part) for part in parts)
    for name, sizes, features in zip(
        ("out_features", "in_features"), (rows, columns), matrix, strict=True
    ):
        if math.prod(sizes) != features:
            raise RankError(
                f"{where}: got {sizes}, whose product is {math.prod(sizes)}, expected {features}, "
                f"the {name} of the layer"
            )
    return rows, columns


def tensor_shape(matrix: Sequence[int], reshape: Reshape | None) -> tuple[int, ...]:
    """Shape of the tensor for a weight of a given shape, which is that shape without a reshape."""
    return tuple(matrix) if reshape is None else (*reshape[0], *reshape[1])


def _are_sizes(value: object) -> bool:
    return (
        isinstance(value, Sequence) and len(value) > 0 and all((as_int(n) or 0) > 0 for n in value)
    )
