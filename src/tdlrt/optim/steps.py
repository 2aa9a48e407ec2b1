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
    orthonormalize,
    polish_basis,
    truncate,
)
from tdlrt.optim.sgd import SGDRule
from tdlrt.ranks import FixedRank, RankPolicy

__all__ = ["Augmented", "Iterate", "basis_step", "core_step", "parallel_step", "retract"]


class Iterate(NamedTuple):
    """A Tucker weight, with the tangent space there, and its momentum in it.

    Attributes:
        space: The tangent space at W = space.core x_j space.factors[j].
        momentum: A tangent vector; None before the first step.
    """

    space: TangentSpace
    momentum: TangentVector | None

    @property
    def point(self) -> TuckerTensor:
        """W."""
        return TuckerTensor(self.space.core, self.space.factors)


class Augmented(NamedTuple):
    """A Tucker weight in augmented bases [U_i | V_i].

    Attributes:
        point: The weight in these bases.
        momentum: The ambient momentum in the coordinates of these bases, or None.
    """

    point: TuckerTensor
    momentum: Tensor | None


def parallel_step(
    iterate: Iterate, gradient: TangentVector, rule: SGDRule, policy: RankPolicy
) -> Iterate:
    """One single-pass step: W_1 = R(W_0 - lr M), R a retraction to the ranks the policy asks for.

    Without momentum and truncation W_1 = W_0 - lr P(grad L(W_0)): Riemannian gradient descent.
    Where ranks may change, R is the truncated HOSVD. Where they stay (`FixedRank`), R projects onto
    the bases orth(K_i(1)) of the basis step, which needs no singular values and differs from
    the HOSVD by O(lr^2).

    Args:
        iterate: W_0 and the momentum there.
        gradient: P(grad L(W_0)).
        rule: Step size, momentum and weight decay.
        policy: Which ranks to keep.

    Returns:
        W_1 and the momentum projected onto the tangent space there.

    Raises:
        NonFiniteError: W_1 is not finite.

    Source: arXiv:2412.00858 (parallel basis update and Galerkin); arXiv:2205.13571 for the
    basis step at fixed rank.
    """
    space = iterate.space
    direction = rule.direction(gradient, iterate.momentum, space.core)
    if isinstance(policy, FixedRank):
        return _fixed_rank_step(space, direction, rule)
    new_bases = _new_bases(space, direction)
    ambient = space.embed(direction, new_bases)
    core = -rule.lr * ambient
    core[tuple(slice(0, r) for r in space.core.shape)] += space.core
    point = TuckerTensor(core, _join(space.factors, new_bases))
    augmented = Augmented(point, ambient if rule.momentum else None)
    return retract(augmented, policy, tuple(space.core.shape), space.modes)


def _fixed_rank_step(space: TangentSpace, direction: TangentVector, rule: SGDRule) -> Iterate:
    bases = list(space.factors)
    for mode in space.moving_modes:
        bases[mode] = orthonormalize(space.basis_step(direction, rule.lr, mode))
    target, momentum = space.project_step(direction, rule.lr, bases)
    _squared_norm(target.core)
    return Iterate(target, momentum if rule.momentum else None)


def basis_step(iterate: Iterate, gradient: TangentVector, rule: SGDRule) -> Augmented:
    """Basis step and lift of `bug`: the weight stays, the bases become orth[U_i | K_i(1)].

    K_i(1) = K_i - lr M_{K_i}; only the span counts, so neither K_i nor lr appears. The momentum
    that goes on is the one from before this gradient, which the core step sees again.

    Args:
        iterate: W_0 and the momentum there.
        gradient: P(grad L(W_0)).
        rule: Momentum and weight decay.

    Returns:
        W_0 and the momentum in the augmented bases.

    Source: arXiv:2305.19059, algorithm 1; arXiv:2201.10291 for the augmentation.
    """
    space, past = iterate
    direction = rule.direction(gradient, past, space.core)
    new_bases = _new_bases(space, direction)
    padding = tuple(torch.zeros_like(factor) for factor in space.factors)
    core = space.embed(TangentVector(space.core, padding), new_bases)
    lifted = TuckerTensor(core, _join(space.factors, new_bases))
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
    rule = policy.rule(_squared_norm(core), ranks, modes)
    truncated, projections = truncate(core, rule, modes)
    factors = tuple(
        basis if projection is None else polish_basis(basis @ projection)
        for basis, projection in zip(bases, projections, strict=True)
    )
    space, momentum = TangentSpace(truncated, factors, modes), augmented.momentum
    if momentum is None:
        return Iterate(space, None)
    return Iterate(space, space.project(momentum, bases, projections))


def _squared_norm(core: Tensor) -> float:
    squared_norm = float(torch.linalg.vector_norm(core, dtype=torch.float64)) ** 2
    if not math.isfinite(squared_norm):
        raise NonFiniteError(
            "weight: the step would make it NaN or infinite, expected finite values; nothing was "
            "changed. Lower lr"
        )
    return squared_norm


def _new_bases(space: TangentSpace, direction: TangentVector) -> list[Tensor]:
    return [
        new_directions(factor, part) if mode in space.moving_modes else factor[:, :0]
        for mode, (factor, part) in enumerate(zip(space.factors, direction.factors, strict=True))
    ]


def _join(factors: Sequence[Tensor], new_bases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.cat([factor, new], dim=1) if new.shape[1] else factor
        for factor, new in zip(factors, new_bases, strict=True)
    )
