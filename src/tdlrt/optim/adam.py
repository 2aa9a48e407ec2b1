"""torch.optim.Adam and AdamW in the coordinates of the tangent space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdlrt.optim.rule import Rule

__all__ = ["AdamRule", "AdamWRule"]

_FIRST, _SECOND, _LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


@dataclass(frozen=True, kw_only=True)
class AdamRule(Rule):
    """Adam.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g o g, and the direction of step t is
    (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), entry by entry in the coordinates of the core
    and the basis parts. After a truncation these are the coordinates of the HOSVD, so
    the directions of the core come scaled one by one.

    Source: torch.optim.Adam; arXiv:2506.17475 for low-rank weights.
    """

    first_moments: ClassVar[tuple[str, ...]] = (_FIRST,)
    second_moments: ClassVar[tuple[str, ...]] = (_SECOND, _LARGEST)
    counts_steps: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    decoupled: bool = False

    @classmethod
    def _options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        first, second = group["betas"]
        return {
            "betas": (float(first), float(second)),
            "eps": float(group["eps"]),
            "amsgrad": bool(group["amsgrad"]),
            # torch < 2.7 has no such option: there only the class tells.
            "decoupled": bool(group.get("decoupled_weight_decay", False)),
        }

    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Rule.advance`."""
        if self.maximize:
            gradient = -gradient
        decay = None if weight is None or not self.weight_decay else self.weight_decay * weight
        if decay is not None and not self.decoupled:
            gradient = gradient + decay
        beta1, beta2 = self.betas
        if not moments:
            zeros = torch.zeros_like(gradient)
            moments = {_FIRST: zeros, _SECOND: zeros}
        first = torch.lerp(moments[_FIRST], gradient, 1 - beta1)
        second = (beta2 * moments[_SECOND]).addcmul_(gradient, gradient, value=1 - beta2)
        advanced, scale = {_FIRST: first, _SECOND: second}, second
        if self.amsgrad:
            advanced[_LARGEST] = scale = torch.maximum(moments.get(_LARGEST, second), second)
        scale = scale.sqrt().div_(math.sqrt(1 - beta2**step)).add_(self.eps)
        direction = (first / scale).div_(1 - beta1**step)
        if decay is not None and self.decoupled:
            direction = direction + decay
        return direction, advanced


@dataclass(frozen=True, kw_only=True)
class AdamWRule(AdamRule):
    """Adam with weight decay that goes past the moments: C (1 - lr weight_decay) - lr direction.

    Source: torch.optim.AdamW, arXiv:1711.05101.
    """

    @classmethod
    def _options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        return super()._options(group) | {"decoupled": True}
