"""torch.optim.Adam and AdamW in the coordinates of the tangent space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdlrt.optim.rules.rule import Rule

__all__ = ["AdamRule", "AdamWRule"]

_FIRST, _SECOND, _LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


@dataclass(frozen=True, kw_only=True)
class AdamRule(Rule):
    """Adam.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g o g, and the direction of step t is
    (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), entry by entry in the coordinates of the core
    and the basis parts. After a truncation these are the coordinates of the HOSVD, so every
    singular direction of the core is scaled separately.

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
    def options_of(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.options_of`."""
        first, second = group["betas"]
        return {
            "betas": (float(first), float(second)),
            "eps": float(group["eps"]),
            "amsgrad": bool(group["amsgrad"]),
            # torch < 2.7 has no such option; there AdamWRule sets it.
            "decoupled": bool(group.get("decoupled_weight_decay", False)),
        }

    def largest_norm(self, dtype: torch.dtype, *, sparse: bool = False) -> float:
        """See `Rule.largest_norm`.

        With norms of at most N, |g| <= (1 + weight_decay) N =: A, v <= max(N, A^2), |m| <= A, and
        the step is at most lr A / ((1 - b1) eps).
        """
        range_, decay = torch.finfo(dtype), 1 + abs(self.weight_decay)
        if sparse or self.eps < range_.tiny:  # then torch raises an error, or divides by zero
            return 0.0
        beta1, beta2 = self.betas
        rate = abs(float(self.lr))
        growth = decay * (1 + rate) * (1 + rate / ((1 - beta1) * self.eps))
        return min(math.sqrt(range_.max * (1 - beta2) / 2) / decay, range_.max / 4 / growth)

    def advance(
        self,
        gradients: list[Tensor],
        weight: Tensor,
        moments: Mapping[str, list[Tensor]],
        steps: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """See `Rule.advance`."""
        fresh = self._fresh(gradients, weight, decoupled=self.decoupled)
        beta1, beta2 = self.betas
        zeros = [torch.zeros_like(block) for block in fresh]
        past = moments or {_FIRST: zeros, _SECOND: zeros}
        first = list(torch._foreach_lerp(past[_FIRST], fresh, 1 - beta1))
        decayed = torch._foreach_mul(past[_SECOND], beta2)
        second = list(torch._foreach_addcmul(decayed, fresh, fresh, 1 - beta2))
        advanced, squares = {_FIRST: first, _SECOND: second}, second
        if self.amsgrad:
            squares = list(torch._foreach_maximum(past.get(_LARGEST, second), second))
            advanced[_LARGEST] = squares
        roots = torch._foreach_sqrt(squares)
        roots = torch._foreach_div(roots, _biases(beta2, steps, second, 0.5))
        # Never a division by zero, so that the direction is zero in the padding of a stack.
        scale = torch._foreach_add(roots, max(self.eps, torch.finfo(weight.dtype).tiny))
        scaled = torch._foreach_div(first, scale)
        direction = list(torch._foreach_div(scaled, _biases(beta1, steps, first)))
        if self.weight_decay and self.decoupled:
            direction[0] = direction[0] + self.weight_decay * weight
        return direction, advanced


def _biases(
    beta: float, steps: Sequence[Tensor], blocks: list[Tensor], power: float = 1
) -> list[Tensor]:
    """The bias corrections (1 - beta^t)^power at step t, by which each block is divided."""
    known: dict[int, Tensor] = {}  # most blocks share one tensor of step numbers
    for number in steps:
        if id(number) not in known:
            bias = (1 - beta ** number.double()).pow(power)
            known[id(number)] = bias.to(blocks[0].dtype)
    return [
        known[id(number)].view(-1, *[1] * (block.ndim - 1))
        for number, block in zip(steps, blocks, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class AdamWRule(AdamRule):
    """Adam with decoupled weight decay: C (1 - lr weight_decay) - lr direction.

    Source: torch.optim.AdamW, arXiv:1711.05101.
    """

    @classmethod
    def options_of(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.options_of`."""
        return super().options_of(group) | {"decoupled": True}
