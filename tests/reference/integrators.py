"""One step of both integrators on the weight formed in full.

The optimisers' rules work entry by entry, so they depend on the bases. What a step fixes of them:
a basis that is not cut keeps its columns; new columns stand behind the old ones and are the left
singular vectors of the new part; what is cut gets singular vectors, too. Both stand in descending
order of the values. Signs of columns do not matter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reference.algebra import (
    fold,
    kronecker,
    multi_product,
    positive_qr,
    tangent_projection,
    tucker_to_dense,
    unfold,
)
from reference.rules import FIRST, SECOND, Rule
from reference.truncation import truncate

CORE = "core"
Blocks = dict[str | int, Tensor]
"""Coordinates of a tangent vector: X_C under ``CORE``, X_i under every mode i that moves."""


class State(NamedTuple):
    """Moments at rest, at a weight of the manifold.

    Attributes:
        count: Steps so far.
        first: First moments as tensors of the size of the weight, by torch's names.
        second: Second moments in coordinates, by torch's names.
        basis_count: Steps of the bases so far; None for as many.
        basis_core: Core of the last step of the bases, to whose rows the second moments of the
            bases belong; None for the core of today.
    """

    count: int
    first: dict[str, Tensor]
    second: dict[str, Blocks]
    basis_count: int | None = None
    basis_core: Tensor | None = None


class Lifted(NamedTuple):
    """A weight and its moments in augmented bases, where `bug` steps on the core.

    Attributes:
        weight: W, in full.
        bases: B_i = [U_i | V_i].
        count: Steps so far.
        first: First moments in full, within the span of the bases.
        second: Second moments of the augmented core.
    """

    weight: Tensor
    bases: list[Tensor]
    count: int
    first: dict[str, Tensor]
    second: dict[str, Tensor]


Step = tuple[Tensor, list[Tensor], State]
"""New core, new bases, new moments."""


# --- coordinates --------------------------------------------------------------------------------


def moving_modes(factors: Sequence[Tensor], modes: Sequence[int] | None = None) -> list[int]:
    """Factorised modes whose basis is not full: r_i < n_i."""
    modes = range(len(factors)) if modes is None else modes
    return [i for i in modes if factors[i].shape[1] < factors[i].shape[0]]


def row_basis(core: Tensor, mode: int) -> Tensor:
    """Q_i of Mat_i(C)^T = Q_i S_i^T."""
    return positive_qr(unfold(core, mode).T)[0]


def kronecker_except(matrices: Sequence[Tensor], mode: int) -> Tensor:
    """The Kronecker product of all matrices but the one of ``mode``, in ascending order."""
    return kronecker([m for j, m in enumerate(matrices) if j != mode])


def without_basis(u: Tensor, vectors: Tensor) -> Tensor:
    """(I - U U^T) X."""
    return vectors - u @ (u.T @ vectors)


def basis_direction(core: Tensor, factors: Sequence[Tensor], tangent: Tensor, mode: int) -> Tensor:
    """D_i = (I - U_i U_i^T) Mat_i(X) (kron_{j != i} U_j) Q_i, with Mat_i(C)^T = Q_i S_i^T."""
    others = kronecker_except(factors, mode)
    return without_basis(factors[mode], unfold(tangent, mode) @ others @ row_basis(core, mode))


def coordinates(
    core: Tensor, factors: Sequence[Tensor], tangent: Tensor, modes: Sequence[int] | None = None
) -> Blocks:
    """X_C = X x_j U_j^T and the parts X_i = D_i of the moving modes.

    Of an X that is not tangent they are the coordinates of its projection.
    """
    blocks: Blocks = {CORE: multi_product(tangent, [u.T for u in factors])}
    for mode in moving_modes(factors, modes):
        blocks[mode] = basis_direction(core, factors, tangent, mode)
    return blocks


def tangent_tensor(
    core: Tensor, factors: Sequence[Tensor], blocks: Mapping[str | int, Tensor]
) -> Tensor:
    """X_C x_j U_j + sum_i Ten_i(X_i Q_i^T) x_{j != i} U_j."""
    result = tucker_to_dense(blocks[CORE], factors)
    for mode, part in blocks.items():
        if mode != CORE:
            matrix = part @ row_basis(core, mode).T @ kronecker_except(factors, mode).T
            result = result + fold(matrix, mode, result.shape)
    return result


# --- the step of a rule in the tangent space ----------------------------------------------------


def advance(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient: Tensor,
    state: State | None,
    rule: Rule,
    modes: Sequence[int] | None = None,
) -> tuple[Tensor, State]:
    """Direction X at W, in full, and the moments after the step, from P(gradient).

    The rule is applied to the core and to every part on its own; parts do not decay. What it
    makes of a part need not be orthogonal to U_i, so it is projected again.
    """
    state = state or State(0, {}, {})
    count = state.count + 1
    basis_count = None if state.basis_count is None else state.basis_count + 1
    gradients = coordinates(core, factors, gradient, modes)
    first = {name: coordinates(core, factors, m, modes) for name, m in state.first.items()}
    old = first | state.second
    direction: Blocks = {}
    new: dict[str, Blocks] = {}
    for block, g in gradients.items():
        weight = core if block == CORE else None
        moments = {name: blocks[block] for name, blocks in old.items()}
        number = count if block == CORE or basis_count is None else basis_count
        direction[block], moments = rule.advance(g, weight, moments, number)
        if block != CORE:
            direction[block] = without_basis(factors[block], direction[block])
        for name, moment in moments.items():
            new.setdefault(name, {})[block] = moment
    state = State(
        count,
        {name: tangent_tensor(core, factors, new[name]) for name in FIRST if name in new},
        {name: new[name] for name in SECOND if name in new},
        basis_count,
    )
    return tangent_tensor(core, factors, direction), state


# --- second moments in other coordinates --------------------------------------------------------


def mixing_weights(matrix: Tensor) -> Tensor:
    """A(R) = R o R + (1 - rowsum(R o R)) 1^T / r for an R of shape r' x r; rows sum to 1.

    A coordinate in the new basis is a combination of old ones, and its square that of their
    squares, cross terms left out. What the old basis does not explain gets the mean.
    """
    squares = matrix * matrix
    missing = 1 - squares.sum(dim=1, keepdim=True)
    return squares + missing.clamp(min=0) / matrix.shape[1]


def transport_second(
    second: Blocks,
    old: tuple[Tensor, Sequence[Tensor]],
    new: tuple[Tensor, Sequence[Tensor]],
    modes: Sequence[int] | None = None,
) -> Blocks:
    """Second moments from W_0, U, Q to W_1, U', Q'.

    With R_j = U'_j^T U_j and T_i = Q'_i^T (kron_{j != i} R_j) Q_i:
    v_C' = v_C x_j A(R_j) and v_i' = v_i A(T_i)^T. A mode that did not move before has the mean of
    v_C' in all of v_i'.
    """
    (core, factors), (new_core, new_factors) = old, new
    overlaps = [v.T @ u for u, v in zip(factors, new_factors, strict=True)]
    moved: Blocks = {CORE: multi_product(second[CORE], [mixing_weights(r) for r in overlaps])}
    for mode in moving_modes(new_factors, modes):
        if mode in second:
            rows = row_basis(new_core, mode).T @ kronecker_except(overlaps, mode)
            rows = rows @ row_basis(core, mode)
            moved[mode] = second[mode] @ mixing_weights(rows).T
        else:
            moved[mode] = torch.full_like(new_factors[mode], float(moved[CORE].mean()))
    return moved


def lift_second(core_part: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """v_C x_i [I; 1 1^T / r_i]: columns that are new in a mode get its mean."""
    extensions = []
    for rank, basis in zip(core_part.shape, bases, strict=True):
        old = torch.eye(rank, dtype=core_part.dtype)
        new = torch.ones(basis.shape[1] - rank, rank, dtype=core_part.dtype) / rank
        extensions.append(torch.cat([old, new]))
    return multi_product(core_part, extensions)


def retract_second(
    augmented: Tensor,
    bases: Sequence[Tensor],
    rotations: Sequence[Tensor],
    new_core: Tensor,
    modes: Sequence[int] | None = None,
) -> Blocks:
    """Second moments of an augmented core at the truncated weight C' x_i (B_i P_i).

    v_C' = v x_i A(P_i^T), v_i' = A(B_i) Mat_i(v x_{j != i} A(P_j^T)) A(Q'_i^T)^T.
    """
    cuts = [mixing_weights(p.T) for p in rotations]
    factors = [b @ p for b, p in zip(bases, rotations, strict=True)]
    moved: Blocks = {CORE: multi_product(augmented, cuts)}
    for mode in moving_modes(factors, modes):
        others = unfold(augmented, mode) @ kronecker_except(cuts, mode).T
        rows = mixing_weights(row_basis(new_core, mode).T)
        moved[mode] = mixing_weights(bases[mode]) @ others @ rows.T
    return moved


# --- the integrators ----------------------------------------------------------------------------


def parallel_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient: Tensor,
    state: State | None = None,
    *,
    rule: Rule,
    lr: float,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Step:
    """W_1 = R(W_0 - lr X), X the direction of the rule at P(grad).

    R truncates to ``tau`` or ``ranks``; without either it projects onto the bases of the basis
    step, at the ranks there are.
    """
    if state is not None and state.basis_core is not None:
        then, now = (state.basis_core, factors), (core, factors)
        second = {n: transport_second(of, then, now, modes) for n, of in state.second.items()}
        state = state._replace(second=second, basis_core=None)
    direction, state = advance(core, factors, gradient, state, rule, modes)
    moved = tucker_to_dense(core, factors) - lr * direction
    if tau is None and ranks is None:
        bases = list(factors)
        for mode in moving_modes(factors, modes):
            bases[mode] = _stepped_basis(core, factors, moved, mode)
        new = multi_product(moved, [u.T for u in bases]), bases
    else:
        bases = _augmented_bases(core, factors, direction, modes)
        new = _truncate_in(bases, moved, tau, ranks, modes)[:2]
    second = {
        name: transport_second(blocks, (core, factors), new, modes)
        for name, blocks in state.second.items()
    }
    first = {name: tangent_projection(*new, moment) for name, moment in state.first.items()}
    return *new, State(state.count, first, second, state.basis_count)


def core_alone_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient: Tensor,
    state: State,
    *,
    rule: Rule,
    lr: float,
) -> Step:
    """C_1 = C_0 - lr X_C in bases that stay, with the moments of the bases as they are."""
    inward = [u.T for u in factors]
    first = {name: multi_product(moment, inward) for name, moment in state.first.items()}
    second = {name: blocks[CORE] for name, blocks in state.second.items()}
    direction, moments = rule.advance(
        multi_product(gradient, inward), core, first | second, state.count + 1
    )
    return (
        core - lr * direction,
        list(factors),
        State(
            state.count + 1,
            {
                name: moment + tucker_to_dense(moments[name] - first[name], factors)
                for name, moment in state.first.items()
            },
            {name: blocks | {CORE: moments[name]} for name, blocks in state.second.items()},
            state.count if state.basis_count is None else state.basis_count,
            core if state.basis_core is None else state.basis_core,
        ),
    )


def bug_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient_at: Callable[[Tensor], Tensor],
    state: State | None = None,
    *,
    rule: Rule,
    lr: float,
    core_steps: int = 1,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Step:
    """Augment the bases by the direction of the rule, take its steps inside them, truncate."""
    weight = tucker_to_dense(core, factors)
    lifted = bug_basis_step(core, factors, gradient_at(weight), state, rule=rule, modes=modes)
    for _ in range(core_steps):
        lifted = bug_core_step(lifted, gradient_at(lifted.weight), rule=rule, lr=lr)
    return bug_retraction(lifted, tau=tau, ranks=ranks, modes=modes)


def bug_basis_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient: Tensor,
    state: State | None = None,
    *,
    rule: Rule,
    modes: Sequence[int] | None = None,
) -> Lifted:
    """Bases [U_i | V_i] and the moments from before this gradient; the weight stays."""
    direction, _ = advance(core, factors, gradient, state, rule, modes)
    bases = _augmented_bases(core, factors, direction, modes)
    projectors = [u @ u.T for u in bases]
    state = state or State(0, {}, {})
    return Lifted(
        tucker_to_dense(core, factors),
        bases,
        state.count,
        {name: multi_product(moment, projectors) for name, moment in state.first.items()},
        {name: lift_second(blocks[CORE], bases) for name, blocks in state.second.items()},
    )


def bug_core_step(lifted: Lifted, gradient: Tensor, *, rule: Rule, lr: float) -> Lifted:
    """One step of the rule on the core in fixed bases."""
    inward = [u.T for u in lifted.bases]
    core = multi_product(lifted.weight, inward)
    moments = {name: multi_product(moment, inward) for name, moment in lifted.first.items()}
    direction, moments = rule.advance(
        multi_product(gradient, inward), core, moments | lifted.second, lifted.count + 1
    )
    return Lifted(
        tucker_to_dense(core - lr * direction, lifted.bases),
        lifted.bases,
        lifted.count + 1,
        {name: tucker_to_dense(moments[name], lifted.bases) for name in FIRST if name in moments},
        {name: moments[name] for name in SECOND if name in moments},
    )


def bug_retraction(
    lifted: Lifted,
    *,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Step:
    """Truncate, and move the moments to the tangent space there."""
    core, factors, rotations = _truncate_in(lifted.bases, lifted.weight, tau, ranks, modes)
    first = {name: tangent_projection(core, factors, m) for name, m in lifted.first.items()}
    second = {
        name: retract_second(moment, lifted.bases, rotations, core, modes)
        for name, moment in lifted.second.items()
    }
    return core, factors, State(lifted.count, first, second)


def augmented_basis(u: Tensor, direction: Tensor) -> Tensor:
    """An orthonormal basis [U | V] of the range of [U | D].

    V holds the left singular vectors of (I - U U^T) D, largest first, without those whose singular
    values are rounding, below 1e-10 of the largest.
    """
    left, values, _ = torch.linalg.svd(without_basis(u, direction), full_matrices=False)
    count = min(u.shape[0] - u.shape[1], int((values > 1e-10 * values[:1]).sum()))
    return torch.cat([u, left[:, :count]], dim=1)


def _augmented_bases(
    core: Tensor, factors: Sequence[Tensor], direction: Tensor, modes: Sequence[int] | None
) -> list[Tensor]:
    bases = list(factors)
    for mode in moving_modes(factors, modes):
        part = basis_direction(core, factors, direction, mode)
        bases[mode] = augmented_basis(factors[mode], part)
    return bases


def _stepped_basis(core: Tensor, factors: Sequence[Tensor], moved: Tensor, mode: int) -> Tensor:
    """orth K_i(1) with K_i(1) = Mat_i(W_0 - lr X) (kron_{j != i} U_j) Q_i."""
    others = kronecker_except(factors, mode)
    return positive_qr(unfold(moved, mode) @ others @ row_basis(core, mode))[0]


def _truncate_in(
    bases: list[Tensor],
    weight: Tensor,
    tau: float | None,
    ranks: Sequence[int] | None,
    modes: Sequence[int] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Truncated core, new bases B_i P_i, and the P_i."""
    core, rotations = truncate(multi_product(weight, [u.T for u in bases]), tau, ranks, modes)
    return core, [u @ p for u, p in zip(bases, rotations, strict=True)], rotations
