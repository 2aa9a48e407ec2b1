"""Tucker algebra by definition: fibres, einsum and explicit Kronecker products.

Columns of an unfolding run over the remaining modes in ascending order, the last one fastest, so
that ``Mat_i(T x_1 M_1 ... x_d M_d) = M_i Mat_i(T) (kron_{j != i} M_j)^T`` with the Kronecker
product taken in ascending order of ``j``.
"""

import functools
import itertools
import math
import string
from collections.abc import Sequence

import torch
from torch import Tensor


def as_double(tensor: Tensor) -> Tensor:
    """A detached float64 copy on the CPU."""
    return tensor.detach().cpu().double().clone()


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mat_i(T): the mode-i fibres of ``tensor`` side by side."""
    return tensor.reshape(-1)[_fibres(tuple(tensor.shape), mode)]


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """The tensor of ``shape`` whose mode-i fibres are the columns of ``matrix``."""
    tensor = matrix.new_full((math.prod(shape),), math.nan)
    tensor[_fibres(tuple(shape), mode)] = matrix
    return tensor.reshape(tuple(shape))


@functools.cache
def _fibres(shape: tuple[int, ...], mode: int) -> Tensor:
    """The mode-i fibres side by side, each entry by its place in the flat tensor."""
    places = torch.arange(math.prod(shape)).reshape(shape)
    others = (range(n) for i, n in enumerate(shape) if i != mode)
    fibres = [
        places[(*index[:mode], slice(None), *index[mode:])] for index in itertools.product(*others)
    ]
    return torch.stack(fibres, dim=1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """T x_i M: ``matrix`` applied to mode i."""
    old = string.ascii_lowercase[: tensor.ndim]
    new = old.replace(old[mode], "z")
    return torch.einsum(f"{old},z{old[mode]}->{new}", tensor, matrix)


def multi_product(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """T x_1 M_1 ... x_d M_d, one matrix per mode."""
    for mode, matrix in enumerate(matrices):
        tensor = mode_product(tensor, matrix, mode)
    return tensor


def kronecker(matrices: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of the matrices, in the order given."""
    return functools.reduce(_kronecker, matrices)


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    # Not torch.kron, which refuses some strided matrices (torch 2.13).
    return torch.einsum("ij,kl->ikjl", a, b).reshape(len(a) * len(b), -1)


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """M = Q R, where R has a non-negative diagonal."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return q * signs, r * signs[:, None]


def tucker_to_dense(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """W = C x_1 U_1 ... x_d U_d, as vec(W) = (U_1 kron ... kron U_d) vec(C)."""
    shape = [factor.shape[0] for factor in factors]
    return (kronecker(factors) @ core.reshape(-1)).reshape(shape)


def tangent_projection(
    core: Tensor, factors: Sequence[Tensor], z: Tensor, damping: float = 0.0
) -> Tensor:
    """Orthogonal projection of ``z`` onto the tangent space at W = C x_1 U_1 ... x_d U_d.

    Z x_j U_j U_j^T + sum_i Ten_i[ (I - U_i U_i^T) Mat_i(Z) (kron_{j != i} U_j) R_i (...)^T ] with
    R_i = Mat_i(C)^+ Mat_i(C) the projection on the row space of Mat_i(C). With damping it is
    Mat_i(C)^T (Mat_i(C) Mat_i(C)^T + damping I)^-1 Mat_i(C), and not a projection any more.
    """
    projected = multi_product(z, [u @ u.T for u in factors])
    for i, u in enumerate(factors):
        unfolded = unfold(core, i)
        others = kronecker([v for j, v in enumerate(factors) if j != i])
        rows = others @ torch.linalg.pinv(unfolded, rtol=1e-12) @ unfolded @ others.T
        if damping:
            _, values, right = torch.linalg.svd(unfolded, full_matrices=False)
            weights = values.square() / (values.square() + damping)
            rows = others @ right.T @ weights.diag() @ right @ others.T
        outside = torch.eye(u.shape[0], dtype=u.dtype) - u @ u.T
        projected = projected + fold(outside @ unfold(z, i) @ rows, i, z.shape)
    return projected
