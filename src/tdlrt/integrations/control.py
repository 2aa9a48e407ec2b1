"""The part that the callbacks for all training libraries share: clipping and freezing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tdlrt.errors import SetupError
from tdlrt.optim import TDLRT

__all__ = ["RankControl", "unwrap_optimizer"]


@dataclass(frozen=True, kw_only=True)
class RankControl:
    """Whether to clip gradients, and when to freeze ranks.

    Attributes:
        max_grad_norm: Largest norm of the projected gradient; None for no clipping.
        freeze_at_epoch: Ranks are frozen after this number of epochs; None for never.
        freeze_at_share: Ranks are frozen after this share of all steps, in [0, 1]; None for never.

    Raises:
        SetupError: A value is out of range, or both freeze_at_epoch and freeze_at_share are given.
    """

    max_grad_norm: float | None = None
    freeze_at_epoch: float | None = None
    freeze_at_share: float | None = None

    def __post_init__(self) -> None:
        if self.freeze_at_epoch is not None and self.freeze_at_share is not None:
            raise SetupError(
                f"freeze_at_epoch={self.freeze_at_epoch} and freeze_at_share="
                f"{self.freeze_at_share}: expected one of them"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise SetupError(f"max_grad_norm: got {self.max_grad_norm}, expected a positive number")
        if self.freeze_at_epoch is not None and not self.freeze_at_epoch >= 0:
            raise SetupError(
                f"freeze_at_epoch: got {self.freeze_at_epoch}, expected a number of epochs"
            )
        if self.freeze_at_share is not None and not 0 <= self.freeze_at_share <= 1:
            raise SetupError(
                f"freeze_at_share: got {self.freeze_at_share}, expected a share in [0, 1]"
            )

    def clip(self, optimizer: TDLRT) -> None:
        """Clip the gradients if max_grad_norm is set."""
        if self.max_grad_norm is not None:
            optimizer.clip_grad_norm_(self.max_grad_norm)

    def freeze_if_due(self, optimizer: TDLRT, *, epochs: float, share: float) -> None:
        """Freeze the ranks if the training has reached the given epoch or share of all steps."""
        epoch_due = self.freeze_at_epoch is not None and epochs >= self.freeze_at_epoch
        share_due = self.freeze_at_share is not None and share >= self.freeze_at_share
        if epoch_due or share_due:
            optimizer.freeze_ranks()


def unwrap_optimizer(optimizer: Any) -> TDLRT | None:
    """The TDLRT inside the optimiser wrappers of a training library; None if there is none."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, TDLRT) else None
