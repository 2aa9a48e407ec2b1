"""torch.optim.SGD in the tangent space: heavy ball and Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdlrt.optim.rules.rule import Rule

__all__ = ["SGDRule"]

_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class SGDRule(Rule):
    """Stochastic gradient descent.

    G = grad L + weight_decay W and M = momentum M + (1 - dampening) G, where the first M is G. The
    direction is M, or G + momentum M with `nesterov`.

    Source: torch.optim.SGD; arXiv:2506.17475 for the tangent space.
    """

    first_moments: ClassVar[tuple[str, ...]] = (_MOMENTUM,)
    stays_tangent: ClassVar[bool] = True

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @classmethod
    def options_of(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.options_of`."""
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
        }

    def largest_norm(self, dtype: torch.dtype, *, sparse: bool = False) -> float:
        """See `Rule.largest_norm`.

        With norms of at most N, |G| <= (1 + weight_decay) N, |M| <= (momentum + |1 - dampening|)
        |G| and the direction is at most |G| + momentum |M|.
        """
        momentum, damped = abs(self.momentum), abs(1 - self.dampening)
        growth = (1 + abs(self.weight_decay)) * (1 + momentum) * (1 + momentum + damped)
        return torch.finfo(dtype).max / 2 / (growth * (1 + abs(float(self.lr))))

    def advance(
        self,
        gradients: list[Tensor],
        weight: Tensor,
        moments: Mapping[str, list[Tensor]],
        steps: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """See `Rule.advance`."""
        fresh = self._fresh(gradients, weight)
        if not self.momentum:
            return fresh, {}
        past = moments.get(_MOMENTUM)
        if past is None:
            momentum = fresh
        else:
            damped = fresh
            if self.dampening:
                damped = list(torch._foreach_mul(fresh, 1 - self.dampening))
            momentum = list(torch._foreach_add(damped, past, alpha=self.momentum))
        if self.nesterov:
            ahead = torch._foreach_add(fresh, momentum, alpha=self.momentum)
            return list(ahead), {_MOMENTUM: momentum}
        return momentum, {_MOMENTUM: momentum}
