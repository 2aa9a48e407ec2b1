"""The optimisers, entry by entry on one block of numbers: what torch.optim does to a Parameter."""

from dataclasses import dataclass

from torch import Tensor

Moments = dict[str, Tensor]
"""Moments of one block by torch's names; empty before the first step."""

FIRST = ("momentum_buffer", "exp_avg")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class SGD:
    """buf = mu buf + (1 - dampening) g, the first time buf = g; direction buf or g + mu buf."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Moments, step: int
    ) -> tuple[Tensor, Moments]:
        """Direction X (the block moves by -lr X) and moments after step ``step``, counted from 1.

        ``weight`` is None for a block that does not decay.
        """
        g = -gradient if self.maximize else gradient
        if weight is not None:
            g = g + self.weight_decay * weight
        if self.momentum == 0:
            return g, {}
        buffer = g
        if moments:
            buffer = self.momentum * moments["momentum_buffer"] + (1 - self.dampening) * g
        direction = g + self.momentum * buffer if self.nesterov else buffer
        return direction, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Adam:
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2; direction m^ / (sqrt(v^) + eps)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Moments, step: int
    ) -> tuple[Tensor, Moments]:
        """As for SGD; the decay is coupled, it goes through the moments."""
        g = -gradient if self.maximize else gradient
        if weight is not None:
            g = g + self.weight_decay * weight
        return self._moments(g, moments, step)

    def _moments(self, g: Tensor, moments: Moments, step: int) -> tuple[Tensor, Moments]:
        zero = 0 * g
        b1, b2 = self.betas
        mean = b1 * moments.get("exp_avg", zero) + (1 - b1) * g
        square = b2 * moments.get("exp_avg_sq", zero) + (1 - b2) * g * g
        new = {"exp_avg": mean, "exp_avg_sq": square}
        if self.amsgrad:
            square = square.maximum(moments.get("max_exp_avg_sq", zero))
            new["max_exp_avg_sq"] = square
        root = square.sqrt() / (1 - b2**step) ** 0.5
        return mean / (1 - b1**step) / (root + self.eps), new


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam whose decay is decoupled: it joins the direction, not the moments."""

    weight_decay: float = 1e-2

    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Moments, step: int
    ) -> tuple[Tensor, Moments]:
        """As for SGD."""
        direction, moments = self._moments(-gradient if self.maximize else gradient, moments, step)
        if weight is not None:
            direction = direction + self.weight_decay * weight
        return direction, moments


Rule = SGD | Adam
