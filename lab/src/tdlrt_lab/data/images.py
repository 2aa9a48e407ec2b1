"""Decoding of image files; the size that a file declares is checked before decoding."""

from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

__all__ = ["FORMATS", "MAX_PIXELS", "ImageFileError", "decode_image", "to_pixels"]

# Without formats for which Pillow calls another program, such as EPS.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26
"""Without a limit, a file of a few kilobytes can fill the memory: one colour compresses well."""


class ImageFileError(ValueError):
    """A file is not an image, or the image is too large."""


def decode_image(file: Path | IO[bytes], mode: Literal["L", "RGB"]) -> Image.Image:
    """Decode an image file.

    Args:
        file: Path or open binary file.
        mode: Pillow mode of the result.

    Raises:
        ImageFileError: The file cannot be decoded, or has more than `MAX_PIXELS` pixels.
    """
    # Decoders raise exceptions of many types on damaged files.
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,} in all")
            return image.convert(mode)
    except Exception as error:
        raise ImageFileError(str(error) or type(error).__name__) from error


def to_pixels(image: Image.Image, mode: Literal["L", "RGB"]) -> np.ndarray[Any, Any]:
    """Convert an image to uint8, (height, width, channels)."""
    return np.asarray(image).reshape(image.height, image.width, len(mode))
