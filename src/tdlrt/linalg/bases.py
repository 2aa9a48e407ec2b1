"""Orthonormal bases: computing them, extending them and keeping them orthonormal.

A function takes one matrix or a stack of matrices along one leading dimension. A stack of matrices
of different sizes is padded with zeros (see `tdlrt.linalg.Layout`). The argument `padding`, in
float64, is 1 for a column that is padding and 0 for any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdlrt.linalg.algebra import add_product

__all__ = [
    "damped_qr",
    "new_directions",
    "orthonormality_error",
    "orthonormality_tolerance",
    "orthonormalize",
    "polish_basis",
    "positive_qr",
    "reject",
]


def orthonormality_tolerance(dtype: torch.dtype, rows: int) -> float:
    """Largest deviation of U^T U from I that rounding can cause: 8 eps sqrt(n).

    Args:
        dtype: Floating type of U.
        rows: n, the number of rows of U.
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(rows)


def orthonormality_error(basis: Tensor, padding: Tensor | None = None) -> Tensor:
    """Deviation from orthonormality, max |U^T U - I|.

    Args:
        basis: U, of shape ... x n x r.
        padding: Which columns are padding, ... x r.

    Returns:
        A tensor of shape ...
    """
    gram = basis.mT @ basis
    gram.diagonal(dim1=-2, dim2=-1).sub_(1 if padding is None else (1 - padding).to(gram))
    return gram.abs().amax(dim=(-2, -1))


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """QR factorisation M = Q R with a non-negative diagonal of R, by Householder reflections.

    The sign convention makes the result unique, so that it does not depend on the machine.

    Args:
        matrix: M, of shape ... x n x k.

    Returns:
        Q (n x min(n, k), orthonormal columns) and R (min(n, k) x k, upper triangular).
    """
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.ones_like(diagonal).copysign(diagonal)
    return q * signs[..., None, :], r * signs[..., :, None]


