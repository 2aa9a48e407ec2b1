"""torch.optim.SGD in the tangent space: heavy ball and Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdlrt.optim.rule import Rule

__all__ = ["SGDRule"]

_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class SGDRule(Rule):
    """Stochastic gradient descent.

    M = momentum M + (1 - dampening) (grad L + weight_decay W), the first M being the gradient
    alone; the direction is M, with `nesterov` grad L + weight_decay W + momentum M.

    Source: torch.optim.SGD; arXiv:2506.17475 for the tangent space.
    """

    first_moments: ClassVar[tuple[str, ...]] = (_MOMENTUM,)

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @classmethod
    def _options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
        }

    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Rule.advance`."""
        if self.maximize:
            gradient = -gradient
        if weight is not None and self.weight_decay:
            gradient = gradient + self.weight_decay * weight
        if not self.momentum:
            return gradient, {}
        past = moments.get(_MOMENTUM)
        if past is None:
            momentum = gradient
        else:
            fresh = (1 - self.dampening) * gradient if self.dampening else gradient
            momentum = torch.add(fresh, past, alpha=self.momentum)
        if self.nesterov:
            return torch.add(gradient, momentum, alpha=self.momentum), {_MOMENTUM: momentum}
        return momentum, {_MOMENTUM: momentum}
