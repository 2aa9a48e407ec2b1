"""What the steps of both integrators share: augmented bases, truncation, state that moves along."""

from __future__ import annotations

from collections.abc import Mapping

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
    polish_basis,
    stochastic,
)
from tdlrt.optim.rules import Moments, Rule
from tdlrt.optim.steps.points import Factors, Iterate

__all__ = [
    "NewBases",
    "brought_along",
    "core_brought_along",
    "direction_of",
    "moved_state",
    "truncated",
]


def brought_along(
    moments: Moments, source: TangentSpace, target: TangentSpace, rule: type[Rule]
) -> dict[str, TangentVector]:
    """State of a weight that something else than a step with bases has moved.

    Where that was a step on the core alone, the core's part is up to date, since its coordinates
    are entries in the bases U_i; the bases' parts stand in rows Q_i of the core of then, and become
    K._i Q_i^T Q'_i.

    Args:
        moments: The state, with the core's part at the target, where the bases are the same.
        source: The tangent space that the bases' parts belong to.
        target: The tangent space of today, of the same ranks.
        rule: The optimiser.
    """
    transport = Transport(source, target.factors, target.layout)
    return moved_state(rule, moments, transport, target)


def core_brought_along(
    moments: Mapping[str, Tensor],
    source: Factors,
    target: Factors,
    layout: Layout,
    rule: type[Rule],
) -> dict[str, Tensor]:
    """State of the core alone in other bases V_j of the same ranks, with R_j = V_j^T U_j.

    A first moment M becomes M x_j R_j, a second moment v becomes v x_j A(R_j), see `stochastic`.

    Args:
        moments: The state.
        source: U_j.
        target: V_j.
        layout: The true sizes.
        rule: The optimiser.
    """
    turns = [
        None if u is None or v is None else v.mT @ u for u, v in zip(source, target, strict=True)
    ]
    moved = {}
    for name, moment in moments.items():
        shares = [layout.shares(mode, layout, moment.dtype) for mode in range(len(turns))]
        squares = [r if r is None else stochastic(r, s) for r, s in zip(turns, shares, strict=True)]
        moved[name] = multi_mode_product(moment, turns if name in rule.first_moments else squares)
    return moved


def direction_of(
    iterate: Iterate, gradient: TangentVector, rule: Rule
) -> tuple[TangentVector, dict[str, TangentVector]]:
    """Direction D of the step W - lr D that a rule takes, and the state after it."""
    bases = None if iterate.basis_steps is None else iterate.basis_steps + 1
    return rule.direction(gradient, iterate.moments, iterate.space, iterate.steps + 1, bases)


def moved_state(
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


def truncated(
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


class NewBases:
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
