"""The two integrators as pure functions: a point, a gradient and a momentum in, new ones out.

Both end in a retraction, the truncation of a core in augmented bases, and carry the momentum along
by orthogonal projection onto the new tangent space. The ambient momentum lies in the span of the
augmented bases, so the projection is done there, on tensors of the size of the augmented core.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import NonFiniteError
from tdlrt.linalg import (
    TangentSpace,
    TangentVector,
    TuckerTensor,
    new_directions,
    polish_basis,
    truncate,
)
from tdlrt.optim.sgd import SGDRule
from tdlrt.ranks import RankPolicy

__all__ = ["Augmented", "Iterate", "basis_step", "core_step", "parallel_step", "retract"]


class Iterate(NamedTuple):
    """A Tucker weight with its momentum, a tangent vector there (None before the first step)."""

    point: TuckerTensor
    momentum: TangentVector | None


class Augmented(NamedTuple):
    """A Tucker weight in augmented bases [U_i | V_i].

    Attributes:
        point: The weight in these bases.
        momentum: The ambient momentum in the coordinates of these bases, or None.
    """

    point: TuckerTensor
    momentum: Tensor | None


def parallel_step(
    iterate: Iterate,
    gradient: TangentVector,
    rule: SGDRule,
    policy: RankPolicy,
    space: TangentSpace,
) -> Iterate:
    """One single-pass step: W_1 = R(W_0 - lr M), R the truncation that the policy asks for.

    Without momentum and truncation W_1 = W_0 - lr P(grad L(W_0)): Riemannian gradient descent.

    Args:
        iterate: W_0 and the momentum there.
        gradient: P(grad L(W_0)).
        rule: Step size, momentum and weight decay.
        policy: Which ranks to keep.
        space: The tangent space at W_0.

    Returns:
        W_1 and the momentum projected onto the tangent space there.

    Source: arXiv:2412.00858 (parallel basis update and Galerkin).
    """
    core, factors = iterate.point
    direction = rule.direction(gradient, iterate.momentum, core)
    new_bases = _new_bases(factors, direction, space.moving_modes)
    ambient = space.embed(direction, new_bases)
    candidate = -rule.lr * ambient
    candidate[tuple(slice(0, r) for r in core.shape)] += core
    bases = _join(factors, new_bases)
    momentum = ambient if rule.momentum else None
    augmented = Augmented(TuckerTensor(candidate, bases), momentum)
    return retract(augmented, policy, tuple(core.shape), space.modes)


def basis_step(
    iterate: Iterate, gradient: TangentVector, rule: SGDRule, space: TangentSpace
) -> Augmented:
    """Basis step and lift of `bug`: the weight stays, the bases become orth[U_i | K_i(1)].

    K_i(1) = K_i - lr M_{K_i}; only the span counts, so neither K_i nor lr appears. The momentum
    that goes on is the one from before this gradient, which the core step sees again.

    Args:
        iterate: W_0 and the momentum there.
        gradient: P(grad L(W_0)).
        rule: Momentum and weight decay.
        space: The tangent space at W_0.

    Returns:
        W_0 and the momentum in the augmented bases.

    Source: arXiv:2305.19059, algorithm 1; arXiv:2201.10291 for the augmentation.
    """
    core, factors = iterate.point
    direction = rule.direction(gradient, iterate.momentum, core)
    new_bases = _new_bases(factors, direction, space.moving_modes)
    padding = TangentVector(core, tuple(torch.zeros_like(factor) for factor in factors))
    lifted = TuckerTensor(space.embed(padding, new_bases), _join(factors, new_bases))
    past = iterate.momentum
    return Augmented(lifted, None if past is None else space.embed(past, new_bases))


def core_step(augmented: Augmented, gradient: Tensor, rule: SGDRule) -> Augmented:
    """Galerkin step of `bug`: one step of the optimiser on the core in fixed bases.

    Args:
        augmented: The weight and the momentum in augmented bases.
        gradient: grad_C L there.
        rule: Step size, momentum and weight decay.

    Returns:
        The weight and the momentum after the step, in the same bases.
    """
    core, bases = augmented.point
    momentum = rule.accumulate(rule.decayed(gradient, core), augmented.momentum)
    point = TuckerTensor(core - rule.lr * momentum, bases)
    return Augmented(point, momentum if rule.momentum else None)


def retract(
    augmented: Augmented,
    policy: RankPolicy,
    ranks: Sequence[int],
    modes: Collection[int],
) -> Iterate:
    """Truncate the core and move the momentum to the new tangent space.

    Args:
        augmented: The weight and the momentum in augmented bases.
        policy: Which ranks to keep.
        ranks: The ranks before the augmentation.
        modes: The modes that are factorised.

    Returns:
        The truncated weight, within the policy's tolerance, and its momentum.

    Raises:
        NonFiniteError: The core is not finite.
    """
    core, bases = augmented.point
    squared_norm = float(torch.linalg.vector_norm(core, dtype=torch.float64)) ** 2
    if not math.isfinite(squared_norm):
        raise NonFiniteError(
            "weight: the step would make it NaN or infinite; nothing was changed. Lower lr"
        )
    truncated, projections = truncate(core, policy.rule(squared_norm, ranks, modes), modes)
    factors = tuple(
        basis if projection is None else polish_basis(basis @ projection)
        for basis, projection in zip(bases, projections, strict=True)
    )
    momentum = None
    if augmented.momentum is not None:
        # In the coordinates of the augmented bases the new bases are the projections themselves.
        inner = TangentSpace(truncated, projections, modes).project(augmented.momentum)
        parts = (basis @ part for basis, part in zip(bases, inner.factors, strict=True))
        momentum = TangentVector(inner.core, tuple(parts))
    return Iterate(TuckerTensor(truncated, factors), momentum)


def _new_bases(
    factors: Sequence[Tensor], direction: TangentVector, modes: Collection[int]
) -> list[Tensor]:
    return [
        new_directions(factor, part) if mode in modes else factor[:, :0]
        for mode, (factor, part) in enumerate(zip(factors, direction.factors, strict=True))
    ]


def _join(factors: Sequence[Tensor], new_bases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.cat([factor, new], dim=1) if new.shape[1] else factor
        for factor, new in zip(factors, new_bases, strict=True)
    )
