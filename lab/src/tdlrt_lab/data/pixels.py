"""One tensor of many decoded images, if it fits in memory."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdlrt.errors import DataError

__all__ = ["stack_images"]

IMAGES_PER_REPORT = 1000


def stack_images(
    images: Iterable[np.ndarray[Any, Any]],
    shape: tuple[int, int, int, int],
    source: str,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Copy decoded images into one tensor, one after the other.

    Args:
        images: uint8, each (height, width, channels).
        shape: Number of images, height, width and channels.
        source: Where the images come from, for the error message.
        progress: Called after every 1000 images and after the last, with the number of images
            copied and their total.

    Returns:
        uint8, (N, channels, height, width).

    Raises:
        DataError: The images take more than the memory of this machine.
    """
    pixels, total = _allocate(shape, source), shape[0]
    for count, image in enumerate(images, start=1):
        pixels[count - 1] = image
        if count % IMAGES_PER_REPORT == 0 or count == total:
            progress(count, total)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _allocate(shape: tuple[int, int, int, int], source: str) -> np.ndarray[Any, Any]:
    needed = int(np.prod(shape, dtype=object))
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not available on every system
        memory = needed
    try:
        if needed > memory:
            raise MemoryError
        return np.empty(shape, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise DataError(
            f"{source}: {shape[0]:,} images of {shape[2]}x{shape[1]} pixels take {needed:,} bytes, "
            "more than the memory of this machine; use fewer or smaller images"
        ) from error
