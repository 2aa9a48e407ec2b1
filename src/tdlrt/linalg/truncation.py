"""Truncation of a Tucker core: sequentially truncated HOSVD by Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

import torch
from torch import Tensor

from tdlrt.linalg.algebra import mode_product, rank_is_excessive, unfold

__all__ = ["RankRule", "smallest_rank", "squared_singular_values", "truncate"]

RankRule: TypeAlias = Callable[[int, Tensor], int]
"""Says how many singular values of a mode to keep: (mode, squared singular values) -> rank.

The squared singular values come in float64 on the CPU, largest first. A rule may be asked again
about the same mode, with more exact values.
"""

# Squared singular values from a float32 Gram matrix are off by at most about 2 eps ||C||^2, sums
# of them too; they serve where what a rank turns on is larger than that by a factor of 32.
_RESOLUTION = 64 * torch.finfo(torch.float32).eps


def smallest_rank(squared_singular_values: Tensor, squared_budget: float) -> int:
    """Smallest rank r >= 1 whose tail fits a budget, sum_{k > r} sigma_k^2 <= budget.

    Args:
        squared_singular_values: sigma_k^2, largest first.
        squared_budget: The budget, in units of sigma^2; 0 keeps everything.

    Returns:
        The rank.

    >>> import torch
    >>> smallest_rank(torch.tensor([9.0, 4.0, 1.0]), 1.5), smallest_rank(torch.zeros(3), 0.0)
    (2, 3)
    """
    if squared_budget <= 0:
        return len(squared_singular_values)
    tails = squared_singular_values.flip(0).cumsum(0)
    return max(1, int((tails > squared_budget).sum()))


def truncate(
    core: Tensor, rule: RankRule, modes: Collection[int] | None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Sequentially truncated HOSVD of a core, C ~ C' x_1 P_1 ... x_d P_d.

    Mode after mode, P_i holds the leading left singular vectors of Mat_i(C), taken from the Gram
    matrix Mat_i(C) Mat_i(C)^T, and C becomes C x_i P_i^T. The squared error is the sum
    of the discarded squared singular values. Afterwards every mode satisfies
    r_i <= prod_{j != i} r_j; enforcing this discards nothing. A matrix (d = 2) has one rank, the
    smaller of what the rule says for its modes, and the result is its truncated SVD.

    A float32 core has its Gram matrix in float32 where the values from the last kept one on,
    sum_{k >= r} sigma_k^2, exceed 64 eps ||C||^2. They are exact to about 2 eps ||C||^2, which
    moves a tolerance tau, whose budget lies below that sum, by less than 2 %. Elsewhere, as for tau
    below sqrt(64 d eps), 0.6 % for a convolution, or near singular cores, it is in float64.

    Args:
        core: C, of shape r_1 x ... x r_d.
        rule: How many singular values to keep in a mode.
        modes: The modes to truncate; all by default.

    Returns:
        C', and one P_i per mode (r_i x r'_i, orthonormal columns) or None where nothing changed.

    Source: Vannieuwenhoven, Vandebril, Meerbergen, SIAM J. Sci. Comput. 34 (2012), algorithm 2.
    """
    wanted = range(core.ndim) if modes is None else sorted(modes)
    projections: list[Tensor | None] = [None] * core.ndim
    matrix = core.ndim == 2 and len(wanted) == 2
    for mode in [int(core.shape[1] < core.shape[0])] if matrix else wanted:
        projection = _leading_vectors(core, mode, rule, wanted if matrix else [mode])
        if projection.shape[1] < core.shape[mode]:
            projections[mode] = projection
            core = mode_product(core, projection.mT, mode)
    return _cut_dependent_rows(core, projections, wanted)


def squared_singular_values(core: Tensor, mode: int) -> Tensor:
    """Squared singular values of Mat_i(C) in float64, largest first.

    Args:
        core: C, of shape r_1 x ... x r_d.
        mode: i.

    Returns:
        A vector of r_i numbers.
    """
    rows = unfold(core, mode).double()
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.mT)
    return values.flip(0).clamp_(min=0)


def _leading_vectors(core: Tensor, mode: int, rule: RankRule, asked: Collection[int]) -> Tensor:
    """Left singular vectors of Mat_i(C) that the rule keeps, smallest of its ranks for `asked`."""
    rows = unfold(core, mode)
    if rows.dtype == torch.float32:
        try:
            values, vectors = _left_singular_vectors(rows)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            pass  # The squares overflow.
        else:
            rank = min(rule(mode, values) for mode in asked)
            if values[rank - 1 :].sum() > _RESOLUTION * values.sum():
                return vectors[:, :rank]
    values, vectors = _left_singular_vectors(rows.double())
    rank = min(rule(mode, values) for mode in asked)
    return vectors[:, :rank].to(core.dtype)


def _left_singular_vectors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, as a rule wants them, and left singular vectors, largest first."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return values.flip(0).clamp_(min=0).double().cpu(), vectors.flip(1)


def _cut_dependent_rows(
    core: Tensor, projections: list[Tensor | None], modes: Collection[int]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Bring every r_i down to prod_{j != i} r_j, exactly: Mat_i(C) has no more independent rows."""
    settled = False
    while not settled:
        settled = True
        for mode in modes:
            if rank_is_excessive(core.shape, mode):
                basis = torch.linalg.qr(unfold(core, mode))[0]
                before = projections[mode]
                projections[mode] = basis if before is None else before @ basis
                core = mode_product(core, basis.mT, mode)
                settled = False
    return core, tuple(projections)
