"""Stochastic gradient descent with heavy-ball momentum in the tangent space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.linalg import TangentVector

__all__ = ["SGDRule"]


@dataclass(frozen=True, kw_only=True)
class SGDRule:
    """Hyperparameters of torch.optim.SGD, and what they mean for a Tucker weight.

    M = momentum M + (1 - dampening) (P(grad L) + weight_decay W), the first M being the gradient
    alone. W itself is a tangent vector with a core part only, so weight decay never touches a
    basis.

    Source: torch.optim.SGD; arXiv:2506.17475 for the tangent space.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> SGDRule:
        """Read the rule from a param_group of torch.optim.SGD.

        Raises:
            UnsupportedOptimizerError: An option has no counterpart for Tucker weights.
        """
        for option in ("nesterov", "fused", "differentiable"):
            if group.get(option):
                raise UnsupportedOptimizerError(
                    f"{option}: got {group[option]}, which has no rule for Tucker weights; "
                    f"leave it out"
                )
        names = ("momentum", "dampening", "weight_decay")
        return cls(
            lr=float(group["lr"]),
            maximize=bool(group["maximize"]),
            **{name: float(group[name]) for name in names},
        )

    def decayed(self, gradient: Tensor, core: Tensor) -> Tensor:
        """Gradient of L + weight_decay ||W||^2 / 2 for the core, in the sense of descent."""
        gradient = -gradient if self.maximize else gradient
        return gradient + self.weight_decay * core if self.weight_decay else gradient

    def accumulate(self, gradient: Tensor, momentum: Tensor | None) -> Tensor:
        """New momentum of one coordinate block."""
        if momentum is None or not self.momentum:
            return gradient
        fresh = (1 - self.dampening) * gradient if self.dampening else gradient
        return torch.add(fresh, momentum, alpha=self.momentum)

    def direction(
        self, gradient: TangentVector, momentum: TangentVector | None, core: Tensor
    ) -> TangentVector:
        """New momentum as a tangent vector: minus the direction of the step."""
        sign = -1.0 if self.maximize else 1.0
        past_core, past_parts = momentum or (None, (None,) * len(gradient.factors))
        parts = zip(gradient.factors, past_parts, strict=True)
        return TangentVector(
            self.accumulate(self.decayed(gradient.core, core), past_core),
            tuple(self.accumulate(sign * part, past) for part, past in parts),
        )
