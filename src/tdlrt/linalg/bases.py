"""Orthonormal bases: making them, completing them, keeping them orthonormal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "new_directions",
    "orthonormality_error",
    "orthonormality_tolerance",
    "orthonormalize",
    "polish_basis",
    "positive_qr",
    "reject",
]


def orthonormality_tolerance(dtype: torch.dtype, rows: int) -> float:
    """Largest deviation of U^T U from I that rounding explains: 8 eps sqrt(n).

    Args:
        dtype: Floating type of U.
        rows: n, the number of rows of U.
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(rows)


def orthonormality_error(basis: Tensor) -> Tensor:
    """Deviation from orthonormality, max |U^T U - I|.

    Args:
        basis: U, of shape n x r.

    Returns:
        A scalar tensor.
    """
    gram = basis.mT @ basis
    gram.diagonal().sub_(1)
    return gram.abs().max()


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """QR factorisation M = Q R with a non-negative diagonal of R, by Householder reflections.

    The sign convention makes the result a function of M alone, on every machine.

    Args:
        matrix: M, of shape n x k.

    Returns:
        Q (n x min(n, k), orthonormal columns) and R (min(n, k) x k, upper triangular).
    """
    q, r, signs = _signed_qr(matrix)
    return q.mul_(signs), r.mul_(signs[:, None])


def orthonormalize(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the columns, Q of `positive_qr`.

    A rank-deficient M gets arbitrary but orthonormal columns in place of the missing ones.

    Args:
        matrix: M, of shape n x k.

    Returns:
        Q, of shape n x min(n, k).
    """
    q, _, signs = _signed_qr(matrix)
    return q.mul_(signs)


def _signed_qr(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A QR factorisation and the signs of the diagonal of R."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal()
    return q, r, torch.ones_like(diagonal).copysign_(diagonal)


def reject(basis: Tensor, vectors: Tensor) -> Tensor:
    """Part of the columns orthogonal to a subspace, (I - U U^T) V.

    Args:
        basis: U, of shape n x r with orthonormal columns.
        vectors: V, of shape n x k.

    Returns:
        A matrix of shape n x k.
    """
    return torch.addmm(vectors, basis, basis.mT @ vectors, alpha=-1)


def new_directions(basis: Tensor, directions: Tensor) -> Tensor:
    """Columns that complete U to a basis of range [U | D].

    Together with U they are orthonormal. Where D adds fewer than min(k, n - r) independent
    directions the remaining columns are arbitrary, still orthonormal and orthogonal to U. A D that
    is orthogonal to U already, as basis parts of tangent vectors are, takes one QR of D.

    Args:
        basis: U, of shape n x r with orthonormal columns.
        directions: D, of shape n x k.

    Returns:
        The new columns, of shape n x min(k, n - r).
    """
    rows, rank = basis.shape
    count = min(directions.shape[1], rows - rank)
    if count == 0:
        return basis.new_zeros(rows, 0)
    if count == directions.shape[1]:
        columns = orthonormalize(directions)
        for _ in range(3):
            shadow = basis.mT @ columns
            outside = torch.addmm(columns, basis, shadow, alpha=-1)
            # Taking a shadow s away spoils orthonormality by s^T s, which must stay rounding.
            if shadow.square().sum() <= torch.finfo(basis.dtype).eps:
                return outside
            columns = orthonormalize(outside)
        directions = columns
    return orthonormalize(torch.cat([basis, directions], dim=1))[:, rank : rank + count]


def polish_basis(basis: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthonormal basis, U (3 I - U^T U) / 2.

    An error e = ||U^T U - I|| becomes 3/4 e^2 + O(e^3): rounding errors of products of bases do not
    accumulate over a training.

    Args:
        basis: U, of shape n x r, orthonormal up to rounding.

    Returns:
        A matrix of shape n x r.
    """
    return torch.addmm(basis, basis, basis.mT @ basis, beta=1.5, alpha=-0.5)
