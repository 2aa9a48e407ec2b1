"""Standard augmentation of small images: random shifts and mirror images, a batch at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PADDING", "draw_moves", "move_images"]

PADDING = 4


def draw_moves(count: int, generator: torch.Generator) -> Tensor:
    """Draw a move for each of `count` images.

    Returns:
        Of shape (count, 3): row and column, from 0 to 2 PADDING, at which the image is cut out of
        the padded one, and whether it is mirrored (0 or 1).
    """
    shifts = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
    return torch.cat([shifts, torch.randint(2, (count, 1), generator=generator)], dim=1)


def move_images(images: Tensor, moves: Tensor) -> Tensor:
    """Pad images with zeros by PADDING, cut them out again somewhere else, and mirror some.

    Args:
        images: Of shape (N, channels, height, width) and any type.
        moves: Of shape (N, 3), as drawn by `draw_moves`.

    Returns:
        As the images.
    """
    count, _, height, width = images.shape
    row, column, mirrored = moves[:, :, None].unbind(1)
    rows = row + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = column + torch.where(mirrored == 1, columns.flip(1), columns)
    padded = F.pad(images, (PADDING,) * 4)
    one_each = torch.arange(count, device=images.device)[:, None, None]
    return padded[one_each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
