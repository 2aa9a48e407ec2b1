"""What pure steps take and return: Tucker weights in stacks, with the state of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tdlrt.linalg import TangentSpace
from tdlrt.optim.rules import Moments

__all__ = ["Augmented", "Factors", "Iterate", "Lifted"]

Factors = Sequence[Tensor | None]
"""Bases of a stack by mode, B x n_i x r_i; None for a mode that is not factorised."""


class Iterate(NamedTuple):
    """Tucker weights, with the tangent space there, and the state of their optimiser.

    Attributes:
        space: The tangent space at W = space.core x_j space.factors[j].
        moments: The state, in coordinates of this space; empty before the first step.
        steps: Steps taken by each member.
        basis_steps: Steps taken by its bases, where they have rested in some; None where in none.
    """

    space: TangentSpace
    moments: Moments
    steps: Tensor
    basis_steps: Tensor | None = None


class Augmented(NamedTuple):
    """Tucker weights in augmented bases [U_i | V_i] after a step of `parallel`.

    Attributes:
        core: The core.
        factors: The bases.
        ranks: True ranks of each member, B x d in int64.
        origin: The weight before the step, and the state after it in coordinates there.
    """

    core: Tensor
    factors: Factors
    ranks: Tensor
    origin: Iterate


class Lifted(NamedTuple):
    """Tucker weights in augmented bases [U_i | V_i] between the two halves of a step of `bug`.

    Attributes:
        core: The core.
        factors: The bases.
        ranks: True ranks of each member, B x d in int64.
        moments: The state of the core in these bases.
        steps: Steps taken by each member.
    """

    core: Tensor
    factors: Factors
    ranks: Tensor
    moments: Mapping[str, Tensor]
    steps: Tensor
