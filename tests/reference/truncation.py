"""Truncation of a tensor to low multilinear rank, by SVDs of the unfoldings."""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.algebra import mode_product, unfold

if TYPE_CHECKING:
    from tdlrt.linalg import Cutoff


def truncate(
    tensor: Tensor,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Sequentially truncated HOSVD: core and one orthonormal basis per mode.

    Either ``tau``, with ||T - result|| <= tau ||T||, or ``ranks``. Modes outside ``modes`` and
    modes that lose nothing keep the identity as their basis. A mode larger than the product of
    the others gets the left singular vectors of its unfolding, which lose nothing.
    """
    modes = range(tensor.ndim) if modes is None else modes
    factors = [torch.eye(n, dtype=tensor.dtype) for n in tensor.shape]
    core = tensor
    if tensor.ndim == 2 and len(modes) == 2:
        left, values, right = torch.linalg.svd(tensor, full_matrices=False)
        rank = _matrix_rank(values, tau, ranks)
        if rank < len(values):
            return values[:rank].diag(), [left[:, :rank], right[:rank].T]
    else:
        share = float(tensor.square().sum()) / len(modes)
        for mode in modes:
            left, values, _ = torch.linalg.svd(unfold(core, mode))
            rank = smallest_rank(values, tau, share) if ranks is None else ranks[mode]
            if rank < core.shape[mode] and tau != 0:
                core, factors[mode] = mode_product(core, left[:, :rank].T, mode), left[:, :rank]

    for mode in modes:
        if core.shape[mode] > core.numel() // core.shape[mode]:
            left = torch.linalg.svd(unfold(core, mode), full_matrices=False)[0]
            core, factors[mode] = mode_product(core, left.T, mode), factors[mode] @ left
    return core, factors


def smallest_rank(values: Tensor, tau: float, share: float) -> int:
    """The smallest rank, at least 1, whose tail of squared values is at most tau^2 share."""
    if tau == 0:
        return len(values)
    tails = [math.fsum(values[rank:].square().tolist()) for rank in range(1, len(values) + 1)]
    return 1 + next(i for i, tail in enumerate(tails) if tail <= tau**2 * share)


def kept_rank(
    squares: Tensor,
    mode: int,
    cutoff: "Cutoff",
    order: int,
    modes: Collection[int],
    squared_norm: float | None = None,
) -> int:
    """The rank that a cut-off keeps of a mode with these squared singular values, largest first.

    ``modes`` are all that are truncated; a matrix loses its two together, so one has the whole
    budget. ``squared_norm``, that of the core before any of them was, is their sum by default.
    """
    if squared_norm is None:
        squared_norm = math.fsum(squares.double().tolist())
    shares = 1 if order == 2 else len(modes)
    rank = len(squares)
    if squared_norm > 0:
        rank = smallest_rank(squares.double().sqrt(), cutoff.tau, squared_norm / shares)
    rank += math.ceil(cutoff.spare * rank)
    rank = max(rank, cutoff.min_rank)
    rank = math.ceil(rank / cutoff.multiple_of) * cutoff.multiple_of
    return min(rank, len(squares), cutoff.limits[mode])


def _matrix_rank(values: Tensor, tau: float | None, ranks: Sequence[int] | None) -> int:
    share = float(values.square().sum())
    return smallest_rank(values, tau, share) if ranks is None else min(ranks)
