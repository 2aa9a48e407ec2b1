"""The learning-rate schedule of a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

__all__ = ["cosine_schedule"]


def cosine_schedule(optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Linear warm-up for `warmup` steps, then a cosine decay to 0."""
    if warmup == 0:
        return CosineAnnealingLR(optimizer, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)
