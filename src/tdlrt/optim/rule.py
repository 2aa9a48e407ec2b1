"""What a torch optimiser means for a Tucker weight: the interface that each one implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.linalg import TangentSpace, TangentVector, reject

__all__ = ["Moments", "Rule"]

Moments = Mapping[str, TangentVector]
"""State of the optimiser for one layer, by torch's name; empty before the first step."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Hyperparameters of a torch optimiser, and what it does to one block of coordinates.

    A Tucker weight has the blocks of a tangent vector: the core and a part per moving basis. The
    optimiser acts on each as it does on an ordinary tensor. W itself is a tangent vector with a
    core part only, so weight decay never touches a basis.

    Attributes:
        first_moments: Names of the state that is linear in the gradient. It moves along by
            orthogonal projection onto the new tangent space.
        second_moments: Names of the state that holds means of squares, per coordinate. It moves
            along by `tdlrt.linalg.Transport.squares`.
        counts_steps: Whether the direction depends on the number of the step.
        refused: Options without a counterpart for Tucker weights.
    """

    first_moments: ClassVar[tuple[str, ...]]
    second_moments: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = False
    refused: ClassVar[tuple[str, ...]] = ("fused", "capturable", "differentiable")

    lr: float
    weight_decay: float = 0.0
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """Read the rule from a param_group of the torch optimiser.

        Raises:
            UnsupportedOptimizerError: An option has no counterpart for Tucker weights.
        """
        for option in cls.refused:
            if group.get(option):
                raise UnsupportedOptimizerError(
                    f"{option}: got {group[option]}, which has no rule for Tucker weights; "
                    f"leave it out"
                )
        return cls(
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            **cls._options(group),
        )

    @classmethod
    @abstractmethod
    def _options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds, from a param_group."""

    @abstractmethod
    def advance(
        self, gradient: Tensor, weight: Tensor | None, moments: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on a block of coordinates, without changing its arguments.

        Args:
            gradient: The gradient.
            weight: The block of W, for weight decay; None where W has none.
            moments: The state of this block; empty before the first step.
            step: Number of this step, from 1.

        Returns:
            The direction D of the step W - lr D, and the new state.
        """

    def direction(
        self, gradient: TangentVector, moments: Moments, space: TangentSpace, step: int
    ) -> tuple[TangentVector, dict[str, TangentVector]]:
        """One step on all blocks of a Tucker weight.

        Args:
            gradient: P(grad L(W)).
            moments: The state, in coordinates of the same tangent space.
            space: The tangent space at W.
            step: Number of this step, from 1.

        Returns:
            The direction D of the step W - lr D, a tangent vector, and the new state.
        """
        core, cores = self.advance(
            gradient.core, space.core, {name: m.core for name, m in moments.items()}, step
        )
        parts = list(gradient.factors)
        states = [dict.fromkeys(cores, part) for part in parts]  # zero where nothing moves
        for mode in space.moving_modes:
            past = {name: m.factors[mode] for name, m in moments.items()}
            part, states[mode] = self.advance(gradient.factors[mode], None, past, step)
            if self.second_moments:  # scaling single coordinates leaves the tangent space
                part = reject(space.factors[mode], part)
            parts[mode] = part
        advanced = {
            name: TangentVector(core_state, tuple(state[name] for state in states))
            for name, core_state in cores.items()
        }
        return TangentVector(core, tuple(parts)), advanced
