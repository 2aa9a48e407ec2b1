"""The steps of `parallel` as pure functions on stacks.

A step ends in a retraction, the truncation of a core in augmented bases or a projection onto bases
of the same rank. The state of the optimiser moves along: first moments by orthogonal projection
onto the new tangent space, second moments coordinate by coordinate (`tdlrt.linalg.Transport`).
Nothing is checked, and nothing is read on the host. One layer is a stack of one.
"""

from __future__ import annotations

import torch

from tdlrt.linalg import (
    Layout,
    TangentSpace,
    TangentVector,
    Transport,
    Truncation,
    orthonormalize,
    pad_core,
)
from tdlrt.optim.rules import Rule
from tdlrt.optim.steps.points import Augmented, Iterate
from tdlrt.optim.steps.shared import NewBases, direction_of, moved_state, truncated

__all__ = ["augmented_step", "fixed_rank_step", "retract"]


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
    direction, moments = direction_of(iterate, gradient, rule)
    new = NewBases(space, direction)
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
    space, _ = truncated(augmented.factors, truncation, layout)
    transport = Transport(origin.space, space.factors, layout)
    return Iterate(space, moved_state(rule, origin.moments, transport, space), origin.steps)


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
    direction, moments = direction_of(iterate, gradient, rule)
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
    state = moved_state(rule, moments, transport, target, known=(direction, cut))
    return Iterate(target, state, iterate.steps + 1)
