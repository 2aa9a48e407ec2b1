"""The steps of `bug` as pure functions on stacks: bases, lift, core, truncation.

Nothing is checked, and nothing is read on the host. One layer is a stack of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdlrt.linalg import (
    Layout,
    TangentSpace,
    TangentVector,
    Truncation,
    cleared,
    multi_mode_product,
    pad_core,
    stochastic,
    unfold,
)
from tdlrt.optim.rules import Rule
from tdlrt.optim.steps.points import Factors, Iterate, Lifted
from tdlrt.optim.steps.shared import NewBases, direction_of, truncated

__all__ = ["basis_step", "core_step", "retract_lifted"]


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
    direction, _ = direction_of(iterate, gradient, rule)
    new = NewBases(space, direction)
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
    advanced = {
        name: cleared(moment, lifted.ranks) if name in rule.second_moments else moment
        for name, (moment,) in moments.items()
    }
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
    space, projections = truncated(lifted.factors, truncation, layout)
    moments: dict[str, TangentVector] = {}
    for name, moment in lifted.moments.items():
        if name in rule.first_moments:
            moments[name] = space.project(moment, lifted.factors, projections)
        else:
            moments[name] = _lowered_squares(moment, lifted.factors, projections, before, space)
    return Iterate(space, moments, lifted.steps)


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
