"""One step of both integrators on the weight formed in full."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reference.algebra import (
    kronecker,
    multi_product,
    tangent_projection,
    tucker_to_dense,
    unfold,
)
from reference.truncation import truncate

Step = tuple[Tensor, list[Tensor], Tensor]
"""New core, new bases, new momentum (dense)."""


def basis_direction(core: Tensor, factors: Sequence[Tensor], tangent: Tensor, mode: int) -> Tensor:
    """D_i = (I - U_i U_i^T) Mat_i(X) (kron_{j != i} U_j) Q_i, with Mat_i(C)^T = Q_i S_i^T."""
    u = factors[mode]
    others = kronecker([v for j, v in enumerate(factors) if j != mode])
    rows = torch.linalg.qr(unfold(core, mode).T)[0]
    return unfold(tangent, mode) @ others @ rows - u @ (u.T @ unfold(tangent, mode) @ others @ rows)


def augmented_basis(u: Tensor, direction: Tensor) -> Tensor:
    """An orthonormal basis with min(2r, n) columns whose span contains [U | D].

    Where [U | D] has a lower rank the last columns are arbitrary.
    """
    return torch.linalg.qr(torch.cat([u, direction], dim=1))[0]


def parallel_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient: Tensor,
    momentum: Tensor | None = None,
    *,
    lr: float,
    mu: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Step:
    """W_1 = R(W_0 - lr M) with M = mu M_old + (1 - dampening) (P(grad) + weight_decay W_0).

    The first step, without an old momentum, has no dampening. R truncates to ``tau`` or ``ranks``;
    without either it projects onto the bases of the basis step, at the ranks there are.
    """
    weight = tucker_to_dense(core, factors)
    direction = tangent_projection(core, factors, gradient) + weight_decay * weight
    if momentum is not None:
        direction = mu * momentum + (1 - dampening) * direction
    moved = weight - lr * direction
    if tau is None and ranks is None:
        bases = [_stepped_basis(core, factors, moved, i) for i in range(weight.ndim)]
        core = multi_product(moved, [u.T for u in bases])
        return core, bases, tangent_projection(core, bases, direction)
    bases = _augmented_bases(core, factors, direction)
    return _truncate_in(bases, moved, direction, tau, ranks, modes)


def bug_step(
    core: Tensor,
    factors: Sequence[Tensor],
    gradient_at: Callable[[Tensor], Tensor],
    momentum: Tensor | None = None,
    *,
    lr: float,
    mu: float = 0.0,
    weight_decay: float = 0.0,
    core_steps: int = 1,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Step:
    """Augment the bases by the tangent direction, take SGD steps inside them, truncate."""
    weight = tucker_to_dense(core, factors)
    direction = tangent_projection(core, factors, gradient_at(weight))
    if momentum is not None:
        direction = mu * momentum + direction
    bases = _augmented_bases(core, factors, direction)
    projectors = [u @ u.T for u in bases]

    if momentum is not None:
        momentum = multi_product(momentum, projectors)
    for _ in range(core_steps):
        gradient = multi_product(gradient_at(weight) + weight_decay * weight, projectors)
        momentum = gradient if momentum is None else mu * momentum + gradient
        weight = weight - lr * momentum
    return _truncate_in(bases, weight, momentum, tau, ranks, modes)


def _stepped_basis(core: Tensor, factors: Sequence[Tensor], moved: Tensor, mode: int) -> Tensor:
    """orth K_i(1) with K_i(1) = Mat_i(W_0 - lr M) (kron_{j != i} U_j) Q_i."""
    others = kronecker([v for j, v in enumerate(factors) if j != mode])
    rows = torch.linalg.qr(unfold(core, mode).T)[0]
    return torch.linalg.qr(unfold(moved, mode) @ others @ rows)[0]


def _augmented_bases(core: Tensor, factors: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    return [
        augmented_basis(u, basis_direction(core, factors, direction, i))
        for i, u in enumerate(factors)
    ]


def _truncate_in(
    bases: list[Tensor],
    weight: Tensor,
    momentum: Tensor,
    tau: float | None,
    ranks: Sequence[int] | None,
    modes: Sequence[int] | None,
) -> Step:
    small, rotations = truncate(multi_product(weight, [u.T for u in bases]), tau, ranks, modes)
    factors = [u @ rotation for u, rotation in zip(bases, rotations, strict=True)]
    return small, factors, tangent_projection(small, factors, momentum)