def damped_qr(
    matrix: Tensor, damping: Tensor | None = None, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """M = Q R with R^T R = M^T M + diag(delta), R upper triangular with a positive diagonal.

    Q is the upper part of the orthonormal factor of [M; diag(delta)^1/2]. Its singular values are
    sigma / (sigma^2 + delta)^1/2, which is 1 without damping.

    For types smaller than float64, the Gram matrix is formed in float64, where its rounding errors
    are below those of M, and gets a Cholesky factorisation. A float64 matrix gets a Householder QR
    factorisation, because a Gram matrix squares the condition number. Neither waits for the device.
    If M^T M + diag(delta) is singular, the result is arbitrary or not finite.

    Args:
        matrix: M, of shape ... x n x k.
        damping: delta, non-negative, ... x k or ... x 1; zero by default.
        padding: Which columns of M are padding, ... x k. For these, R has a 1 on the diagonal.

    Returns:
        Q (... x n x k), R and R^-1 (... x k x k), in float64.
    """
    exact, columns = matrix.double(), matrix.shape[-1]
    if padding is not None:
        damping = padding if damping is None else padding + damping
    if matrix.dtype == torch.float64:
        rows = exact
        if damping is not None:
            roots = damping.sqrt().expand(*matrix.shape[:-2], columns)
            rows = torch.cat([exact, torch.diag_embed(roots)], dim=-2)
        basis, factor = positive_qr(rows)
        # QR leaves rounding errors in rows of zeros, which are padding and have to stay zero.
        basis = basis[..., : exact.shape[-2], :] * (exact != 0).any(dim=-1, keepdim=True)
        inverse = _triangular_inverse(factor)
    else:
        gram = exact.mT @ exact
        if damping is not None:
            gram.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor = torch.linalg.cholesky_ex(gram)[0].mT
        inverse = _triangular_inverse(factor)
        basis = exact @ inverse
    return basis, factor, inverse


def _triangular_inverse(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    return inverse


def orthonormalize(matrix: Tensor, fallback: Tensor, padding: Tensor | None = None) -> Tensor:
    """Orthonormal basis of the columns: the factor Q of M = Q R with a positive diagonal of R.

    If the columns are dependent up to rounding, that is if some R_jj is at most 8 eps times the
    length of column j or max |Q^T Q - I| is above sqrt(eps), the fallback is returned. This is
    decided on the device, without a wait.

    Args:
        matrix: M, of shape ... x n x k.
        fallback: An orthonormal basis of the same shape.
        padding: Which columns of M are padding, ... x k.

    Returns:
        Q, of shape ... x n x k.
    """
    exact, factor, _ = damped_qr(matrix, padding=padding)
    basis, eps = exact.to(matrix), torch.finfo(matrix.dtype).eps
    gram = basis.mT @ basis
    polished = add_product(basis, basis, gram, beta=1.5, alpha=-0.5)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1 if padding is None else (1 - padding).to(gram))
    good = gram.abs().amax(dim=(-2, -1)) <= math.sqrt(eps)
    # A Householder QR factorisation returns an orthonormal Q even if columns are dependent.
    lengths = torch.linalg.vector_norm(matrix, dim=-2, dtype=torch.float64)
    good &= (factor.diagonal(dim1=-2, dim2=-1) > 8 * eps * lengths).all(dim=-1)
    return torch.where(good[..., None, None], polished, fallback)


def reject(basis: Tensor, vectors: Tensor) -> Tensor:
    """The part of the columns that is orthogonal to a subspace, (I - U U^T) V.

    Args:
        basis: U, of shape ... x n x r with orthonormal columns.
        vectors: V, of shape ... x n x k.

    Returns:
        A matrix of shape ... x n x k.
    """
    return add_product(vectors, basis, basis.mT @ vectors, alpha=-1)


def new_directions(
    basis: Tensor, directions: Tensor, most: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Columns that extend U to an orthonormal basis of range [U | D].

    The new columns are the left singular vectors of (I - U U^T) D, sorted by decreasing singular
    value. Those with a singular value below 1e-6 (float32) or 1e-10 (float64) times the largest are
    dropped, because they are rounding errors.

    Args:
        basis: U, of shape ... x n x r with orthonormal columns.
        directions: D, of shape ... x n x k.
        most: Largest number of new columns, an int or int64 numbers of shape ...; n - r by default.

    Returns:
        The new columns followed by zeros, of shape ... x n x k, and the number of new columns.
    """
    rows, rank = basis.shape[-2:]
    most = rows - rank if most is None else most
    exact = basis.double()
    # Projected twice: if D lies in the range of U, the first projection leaves only rounding
    # errors, which are not orthogonal to U.
    outside = reject(exact, reject(basis, directions).double())
    if basis.dtype == torch.float64:
        outside = outside.nan_to_num(0.0, 0.0, 0.0)
        columns, values, _ = torch.linalg.svd(outside, full_matrices=False)
        floor = 1e-10
    else:
        gram = (outside.mT @ outside).nan_to_num(0.0, 0.0, 0.0)  # eigh refuses NaN and inf
        squares, vectors = torch.linalg.eigh(gram)
        values, vectors = squares.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
        columns = (outside @ vectors) / values.clamp(min=torch.finfo(torch.float64).tiny)[
            ..., None, :
        ]
        floor = 1e-6
    places = torch.arange(values.shape[-1], device=basis.device)
    most = most if isinstance(most, int) else most[..., None]
    kept = (values > floor * values[..., :1]) & (places < most)
    columns = polish_basis(reject(exact, torch.where(kept[..., None, :], columns, 0.0)))
    missing = directions.shape[-1] - columns.shape[-1]  # an SVD returns at most n columns
    if missing:
        columns = torch.nn.functional.pad(columns, (0, missing))
    return columns.to(basis), kept.sum(dim=-1)


def polish_basis(basis: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthonormal basis, U (3 I - U^T U) / 2.

    An error e = ||U^T U - I|| becomes 3/4 e^2 + O(e^3), so that rounding errors of products of
    bases do not accumulate during a training.

    Args:
        basis: U, of shape ... x n x r, orthonormal up to rounding; zero columns stay zero.

    Returns:
        A matrix of shape ... x n x r.
    """
    return add_product(basis, basis, basis.mT @ basis, beta=1.5, alpha=-0.5)
