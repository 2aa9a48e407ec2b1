"""What a torch optimiser means for a Tucker weight: the interface that each one implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.linalg import TangentSpace, TangentVector, reject

__all__ = ["Moments", "Rule"]

Moments = Mapping[str, TangentVector]
"""State of the optimiser for a stack of layers, by torch's name; empty before the first step."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Hyperparameters of a torch optimiser, and what it does to one block of coordinates.

    A Tucker weight has the blocks of a tangent vector: the core and a part per moving basis. The
    optimiser acts on each as it does on an ordinary tensor. W itself is a tangent vector with a
    core part only, so weight decay never touches a basis. Blocks come in stacks of B layers.

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

    lr: float | Tensor
    weight_decay: float = 0.0
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], *, capturable: bool = False) -> Self:
        """Read the rule from a param_group of the torch optimiser.

        Args:
            group: The options.
            capturable: Leave lr the tensor that it is, so that nothing is waited for.

        Raises:
            UnsupportedOptimizerError: An option has no counterpart for Tucker weights.
        """
        for option in cls.refused:
            if group.get(option) and not (option == "capturable" and capturable):
                raise UnsupportedOptimizerError(
                    f"{option}: got {group[option]}, which has no rule for Tucker weights; "
                    f"leave it out"
                )
        return cls(
            lr=group["lr"] if capturable else float(group["lr"]),
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
        self,
        gradients: list[Tensor],
        weight: Tensor,
        moments: Mapping[str, list[Tensor]],
        steps: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """One step on blocks of coordinates, without changing its arguments.

        Args:
            gradients: The gradients, B x ... each; the first is the core's.
            weight: The core, for weight decay; W has nothing in the other blocks.
            moments: The state, block by block; empty before the first step.
            steps: Number of this step for each layer, from 1, block by block: B numbers each.

        Returns:
            The direction D of the step W - lr D, and the new state, block by block.
        """

    def direction(
        self,
        gradient: TangentVector,
        moments: Moments,
        space: TangentSpace,
        steps: Tensor,
        basis_steps: Tensor | None = None,
    ) -> tuple[TangentVector, dict[str, TangentVector]]:
        """One step on all blocks of a Tucker weight.

        Args:
            gradient: P(grad L(W)).
            moments: The state, in coordinates of the same tangent space.
            space: The tangent space at W.
            steps: Number of this step for each layer, from 1: B numbers.
            basis_steps: The same of the bases, where they did not move in every step.

        Returns:
            The direction D of the step W - lr D, a tangent vector, and the new state.
        """
        modes = tuple(gradient.parts)
        (core, *parts), states = self.advance(
            [gradient.core, *gradient.parts.values()],
            space.core,
            {name: [m.core, *(m.parts[i] for i in modes)] for name, m in moments.items()},
            [steps, *[steps if basis_steps is None else basis_steps] * len(modes)],
        )
        if self.second_moments:  # scaling single coordinates leaves the tangent space
            parts = [reject(space.factor(i), part) for i, part in zip(modes, parts, strict=True)]
        advanced = {
            name: TangentVector(state[0], dict(zip(modes, state[1:], strict=True)))
            for name, state in states.items()
        }
        return TangentVector(core, dict(zip(modes, parts, strict=True))), advanced
