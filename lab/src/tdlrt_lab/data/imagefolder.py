"""A folder of image files, one subfolder per class, decoded to tensors of one size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from tdlrt.errors import DataError
from tdlrt_lab.data.images import ImageFileError, decode_image, to_pixels
from tdlrt_lab.data.pixels import ROWS_PER_REPORT, Split, empty_pixels

__all__ = ["class_names", "read_folder"]

LAYOUT = "a folder train and a folder test with CLASS/IMAGE.png in each"


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the subfolders, in the order of the alphabet.

    Raises:
        DataError: There is no such folder, or it holds none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {LAYOUT} in --data-dir")
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if not names:
        raise DataError(f"{folder}: holds no folders; expected one per class")
    return names


def read_folder(
    folder: Path,
    classes: tuple[str, ...],
    mode: Literal["L", "RGB"],
    size: int,
    progress: Callable[[int, int], None],
) -> Split:
    """Decode every file in the subfolders, class after class.

    Args:
        folder: Holds a subfolder per class.
        classes: The classes; any other subfolder is an error.
        mode: Pillow mode of the result.
        size: Height and width of the result, in pixels; images are stretched to it.
        progress: Called now and then with the images done and the images in all.

    Raises:
        DataError: A class is unknown, a file is no image, or there is no file.
    """
    for name in class_names(folder):
        if name not in classes:
            raise DataError(
                f"{folder / name}: a class that is not in the training set; expected one of "
                f"{', '.join(classes)}; move it, or add it to the training set"
            )
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{folder}: holds no images; expected {LAYOUT}")
    pixels = empty_pixels(str(folder), (len(files), size, size, len(mode)))
    for row, (path, _) in enumerate(files):
        pixels[row] = _decode(path, mode, size)
        if (row + 1) % ROWS_PER_REPORT == 0 or row + 1 == len(files):
            progress(row + 1, len(files))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor([label for _, label in files]), classes)


def _decode(path: Path, mode: Literal["L", "RGB"], size: int) -> np.ndarray[Any, Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ImageFileError("it is no file")
        image = decode_image(path, mode)
    except ImageFileError as error:
        raise DataError(
            f"{path}: no readable image ({error}); expected a PNG or JPEG file; remove it"
        ) from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return to_pixels(image, mode)
