"""Standard augmentation of small images: random shifts and horizontal flips, batch by batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PADDING", "draw_moves", "move_images"]

PADDING = 4


def draw_moves(count: int, generator: torch.Generator) -> Tensor:
    """Draw a shift and a flip for each of `count` images.

    Returns:
        Shape (count, 3): row and column, from 0 to 2 PADDING, of the crop in the padded image, and
        whether the crop is flipped horizontally (0 or 1).
    """
    shifts = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
    return torch.cat([shifts, torch.randint(2, (count, 1), generator=generator)], dim=1)


def move_images(images: Tensor, moves: Tensor) -> Tensor:
    """Pad images with PADDING zeros on each side, crop them to their size and flip some.

    Args:
        images: Shape (N, channels, height, width), of any type.
        moves: Shape (N, 3), as drawn by `draw_moves`.

    Returns:
        The moved images, of the same shape and type.
    """
    count, _, height, width = images.shape
    row, column, flipped = moves[:, :, None].unbind(1)
    rows = row + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = column + torch.where(flipped == 1, columns.flip(1), columns)
    padded = F.pad(images, (PADDING,) * 4)
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
