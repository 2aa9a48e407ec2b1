"""Which part of a training set is held out for validation."""

import torch
from torch import Tensor

from tdlrt.errors import DataError

__all__ = ["held_out_rows"]


def held_out_rows(total: int, part: float | int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Draw validation examples at random.

    Args:
        total: Number of examples in the training set.
        part: Share (float) or number (int) of them to hold out.
        seed: Seed of the random draw.
        what: What they are, for the error message.

    Returns:
        Indices of the validation examples and of the remaining training examples, both sorted.

    Raises:
        DataError: One of them would be empty.
    """
    count = part if isinstance(part, int) else round(part * total)
    if not 1 <= count < total:
        raise DataError(
            f"validation {part}: {count} of the {total} {what}; expected at least 1 for "
            "validation and 1 for training"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values, order[count:].sort().values
