"""What pure steps take and return: Tucker weights in stacks, with the state of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tdlrt.linalg import TangentSpace
from tdlrt.optim.rules import Moments

__all__ = ["Augmented", "Factors", "Iterate", "Lifted"]

Factors = Sequence[Tensor | None]
"""The bases of a stack by mode, B x n_i x r_i; None for a mode that is not factorised."""


class Iterate(NamedTuple):
    """Tucker weights with their tangent space and the optimiser's state.

    Attributes:
        space: The tangent space at W = space.core x_j space.factors[j].
        moments: The state, in coordinates of this space; empty before the first step.
        steps: Number of steps that each member has taken.
        basis_steps: Number of steps that moved its bases; None if the bases have never rested.
    """

    space: TangentSpace
    moments: Moments
    steps: Tensor
    basis_steps: Tensor | None = None

    def weights(self) -> list[Tensor]:
        """The core and the bases."""
        return _present(self.space.core, self.space.factors)

    def state(self) -> list[Tensor]:
        """The moments."""
        return [block for of in self.moments.values() for block in (of.core, *of.parts.values())]


class Augmented(NamedTuple):
    """Tucker weights in augmented bases [U_i | V_i] after a step of `parallel`.

    Attributes:
        core: The core.
        factors: The augmented bases.
        ranks: True ranks of each member, B x d in int64.
        origin: The weight before the step, with the new state in the coordinates of that weight.
    """

    core: Tensor
    factors: Factors
    ranks: Tensor
    origin: Iterate

    def weights(self) -> list[Tensor]:
        """The core and the bases."""
        return _present(self.core, self.factors)

    def state(self) -> list[Tensor]:
        """The moments."""
        return self.origin.state()


class Lifted(NamedTuple):
    """Tucker weights in augmented bases [U_i | V_i] between the two halves of a step of `bug`.

    Attributes:
        core: The core.
        factors: The augmented bases.
        ranks: True ranks of each member, B x d in int64.
        moments: The state of the core in these bases.
        steps: Number of steps that each member has taken.
    """

    core: Tensor
    factors: Factors
    ranks: Tensor
    moments: Mapping[str, Tensor]
    steps: Tensor

    def weights(self) -> list[Tensor]:
        """The core and the bases."""
        return _present(self.core, self.factors)

    def state(self) -> list[Tensor]:
        """The moments."""
        return list(self.moments.values())


def _present(core: Tensor, factors: Factors) -> list[Tensor]:
    return [core, *(factor for factor in factors if factor is not None)]
