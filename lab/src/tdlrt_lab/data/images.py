"""Image files, decoded within limits: what a file says of its size is checked before it is read."""

from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

__all__ = ["FORMATS", "MAX_PIXELS", "ImageFileError", "decode_image", "to_pixels"]

# No format whose reader calls another program, as Pillow does for EPS.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26
"""A file of a few kilobytes can hold an image of any size, all of one colour."""


class ImageFileError(ValueError):
    """A file holds no image, or one that is too large."""


def decode_image(file: Path | IO[bytes], mode: Literal["L", "RGB"]) -> Image.Image:
    """The image in a file.

    Args:
        file: The file.
        mode: Pillow mode of the result.

    Raises:
        ImageFileError: It cannot be decoded, or has more than `MAX_PIXELS` pixels.
    """
    # A damaged file makes the readers raise nearly anything.
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,} in all")
            return image.convert(mode)
    except Exception as error:
        raise ImageFileError(str(error) or type(error).__name__) from error


def to_pixels(image: Image.Image, mode: Literal["L", "RGB"]) -> np.ndarray[Any, Any]:
    """The image as uint8, (height, width, channels)."""
    return np.asarray(image).reshape(image.height, image.width, len(mode))
