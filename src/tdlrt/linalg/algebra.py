"""Multilinear algebra on dense tensors of any order: unfoldings, mode products, Tucker products.

All functions accept leading batch dimensions: tensors of shape ... x n_1 x ... x n_d, matrices of
shape ... x m x n. Mode 0 is the first dimension after the batch dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import RankError

__all__ = [
    "TuckerTensor",
    "add_product",
    "check_ranks",
    "fold",
    "mode_product",
    "multi_mode_product",
    "rank_is_excessive",
    "unfold",
]


class TuckerTensor(NamedTuple):
    """A tensor W = C x_1 U_1 ... x_d U_d given by its core and its factors.

    Attributes:
        core: C, of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i with orthonormal columns, one per mode.
    """

    core: Tensor
    factors: tuple[Tensor, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Multilinear rank (r_1, ..., r_d)."""
        return tuple(self.core.shape)

    def to_tensor(self) -> Tensor:
        """W in full, of shape n_1 x ... x n_d."""
        return multi_mode_product(self.core, self.factors)


def rank_is_excessive(ranks: Sequence[int], mode: int) -> bool:
    """Whether r_i > prod_{j != i} r_j, so that the rows of Mat_i(C) cannot be independent."""
    return ranks[mode] ** 2 > math.prod(ranks)


def check_ranks(ranks: Sequence[int], modes: Collection[int]) -> None:
    """Verify r_i <= prod_{j != i} r_j in the given modes.

    Raises:
        RankError: A rank is larger than the product of the others.
    """
    for mode in modes:
        if rank_is_excessive(ranks, mode):
            raise RankError(
                f"ranks: got {tuple(ranks)}; rank {ranks[mode]} of mode {mode} is larger than the "
                "product of the other ranks, lower it to that product"
            )


def unfold(tensor: Tensor, mode: int, batch: int = 0) -> Tensor:
    """Mode-i matricisation Mat_i(T).

    Rows run over mode i and columns over the other modes in order, the last mode fastest.

    Args:
        tensor: T, of shape ... x n_1 x ... x n_d.
        mode: i, counted from 0.
        batch: Number of batch dimensions.

    Returns:
        Matrices of shape ... x n_i x prod_{j != i} n_j.

    >>> import torch
    >>> unfold(torch.arange(6).reshape(2, 3), 1)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    return tensor.movedim(batch + mode, batch).flatten(batch + 1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """Tensorisation Ten_i(M), the inverse of `unfold`.

    Args:
        matrix: M, of shape ... x n_i x prod_{j != i} n_j.
        mode: i, counted from 0.
        shape: (n_1, ..., n_d) of the result, without batch dimensions.

    Returns:
        The tensor T with Mat_i(T) = M.

    >>> import torch
    >>> fold(unfold(torch.arange(6).reshape(2, 3), 1), 1, (2, 3))
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    batch = matrix.ndim - 2
    others = [n for j, n in enumerate(shape) if j != mode]
    folded = matrix.reshape(*matrix.shape[:batch], shape[mode], *others)
    return folded.movedim(batch, batch + mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Mode-i product T x_i M, defined by Mat_i(T x_i M) = M Mat_i(T).

    Args:
        tensor: T, of shape ... x n_1 x ... x n_d.
        matrix: M, of shape ... x m x n_i, with the same batch dimensions.
        mode: i, counted from 0.

    Returns:
        A tensor of shape ... x n_1 x ... x m x ... x n_d.
    """
    batch = matrix.ndim - 2
    lead, shape = tensor.shape[:batch], tensor.shape[batch:]
    before, after = math.prod(shape[:mode]), math.prod(shape[mode + 1 :])
    if before == 1:  # one matrix product without a copy of the tensor
        product = matrix @ tensor.reshape(*lead, shape[mode], after)
    elif after == 1:
        product = tensor.reshape(*lead, before, shape[mode]) @ matrix.mT
    else:
        product = matrix @ unfold(tensor, mode, batch)
        product = product.reshape(*lead, -1, before, after).transpose(-3, -2)
    return product.reshape(*lead, *shape[:mode], matrix.shape[-2], *shape[mode + 1 :])


def add_product(
    addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """The sum beta A + alpha L R, in one operation.

    Args:
        addend: A, of shape n x k or B x n x k.
        left: L, of shape n x m or B x n x m.
        right: R, of shape m x k or B x m x k.
        beta: Factor of A.
        alpha: Factor of the product.

    Returns:
        A tensor of the shape of A.
    """
    add = torch.addmm if addend.ndim == 2 else torch.baddbmm
    return add(addend, left, right, beta=beta, alpha=alpha)


def multi_mode_product(
    tensor: Tensor,
    matrices: Sequence[Tensor | None],
    *,
    transpose: bool = False,
    skip: int | None = None,
) -> Tensor:
    """Product in all modes, T x_1 M_1 ... x_d M_d.

    Args:
        tensor: T, of shape ... x n_1 x ... x n_d.
        matrices: M_i, of shape ... x m_i x n_i, or None for the identity.
        transpose: Multiply by M_i^T instead (then M_i is n_i x m_i).
        skip: A mode in which nothing is multiplied.

    Returns:
        A tensor of shape ... x m_1 x ... x m_d.
    """
    for mode, matrix in enumerate(matrices):
        if matrix is not None and mode != skip:
            tensor = mode_product(tensor, matrix.mT if transpose else matrix, mode)
    return tensor
