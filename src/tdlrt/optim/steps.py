"""The two integrators as pure functions: a point, a gradient and a state in, new ones out.

They check nothing and wait for nothing: whether a result is finite is seen by who puts it in place.

Both end in a retraction, the truncation of a core in augmented bases or a projection onto bases of
the same rank. The state of the optimiser moves along: first moments by orthogonal projection onto
the new tangent space, second moments coordinate by coordinate (`tdlrt.linalg.Transport`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg import (
    Cut,
    RankRule,
    TangentSpace,
    TangentVector,
    Transport,
    TuckerTensor,
    multi_mode_product,
    new_directions,
    orthonormalize,
    polish_basis,
    stochastic,
    truncate,
    unfold,
)
from tdlrt.optim.rule import Moments, Rule

__all__ = [
    "Augmented",
    "Iterate",
    "Lifted",
    "augmented_step",
    "basis_step",
    "core_step",
    "fixed_rank_step",
    "retract",
    "retract_lifted",
]


class Iterate(NamedTuple):
    """A Tucker weight, with the tangent space there, and the state of its optimiser.

    Attributes:
        space: The tangent space at W = space.core x_j space.factors[j].
        moments: The state, in coordinates of this space; empty before the first step.
        step: Steps taken.
    """

    space: TangentSpace
    moments: Moments
    step: int

    @property
    def point(self) -> TuckerTensor:
        """W."""
        return TuckerTensor(self.space.core, self.space.factors)


class Augmented(NamedTuple):
    """A Tucker weight in augmented bases [U_i | V_i] after a step of `parallel`.

    Attributes:
        point: The weight.
        origin: The weight before the step, and the state after it in coordinates there.
    """

    point: TuckerTensor
    origin: Iterate


class Lifted(NamedTuple):
    """A Tucker weight in augmented bases [U_i | V_i] between the two halves of a step of `bug`.

    Attributes:
        point: The weight.
        moments: The state of the core in these bases.
        step: Steps taken.
    """

    point: TuckerTensor
    moments: Mapping[str, Tensor]
    step: int


def augmented_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Augmented:
    """One single-pass step W_0 - lr D, not truncated yet.

    For plain gradient descent D = P(grad L(W_0)). The bases [U_i | V_i] hold all of it, V_i being
    the directions that D adds.

    Args:
        iterate: W_0 and the state there.
        gradient: P(grad L(W_0)).
        rule: The optimiser.

    Returns:
        W_0 - lr D in augmented bases.

    Source: arXiv:2412.00858 (parallel basis update and Galerkin).
    """
    space = iterate.space
    direction, moments = _direction(iterate, gradient, rule)
    new_bases = _new_bases(space, direction)
    core = space.embed(direction, new_bases).mul_(-rule.lr)
    core[tuple(slice(0, r) for r in space.core.shape)] += space.core
    point = TuckerTensor(core, _join(space.factors, new_bases))
    return Augmented(point, Iterate(space, moments, iterate.step + 1))


def retract(augmented: Augmented, rule: Rule, rank_rule: RankRule) -> Iterate:
    """Truncate the core after a step of `parallel`, by the HOSVD, and move the state.

    Args:
        augmented: The weight and the state.
        rule: The optimiser.
        rank_rule: Which ranks to keep.

    Returns:
        The truncated weight, within the tolerance of the rule, and the state there.
    """
    origin = augmented.origin
    space, _ = _truncated(augmented.point, rank_rule, origin.space.modes)
    transport = Transport(origin.space, space.factors)
    return Iterate(space, _moved(rule, origin.moments, transport, space), origin.step)


def fixed_rank_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Iterate:
    """One single-pass step W_1 = (W_0 - lr D) x_i U_i' U_i'^T that keeps the ranks.

    U_i' = orth K_i(1) are the bases of the basis step. They need no singular values and differ from
    those of the HOSVD by O(lr^2).

    Args:
        iterate: W_0 and the state there.
        gradient: P(grad L(W_0)).
        rule: The optimiser.

    Returns:
        W_1 and the state there.

    Source: arXiv:2205.13571 for the basis step at fixed rank.
    """
    space = iterate.space
    direction, moments = _direction(iterate, gradient, rule)
    bases = list(space.factors)
    for mode in space.moving_modes:
        bases[mode] = orthonormalize(space.basis_step(direction, rule.lr, mode))
    transport = Transport(space, bases)
    cut = transport.cut(direction)
    core = torch.sub(transport.point(), cut.core, alpha=rule.lr)
    target = TangentSpace(core, bases, space.modes)
    # The momentum of the heavy ball is the direction itself.
    moved = _moved(rule, moments, transport, target, known=(direction, cut))
    return Iterate(target, moved, iterate.step + 1)


def basis_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Lifted:
    """Basis step and lift of `bug`: the weight stays, the bases become orth[U_i | K_i(1)].

    K_i(1) = K_i - lr D_{K_i}; only the span counts, so neither K_i nor lr appears. The state
    that goes on is the one from before this gradient, which the core step sees again.

    Args:
        iterate: W_0 and the state there.
        gradient: P(grad L(W_0)).
        rule: The optimiser.

    Returns:
        W_0 and the state in the augmented bases.

    Source: arXiv:2305.19059, algorithm 1; arXiv:2201.10291 for the augmentation.
    """
    space = iterate.space
    direction, _ = _direction(iterate, gradient, rule)
    new_bases = _new_bases(space, direction)
    padding = [count for new in reversed(new_bases) for count in (0, new.shape[1])]
    core = torch.nn.functional.pad(space.core, padding)  # which counts modes from the last
    moments: dict[str, Tensor] = {}
    for name, moment in iterate.moments.items():
        if name in rule.first_moments:
            moments[name] = space.embed(moment, new_bases)
        else:
            moments[name] = _lifted_squares(moment.core, new_bases)
    return Lifted(TuckerTensor(core, _join(space.factors, new_bases)), moments, iterate.step)


def core_step(lifted: Lifted, gradient: Tensor, rule: Rule) -> Lifted:
    """Galerkin step of `bug`: one step of the optimiser on the core in fixed bases.

    Args:
        lifted: The weight and the state in augmented bases.
        gradient: grad_C L there.
        rule: The optimiser.

    Returns:
        The weight and the state after the step, in the same bases.
    """
    core, bases = lifted.point
    step = lifted.step + 1
    direction, moments = rule.advance(gradient, core, lifted.moments, step)
    core = torch.sub(core, direction, alpha=rule.lr)
    return Lifted(TuckerTensor(core, bases), moments, step)


def retract_lifted(
    lifted: Lifted, rule: Rule, rank_rule: RankRule, modes: Collection[int]
) -> Iterate:
    """Truncate the core at the end of a step of `bug`, and move the state.

    A second moment has no basis parts in augmented bases B_i: those come from the core's, with the
    rows of B_i as coordinates, A(B_i) Mat_i(v x_{j != i} A(P_j^T)) A(Q'_i^T)^T.

    Args:
        lifted: The weight and the state in augmented bases.
        rule: The optimiser.
        rank_rule: Which ranks to keep.
        modes: The modes that are factorised.

    Returns:
        The truncated weight, within the tolerance of the rule, and the state there.
    """
    bases = lifted.point.factors
    space, projections = _truncated(lifted.point, rank_rule, modes)
    moments: dict[str, TangentVector] = {}
    for name, moment in lifted.moments.items():
        if name in rule.first_moments:
            moments[name] = space.project(moment, bases, projections)
        else:
            moments[name] = _lowered_squares(moment, bases, projections, space)
    return Iterate(space, moments, lifted.step)


def _direction(
    iterate: Iterate, gradient: TangentVector, rule: Rule
) -> tuple[TangentVector, dict[str, TangentVector]]:
    return rule.direction(gradient, iterate.moments, iterate.space, iterate.step + 1)


def _moved(
    rule: Rule,
    moments: Moments,
    transport: Transport,
    target: TangentSpace,
    known: tuple[TangentVector, Cut] | None = None,
) -> dict[str, TangentVector]:
    """State at the target; `known` is a tangent vector whose cut is there already."""
    moved: dict[str, TangentVector] = {}
    for name, moment in moments.items():
        if name not in rule.first_moments:
            moved[name] = transport.squares(moment, target)
        elif known is not None and moment.core is known[0].core:
            moved[name] = transport.vector(moment, known[1], target)
        else:
            moved[name] = transport.vector(moment, transport.cut(moment), target)
    return moved


def _truncated(
    point: TuckerTensor, rank_rule: RankRule, modes: Collection[int]
) -> tuple[TangentSpace, tuple[Tensor | None, ...]]:
    core, projections = truncate(point.core, rank_rule, modes)
    factors = tuple(
        basis if projection is None else polish_basis(basis @ projection)
        for basis, projection in zip(point.factors, projections, strict=True)
    )
    return TangentSpace(core, factors, modes), projections


def _lifted_squares(core: Tensor, new_bases: Sequence[Tensor]) -> Tensor:
    """A second moment of the core in augmented bases: new coordinates get the mean of the mode."""
    for mode, new in enumerate(new_bases):
        if new.shape[1]:
            means = core.mean(dim=mode, keepdim=True)
            core = torch.cat([core, *[means] * new.shape[1]], dim=mode)
    return core


def _lowered_squares(
    core: Tensor,
    bases: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    space: TangentSpace,
) -> TangentVector:
    """A second moment of the core in augmented bases, after their truncation."""
    turns = [None if p is None else stochastic(p.mT) for p in projections]
    parts = [torch.zeros_like(factor) for factor in space.factors]
    for mode in space.moving_modes:
        rest = unfold(multi_mode_product(core, turns, skip=mode), mode)
        # The product of the small matrices first: the basis is the longest of the three.
        parts[mode] = stochastic(bases[mode]) @ (rest @ stochastic(space.rows(mode)).mT)
    return TangentVector(multi_mode_product(core, turns), tuple(parts))


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
