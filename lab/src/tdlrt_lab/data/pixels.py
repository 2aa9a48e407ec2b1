"""The images of a part of a data set, decoded, and the room that they need."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tdlrt.errors import DataError

__all__ = ["ROWS_PER_REPORT", "Split", "empty_pixels"]

ROWS_PER_REPORT = 1000
"""How many images are decoded between two reports of progress."""


class Split(NamedTuple):
    """Images (N, channels, height, width) in uint8, labels (N,) in int64, class names if known."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


def empty_pixels(source: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Room for decoded images.

    Raises:
        DataError: They are more than the machine's memory holds.
    """
    needed = int(np.prod(shape, dtype=object))
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on every system
        memory = needed
    try:
        if needed > memory:
            raise MemoryError
        return np.empty(shape, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise DataError(
            f"{source}: {shape[0]:,} images of {shape[2]}x{shape[1]} pixels take {needed:,} bytes, "
            "more than there is memory; expected images that fit; take fewer or smaller ones"
        ) from error
