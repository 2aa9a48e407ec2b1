"""The steps of both integrators as pure functions on stacks of weights, gradients and state.

The functions check nothing and read nothing on the host. Each works on all members of a stack at
once; a single layer is a stack of one member.

A step ends with a retraction: the truncation of a core in augmented bases, or a projection onto
bases of the same rank. The optimiser's state is transported to the new point: first moments by
orthogonal projection onto the new tangent space, second moments coordinate by coordinate
(`tdlrt.linalg.Transport`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg import (
    Cut,
    Layout,
    TangentSpace,
    TangentVector,
    Transport,
    Truncation,
    multi_mode_product,
    new_directions,
    orthonormalize,
    pad_core,
    polish_basis,
    stochastic,
    unfold,
)
from tdlrt.optim.rules import Moments, Rule

__all__ = [
    "Augmented",
    "Iterate",
    "Lifted",
    "augmented_step",
    "basis_step",
    "brought_along",
    "core_step",
    "fixed_rank_step",
    "retract",
    "retract_lifted",
]

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


def augmented_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Augmented:
    """One single-pass step W_0 - lr D before its truncation.

    For plain gradient descent D = P(grad L(W_0)). The augmented bases [U_i | V_i] represent the
    result exactly, where V_i are the new directions of D.

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
    new = _NewBases(space, direction)
    core = pad_core(space.core, new.bases) - rule.lr * space.embed(direction, new.bases)
    origin = Iterate(space, moments, iterate.steps + 1)
    return Augmented(new.packed(core), new.factors, new.ranks, origin)


def retract(augmented: Augmented, truncation: Truncation, layout: Layout, rule: Rule) -> Iterate:
    """Truncate the result of a step of `parallel` by the HOSVD, and transport the state.

    Args:
        augmented: The weight and the state.
        truncation: `truncate_stack` of its core.
        layout: The true sizes afterwards.
        rule: The optimiser.

    Returns:
        The truncated weight and the state there.
    """
    origin = augmented.origin
    space, _ = _truncated(augmented.factors, truncation, layout)
    transport = Transport(origin.space, space.factors, layout)
    return Iterate(space, _moved(rule, origin.moments, transport, space), origin.steps)


def fixed_rank_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Iterate:
    """One single-pass step W_1 = (W_0 - lr D) x_i U_i' U_i'^T that keeps the ranks.

    U_i' = orth K_i(1) are the bases of the basis step. They need no singular values and differ from
    the bases of the HOSVD by O(lr^2). If the columns of K_i(1) are dependent up to rounding, U_i
    stays unchanged in this step.

    Args:
        iterate: W_0 and the state there.
        gradient: P(grad L(W_0)).
        rule: The optimiser.

    Returns:
        W_1 and the state there.

    Source: arXiv:2205.13571 for the basis step at fixed rank.
    """
    space, layout = iterate.space, iterate.space.layout
    direction, moments = _direction(iterate, gradient, rule)
    blocks = torch._foreach_mul([direction.core, *direction.parts.values()], rule.lr)
    displacement = TangentVector(blocks[0], dict(zip(direction.parts, blocks[1:], strict=True)))
    bases = list(space.factors)
    for mode in space.moving_modes:
        moved, basis = space.basis_step(displacement, mode), space.factor(mode)
        moved = orthonormalize(moved, basis, layout.padding(mode))
        moves = layout.moves(mode)
        bases[mode] = moved if moves is None else torch.where(moves[:, None, None], moved, basis)
    transport = Transport(space, bases, layout)
    cut = transport.cut(direction)
    core = (transport.point() - rule.lr * cut.core).contiguous()
    target = TangentSpace(core, bases, layout)
    # With heavy-ball momentum, the first moment is the direction itself.
    moved_state = _moved(rule, moments, transport, target, known=(direction, cut))
    return Iterate(target, moved_state, iterate.steps + 1)


