"""Folders of image files with one subfolder per class, decoded to tensors of one size."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from tdlrt.errors import DataError
from tdlrt.files import open_regular
from tdlrt_lab.data.image_data import Split
from tdlrt_lab.data.images import ImageFileError, decode_image, to_pixels
from tdlrt_lab.data.pixels import stack_images

__all__ = ["class_names", "read_folder"]

LAYOUT = "a folder train and a folder test with CLASS/IMAGE.png in each"


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the subfolders, sorted.

    Raises:
        DataError: The folder does not exist or has no subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {LAYOUT} in --data-dir")
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if not names:
        raise DataError(f"{folder}: no subfolders; expected one per class")
    return names


def read_folder(
    folder: Path,
    classes: tuple[str, ...],
    mode: Literal["L", "RGB"],
    size: int,
    progress: Callable[[int, int], None],
) -> Split:
    """Decode all files in the subfolders, class by class.

    Args:
        folder: Folder with one subfolder per class.
        classes: Names of the classes; another subfolder is an error.
        mode: Pillow mode of the result.
        size: Height and width of the result in pixels; images are resized to it without regard to
            their aspect ratio.
        progress: Called regularly with the number of images decoded and their total.

    Raises:
        DataError: A class is unknown, a file is not an image, or there are no files.
    """
    for name in class_names(folder):
        if name not in classes:
            raise DataError(
                f"{folder / name}: this class is not in the training set; expected one of "
                f"{', '.join(classes)}; remove it, or add it to the training set"
            )
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{folder}: no images; expected {LAYOUT}")
    shape = (len(files), size, size, len(mode))
    pixels = (to_pixels(_decode(path, mode, size), mode) for path, _ in files)
    images = stack_images(pixels, shape, str(folder), progress)
    return Split(images, torch.tensor([label for _, label in files]), classes)


def _decode(path: Path, mode: Literal["L", "RGB"], size: int) -> Image.Image:
    try:
        with open_regular(path) as file:
            image = decode_image(file, mode)
    except (OSError, ImageFileError) as error:
        raise DataError(
            f"{path}: not a readable image ({error}); expected a PNG or JPEG file; remove it"
        ) from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image
