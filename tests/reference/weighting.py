"""Truncation weighted by the covariance of the inputs, on tensors in full."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.algebra import mode_product, tucker_to_dense
from reference.truncation import truncate


def truncate_weighted(
    weight: Tensor,
    sigma: Tensor,
    tau: float | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
) -> Tensor:
    """W' = T(W x_2 L) x_2 L^-1 in full, L the symmetric square root of the shrunk covariance.

    From the singular value decomposition S = U D U^T of S = 0.99 Sigma + 0.01 tr(Sigma) / n I.
    """
    size = len(sigma)
    shrunk = 0.99 * sigma + 0.01 * sigma.trace() / size * torch.eye(size, dtype=sigma.dtype)
    left, values, _ = torch.linalg.svd(shrunk)
    root = left @ values.sqrt().diag() @ left.T
    core, factors = truncate(mode_product(weight, root, 1), tau, ranks, modes)
    return mode_product(tucker_to_dense(core, factors), torch.linalg.inv(root), 1)