def basis_step(iterate: Iterate, gradient: TangentVector, rule: Rule) -> Lifted:
    """Basis step and lift of `bug`: the weight stays, the bases become orth[U_i | K_i(1)].

    K_i(1) = K_i - lr D_{K_i}. Only the span of [U_i | K_i(1)] matters, so neither K_i nor lr
    appears. The result has the state from before this gradient, because the core step uses the
    core part of the gradient again.

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
    new = _NewBases(space, direction)
    moments = {
        name: new.packed(space.embed(moment, new.bases))
        if name in rule.first_moments
        else new.lifted_squares(moment.core)
        for name, moment in iterate.moments.items()
    }
    core = new.packed(pad_core(space.core, new.bases))
    return Lifted(core, new.factors, new.ranks, moments, iterate.steps)


def core_step(lifted: Lifted, gradient: Tensor, rule: Rule) -> Lifted:
    """Galerkin step of `bug`: one step of the optimiser on the core in fixed bases.

    Args:
        lifted: The weight and the state in augmented bases.
        gradient: grad_C L there.
        rule: The optimiser.

    Returns:
        The weight and the state after the step, in the same bases.
    """
    steps = lifted.steps + 1
    past = {name: [moment] for name, moment in lifted.moments.items()}
    (direction,), moments = rule.advance([gradient], lifted.core, past, [steps])
    advanced = {name: moment for name, (moment,) in moments.items()}
    core = lifted.core - rule.lr * direction
    return Lifted(core, lifted.factors, lifted.ranks, advanced, steps)


def retract_lifted(
    lifted: Lifted, before: Layout, truncation: Truncation, layout: Layout, rule: Rule
) -> Iterate:
    """Truncate the result of a step of `bug`, and transport the state.

    In augmented bases B_i a second moment v has a core part only. Its basis parts follow from that,
    with the rows of B_i as coordinates: A(B_i) Mat_i(v x_{j != i} A(P_j^T)) A(Q'_i^T)^T.

    Args:
        lifted: The weight and the state in augmented bases.
        before: The true sizes there.
        truncation: `truncate_stack` of its core.
        layout: The true sizes afterwards.
        rule: The optimiser.

    Returns:
        The truncated weight and the state there.
    """
    space, projections = _truncated(lifted.factors, truncation, layout)
    moments: dict[str, TangentVector] = {}
    for name, moment in lifted.moments.items():
        if name in rule.first_moments:
            moments[name] = space.project(moment, lifted.factors, projections)
        else:
            moments[name] = _lowered_squares(moment, lifted.factors, projections, before, space)
    return Iterate(space, moments, lifted.steps)


def brought_along(
    moments: Moments, source: TangentSpace, target: TangentSpace, rule: type[Rule]
) -> dict[str, TangentVector]:
    """The state of a weight whose core has moved while its bases rested, at the present core.

    The core part is up to date, since its coordinates are entries in the bases U_i. The basis parts
    refer to the rows Q_i of the core at the last step that moved the bases; they become
    K._i Q_i^T Q'_i.

    Args:
        moments: The state.
        source: The tangent space of the last step that moved the bases.
        target: The present tangent space, with the same bases.
        rule: The optimiser.
    """
    transport = Transport(source, target.factors, target.layout)
    return _moved(rule, moments, transport, target)


def _direction(
    iterate: Iterate, gradient: TangentVector, rule: Rule
) -> tuple[TangentVector, dict[str, TangentVector]]:
    bases = None if iterate.basis_steps is None else iterate.basis_steps + 1
    return rule.direction(gradient, iterate.moments, iterate.space, iterate.steps + 1, bases)


def _moved(
    rule: Rule | type[Rule],
    moments: Moments,
    transport: Transport,
    target: TangentSpace,
    known: tuple[TangentVector, Cut] | None = None,
) -> dict[str, TangentVector]:
    """The state at the target. `known` is a tangent vector whose `Cut` is already computed."""
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
    bases: Factors, truncation: Truncation, layout: Layout
) -> tuple[TangentSpace, list[Tensor | None]]:
    """The truncated weights in stacks as small as their ranks permit, and the projections."""
    columns = layout.columns
    core = truncation.core[(slice(None), *(slice(0, r) for r in columns))].contiguous()
    factors, projections = list(bases), list(truncation.projections)
    for mode, (basis, projection) in enumerate(zip(factors, projections, strict=True)):
        if projection is not None and basis is not None:
            projections[mode] = projection = projection[:, :, : columns[mode]]
            factors[mode] = polish_basis(basis @ projection)
    return TangentSpace(core, factors, layout), projections


def _lowered_squares(
    core: Tensor,
    bases: Factors,
    projections: Sequence[Tensor | None],
    before: Layout,
    space: TangentSpace,
) -> TangentVector:
    """A second moment after the truncation, from its core part in the augmented bases."""
    layout, dtype = space.layout, core.dtype
    turns = [
        None if p is None else stochastic(p.mT, before.shares(mode, layout, dtype))
        for mode, p in enumerate(projections)
    ]
    parts: dict[int, Tensor] = {}
    for mode in space.moving_modes:
        basis = bases[mode]
        if basis is None:
            continue
        rest = unfold(multi_mode_product(core, turns, skip=mode), mode, 1)
        rows = stochastic(space.rows(mode), layout.row_shares(mode, dtype))
        # The two small matrices are multiplied first, because the basis has the most rows.
        part = stochastic(basis, before.column_shares(mode, dtype)) @ (rest @ rows.mT)
        parts[mode] = space.masked(part, mode)
    return TangentVector(multi_mode_product(core, turns), parts)


class _NewBases:
    """The augmented bases [U_i | V_i] of a step, true columns first, and changes into them."""

    def __init__(self, space: TangentSpace, direction: TangentVector) -> None:
        layout = space.layout
        self.bases: dict[int, Tensor] = {}
        self.factors: list[Tensor | None] = list(space.factors)
        self._layout, self._fresh, self._orders = layout, {}, {}
        ranks = list(layout.rank_tensor().unbind(dim=1))
        for mode, part in direction.parts.items():
            new, count = new_directions(space.factor(mode), part, layout.spare(mode))
            self.bases[mode] = new
            fresh = torch.arange(new.shape[2], device=new.device) < count[:, None]
            self._fresh[mode] = fresh
            joined = torch.cat([space.factor(mode), new], dim=2)
            padding = layout.padding(mode)
            if padding is not None:  # the padding of U_i has to move behind V_i
                absent = torch.cat([padding > 0, ~fresh], dim=1)
                self._orders[mode] = absent.int().argsort(dim=1, stable=True)
                joined = joined.take_along_dim(self._orders[mode][:, None, :], dim=2)
            self.factors[mode] = joined
            ranks[mode] = ranks[mode] + count
        self.ranks = torch.stack(ranks, dim=1)

    def packed(self, core: Tensor) -> Tensor:
        """A core in the bases [U_i | V_i], reordered so that true entries come first."""
        for mode in self._orders:
            core = self._packed_in(core, mode)
        return core

    def _packed_in(self, core: Tensor, mode: int) -> Tensor:
        order = self._orders[mode]
        shape = [len(order), *[1] * (core.ndim - 1)]
        shape[1 + mode] = order.shape[1]
        return core.take_along_dim(order.view(shape), dim=1 + mode)

    def lifted_squares(self, core: Tensor) -> Tensor:
        """A second moment of the core in the new bases; new coordinates get the mode's mean."""
        ranks = self._layout.rank_tensor()
        for mode, fresh in self._fresh.items():
            shape = [-1, *[1] * (core.ndim - 1)]
            mean = core.sum(dim=1 + mode, keepdim=True) / ranks[:, mode].view(shape)
            shape[1 + mode] = fresh.shape[1]
            core = torch.cat([core, mean * fresh.view(len(fresh), *shape[1:])], dim=1 + mode)
            if mode in self._orders:
                core = self._packed_in(core, mode)
        return core
