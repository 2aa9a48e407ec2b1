"""Truncation of a weight with a small error in its outputs, for inputs of given covariance."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tdlrt.linalg.algebra import TuckerTensor, mode_product
from tdlrt.linalg.bases import positive_qr
from tdlrt.linalg.truncation import Cutoff, truncate

__all__ = ["shrunk_root", "truncate_weighted"]

# Share of the mean variance that is mixed in, so that rare input directions keep some weight.
SHRINKAGE = 0.01


def shrunk_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """L = S^1/2, symmetric, and L^-1, for S = 0.99 Sigma + 0.01 (tr Sigma / n) I.

    Args:
        covariance: Sigma, of shape n x n, symmetric and positive semidefinite; zero counts as I.

    Returns:
        L and L^-1, in float64.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp_(min=0)
    mean = values.mean()
    values = (1 - SHRINKAGE) * values + SHRINKAGE * mean if mean > 0 else torch.ones_like(values)
    roots = values.sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def truncate_weighted(
    tensor: Tensor,
    covariance: Tensor,
    mode: int,
    cutoff: Cutoff,
    modes: Collection[int],
) -> TuckerTensor:
    """Truncation W' with a small ||(W - W') x_i L||, where S = L L is the inputs' covariance.

    If y = Mat_i(W)^T x with second moments E[x x^T] = S, the square of this norm is the mean square
    of y - y'. The truncated HOSVD of W x_i L is within a factor sqrt(d) of the smallest such error.
    If C is its core, B its basis of mode i and L^-1 B = Q R, then W' has the basis Q and the core
    C x_i R.

    Args:
        tensor: W, of shape n_1 x ... x n_d.
        covariance: Sigma, see `shrunk_root`, of shape n_i x n_i.
        mode: i.
        cutoff: What to keep of W x_i L, see `truncate`.
        modes: The modes to truncate.

    Returns:
        W', in float64, with orthonormal bases.
    """
    root, inverse = shrunk_root(covariance)
    weighted = mode_product(tensor.double(), root, mode)
    core, projections = truncate(weighted, cutoff, modes)
    factors = [
        torch.eye(size, dtype=core.dtype, device=core.device) if projection is None else projection
        for size, projection in zip(tensor.shape, projections, strict=True)
    ]
    factors[mode], turn = positive_qr(inverse @ factors[mode])
    return TuckerTensor(mode_product(core, turn, mode), tuple(factors))
