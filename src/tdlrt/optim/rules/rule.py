"""The interface of a rule, the meaning of a torch optimiser for a Tucker weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.linalg import TangentSpace, TangentVector, reject

__all__ = ["Moments", "Rule"]

Moments = Mapping[str, TangentVector]
"""The optimiser's state for a stack of layers, by torch's names; empty before the first step."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Hyperparameters of a torch optimiser, and its step on blocks of coordinates.

    The coordinates of a Tucker weight come in the blocks of a tangent vector: the core and one part
    per moving basis. The optimiser treats each block like an ordinary tensor. W itself is a tangent
    vector with a core part only, so weight decay never changes a basis. Blocks are stacks of B
    layers, padded with zeros; the direction of zeros has to be zero.

    To add an optimiser, derive a frozen dataclass with the optimiser's options as fields, declare
    the state, write `advance`, and register the class with `register_rule`. An optimiser that moves
    each entry by itself needs no class of its own, see `adapted_rule`.

    Attributes:
        first_moments: Names of the state that is linear in the gradient. It is transported by
            orthogonal projection onto the new tangent space.
        second_moments: Names of the state that holds a mean of squares per coordinate, a number
            from 0. It is transported by `tdlrt.linalg.Transport.squares`.
        counts_steps: Whether the direction depends on the step number.
        stays_tangent: Whether directions are linear in gradients and first moments, and so have
            basis parts that are orthogonal to the bases as those have. Others are made orthogonal.
        counters: Names of numbers, beside 'step', that the class keeps for each parameter.
        refused: Options that have no counterpart for Tucker weights.
    """

    first_moments: ClassVar[tuple[str, ...]]
    second_moments: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = False
    stays_tangent: ClassVar[bool] = False
    counters: ClassVar[Collection[str]] = ()
    refused: ClassVar[tuple[str, ...]] = ("fused", "capturable", "differentiable")

    lr: float | Tensor
    weight_decay: float = 0.0
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], *, capturable: bool = False) -> Self:
        """Read the rule from a param_group of the torch optimiser.

        Args:
            group: The options.
            capturable: Keep lr a tensor, so that reading it does not wait for the device.

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
            weight_decay=float(group.get("weight_decay", 0.0)),
            maximize=bool(group.get("maximize", False)),
            **cls.options_of(group),
        )

    @classmethod
    def options_of(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds, from a param_group: options of the same names."""
        own = {field.name for field in fields(cls)} - {field.name for field in fields(Rule)}
        return {name: group[name] for name in own}

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
            weight: The core, for weight decay; W is zero in the other blocks.
            moments: The state by name, a tensor per block; empty before the first step.
            steps: The number of this step, from 1, for each block: a tensor of B numbers.

        Returns:
            The direction D of the step W - lr D, and the new state, a tensor per block.
        """

    def _fresh(
        self, gradients: list[Tensor], weight: Tensor, *, decoupled: bool = False
    ) -> list[Tensor]:
        """The gradients of what is minimised, with weight decay in the core's unless decoupled."""
        fresh = list(torch._foreach_neg(gradients)) if self.maximize else list(gradients)
        if self.weight_decay and not decoupled:
            fresh[0] = fresh[0] + self.weight_decay * weight
        return fresh

    def largest_norm(self, dtype: torch.dtype, *, sparse: bool = False) -> float:
        """A bound within which torch's own step of a plain parameter stays finite.

        Args:
            dtype: Type of the parameter.
            sparse: Whether its gradient is sparse, which not every optimiser takes.

        Returns:
            If the norms of the parameter, its gradient and every tensor of its state are below it,
            they are finite after the step. Zero where nothing is known.
        """
        return 0.0

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
            steps: The number of this step for each layer, from 1: B numbers.
            basis_steps: The number of this step for the bases, if these rested in some steps.

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
        if not self.stays_tangent:
            parts = [reject(space.factor(i), part) for i, part in zip(modes, parts, strict=True)]
        for name in states.keys() & set(self.second_moments):  # they need not begin with zeros
            states[name][0] = space.layout.without_padding(states[name][0])
        advanced = {
            name: TangentVector(state[0], dict(zip(modes, state[1:], strict=True)))
            for name, state in states.items()
        }
        return TangentVector(core, dict(zip(modes, parts, strict=True))), advanced
