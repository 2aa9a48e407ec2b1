"""Truncation of Tucker cores: sequentially truncated HOSVD by Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg.algebra import mode_product, rank_is_excessive, unfold

__all__ = [
    "Cutoff",
    "Truncation",
    "kept_ranks",
    "possible_ranks",
    "relative_spectrum",
    "squared_singular_values",
    "truncate",
    "truncate_stack",
]


class Cutoff(NamedTuple):
    """Which ranks a core keeps, as plain numbers, so that many cores can be cut at once.

    Attributes:
        limits: Largest rank of each mode.
        tau: Relative tolerance. The squared budget tau^2 ||C||^2 is shared equally by the modes
            that are truncated; a matrix has one truncation, which gets all of it. If tau is 0,
            nothing is discarded.
        min_rank: Smallest rank of a mode.
        multiple_of: Ranks are rounded up to a multiple of this.
        spare: Spare directions, kept beyond the tolerance: a share of the rank, rounded up.
    """

    limits: tuple[int, ...]
    tau: float = 0.0
    min_rank: int = 1
    multiple_of: int = 1
    spare: float = 0.0


class Truncation(NamedTuple):
    """Truncated cores C ~ C' x_1 P_1 ... x_d P_d, in stacks of the same shape as before.

    Attributes:
        core: C', with zeros beyond its ranks.
        projections: P_i, of shape B x r_i x r_i with zero columns beyond the ranks; None for a mode
            that was not truncated.
        ranks: The kept ranks, B x d in int64.
    """

    core: Tensor
    projections: tuple[Tensor | None, ...]
    ranks: Tensor


def kept_ranks(
    spectrum: Tensor,
    available: Tensor,
    budget: Tensor,
    limit: Tensor,
    *,
    min_rank: Tensor | None = None,
    multiple_of: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """Ranks of one mode that a cutoff keeps, for each member.

    This is the smallest rank r >= 1 with sum_{k > r} sigma_k^2 <= budget, plus the spare
    directions, rounded up to a multiple, within the bounds. A core of zeros keeps its rank.

    Args:
        spectrum: sigma_k^2 / ||C||^2, of shape B x r, largest first, followed by zeros.
        available: Ranks before the cut, B int64 numbers, as are the following bounds.
        budget: Squared relative budgets of the mode; a negative budget keeps everything.
        limit: Largest ranks to keep.
        min_rank: Smallest ranks to keep; 1 by default.
        multiple_of: Ranks are multiples of this, unless they are at a bound; 1 by default.
        spare: Spare directions, as a share of the rank; none by default.

    Returns:
        The ranks, B int64 numbers.
    """
    tails = spectrum.flip(-1).cumsum(-1)
    rank = (tails > budget[:, None]).sum(dim=-1).clamp(min=1)
    rank = torch.where(spectrum[:, 0] > 0, rank, available)
    if spare is not None:
        rank = rank + (spare * rank.double()).ceil().long()
    if min_rank is not None:
        rank = rank.maximum(min_rank)
    if multiple_of is not None:
        rank = (rank + multiple_of - 1) // multiple_of * multiple_of
    return rank.minimum(limit).minimum(available)


def possible_ranks(ranks: Sequence[int], modes: Collection[int] | None = None) -> tuple[int, ...]:
    """Ranks lowered to r_i <= prod_{j != i} r_j in the given modes, which discards nothing.

    At most one rank can be larger than the product of the others.

    >>> possible_ranks((9, 2, 3))
    (6, 2, 3)
    """
    found = list(ranks)
    for mode in range(len(found)) if modes is None else modes:
        if rank_is_excessive(found, mode):
            found[mode] = math.prod(found) // found[mode]
    return tuple(found)


def truncate_stack(
    core: Tensor, available: Tensor, cutoffs: Sequence[Cutoff], modes: Collection[int]
) -> Truncation:
    """Sequentially truncated HOSVD of a stack of cores.

    Mode after mode, P_i holds the leading left singular vectors of Mat_i(C), computed from the
    float64 Gram matrix, and C becomes C x_i P_i^T. The squared error is the sum of the discarded
    squared singular values. If a member loses nothing in a mode, it keeps its basis, P_i = I. A
    matrix (d = 2) has one rank, and the result is its truncated SVD.

    Ranks are counted on the device, and nothing is read on the host. The resulting ranks may be
    larger than the product of the others, see `possible_ranks`.

    Args:
        core: C, of shape B x r_1 x ... x r_d, with zeros beyond the ranks.
        available: The ranks, B x d in int64.
        cutoffs: What to keep, one per member.
        modes: The modes to truncate.

    Returns:
        The truncated cores.

    Source: Vannieuwenhoven, Vandebril, Meerbergen, SIAM J. Sci. Comput. 34 (2012), algorithm 2.
    """
    order, wanted = core.ndim - 1, sorted(modes)
    matrix = order == 2 and len(wanted) == 2
    bounds = _Bounds(cutoffs, 1 if matrix else max(1, len(wanted)), core.device)
    projections: list[Tensor | None] = [None] * order
    ranks, limits = list(available.unbind(dim=1)), list(bounds.limits.unbind(dim=1))
    if matrix:  # both modes get the smaller limit
        limits = [torch.minimum(torch.minimum(*limits), torch.minimum(*ranks))] * 2
    budget, scale = bounds.budget, _scale(core)
    for mode in wanted:
        gram = _scaled_gram(core, mode, scale)
        places = torch.arange(core.shape[1 + mode], device=core.device)
        # Eigenvalues of padding become negative, so that they come after true zeros.
        gram.diagonal(dim1=1, dim2=2).sub_((places >= ranks[mode][:, None]) * 2.0)
        values, vectors = torch.linalg.eigh(gram)
        spectrum = values.flip(1).clamp(min=0)
        kept = kept_ranks(spectrum, ranks[mode], budget, limits[mode], **bounds.others)
        if matrix:
            limits[1], budget = kept, torch.full_like(budget, -1.0)
        cut = (kept < ranks[mode])[:, None, None]
        identity = torch.eye(len(places), dtype=core.dtype, device=core.device)
        projection = torch.where(cut, vectors.flip(2).to(core), identity)
        projection = projection * (places < kept[:, None])[:, None, :]
        core = mode_product(core, projection.mT, mode)
        projections[mode], ranks[mode] = projection, kept
    return Truncation(core, tuple(projections), torch.stack(ranks, dim=1))


class _Bounds:
    """The numbers of many cutoffs as tensors, sent to the device in one transfer."""

    def __init__(self, cutoffs: Sequence[Cutoff], shares: int, device: torch.device) -> None:
        rows = [
            [
                c.tau**2 / shares if c.tau > 0 else -1.0,
                c.spare,
                c.min_rank,
                c.multiple_of,
                *c.limits,
            ]
            for c in cutoffs
        ]
        table = torch.tensor(rows, dtype=torch.float64).to(device)
        whole = table[:, 2:].long()
        self.budget, self.limits = table[:, 0], whole[:, 2:]
        self.others: dict[str, Tensor] = {}
        if any(cutoff.spare for cutoff in cutoffs):
            self.others["spare"] = table[:, 1]
        if any(cutoff.min_rank > 1 for cutoff in cutoffs):
            self.others["min_rank"] = whole[:, 0]
        if any(cutoff.multiple_of > 1 for cutoff in cutoffs):
            self.others["multiple_of"] = whole[:, 1]


def relative_spectrum(core: Tensor, mode: int) -> Tensor:
    """Squared singular values of Mat_i(C) over ||C||^2, largest first, without waiting.

    Args:
        core: C, of shape B x r_1 x ... x r_d, with zeros beyond the ranks.
        mode: i.

    Returns:
        A matrix of shape B x r_i, in float64; zeros for a core that is zero or not finite.
    """
    values: Tensor = torch.linalg.eigvalsh(_scaled_gram(core, mode, _scale(core)))
    return values.flip(1).clamp(min=0)


def _scale(core: Tensor) -> Tensor:
    """1 / ||C|| in float64, B x 1 x 1; 0 for a core that is zero or not finite."""
    norm = torch.linalg.vector_norm(core.flatten(1), dim=1, dtype=torch.float64)[:, None, None]
    return torch.where((norm > 0) & (norm < math.inf), 1 / norm, 0.0)


def _scaled_gram(core: Tensor, mode: int, scale: Tensor) -> Tensor:
    """Mat_i(C) Mat_i(C)^T of the scaled cores in float64; zeros if the scale is zero."""
    rows = torch.where(scale > 0, unfold(core, mode, 1).double() * scale, 0.0)
    return rows @ rows.mT


def squared_singular_values(core: Tensor, mode: int) -> Tensor:
    """Squared singular values of Mat_i(C) in float64, largest first.

    Args:
        core: C, of shape r_1 x ... x r_d.
        mode: i.

    Returns:
        A vector of r_i numbers.
    """
    norm: Tensor = torch.linalg.vector_norm(core, dtype=torch.float64)
    return norm.square() * relative_spectrum(core[None], mode)[0]


def truncate(
    core: Tensor, cutoff: Cutoff, modes: Collection[int] | None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Sequentially truncated HOSVD of one core, see `truncate_stack`, without padding.

    Afterwards r_i <= prod_{j != i} r_j in every mode; enforcing this discards nothing.

    Args:
        core: C, of shape r_1 x ... x r_d.
        cutoff: What to keep.
        modes: The modes to truncate; all by default.

    Returns:
        C', and one P_i per mode (r_i x r'_i, orthonormal columns), or None for an unchanged mode.
    """
    wanted = tuple(range(core.ndim)) if modes is None else tuple(sorted(modes))
    available = tuple(core.shape)
    decided = wanted
    if core.ndim == 2 and len(wanted) == 2:  # the longer mode has no larger rank than the other
        decided = (int(core.shape[1] < core.shape[0]),)
        cutoff = cutoff._replace(limits=(min(cutoff.limits),) * 2)
    ranks = torch.tensor([available], device=core.device)
    result = truncate_stack(core[None], ranks, [cutoff], decided)
    kept = result.ranks[0].tolist()
    core = result.core[0][tuple(slice(0, rank) for rank in kept)]
    projections = [
        None if projection is None or rank == size else projection[0, :, :rank]
        for projection, rank, size in zip(result.projections, kept, available, strict=True)
    ]
    return _cut_dependent_rows(core.contiguous(), projections, wanted)


def _cut_dependent_rows(
    core: Tensor, projections: list[Tensor | None], modes: Collection[int]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Lower every r_i to prod_{j != i} r_j: more rows of Mat_i(C) cannot be independent."""
    changed = True
    while changed:
        changed = False
        for mode in modes:
            if rank_is_excessive(core.shape, mode):
                basis = torch.linalg.qr(unfold(core, mode))[0]
                before = projections[mode]
                projections[mode] = basis if before is None else before @ basis
                core = mode_product(core, basis.mT, mode)
                changed = True
    return core, tuple(projections)
