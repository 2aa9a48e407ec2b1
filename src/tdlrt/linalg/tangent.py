"""Tangent space of the manifold of Tucker tensors of fixed multilinear rank.

At W = C x_j U_j, with QR factorisations Mat_i(C)^T = Q_i S_i^T, every tangent vector is

    C. x_j U_j  +  sum_i  Ten_i(K._i Q_i^T) x_{j != i} U_j ,     U_i^T K._i = 0 ,

and its terms are mutually orthogonal: the squared norm is ||C.||^2 + sum_i ||K._i||^2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg.algebra import fold, multi_mode_product, unfold
from tdlrt.linalg.bases import positive_qr, reject

__all__ = ["TangentSpace", "TangentVector"]


class TangentVector(NamedTuple):
    """A tangent vector in the coordinates of the module's header.

    Attributes:
        core: C., of shape r_1 x ... x r_d.
        factors: K._i, of shape n_i x r_i, orthogonal to U_i; zero for a mode that does not move.
    """

    core: Tensor
    factors: tuple[Tensor, ...]

    def norm(self) -> Tensor:
        """Frobenius norm of the tangent vector, a scalar tensor."""
        parts = torch.stack([part.square().sum() for part in (self.core, *self.factors)])
        return parts.sum().sqrt()


class TangentSpace:
    """The tangent space at W = C x_j U_j, with the factorisations of the core that it needs.

    Args:
        core: C, of shape r_1 x ... x r_d with r_i <= prod_{j != i} r_j.
        factors: U_i, of shape n_i x r_i with orthonormal columns, or None for the identity.
        modes: The modes whose bases may move, all by default; a full basis (r_i = n_i) never does.
    """

    def __init__(
        self,
        core: Tensor,
        factors: Sequence[Tensor | None],
        modes: Collection[int] | None = None,
    ) -> None:
        self.core = core
        self.factors = tuple(factors)
        self.modes = tuple(range(core.ndim)) if modes is None else tuple(modes)
        self.sizes = tuple(
            rank if basis is None else len(basis)
            for rank, basis in zip(core.shape, self.factors, strict=True)
        )
        self._lower: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        for mode, size in enumerate(self.sizes):
            if size > core.shape[mode] and mode in self.modes:
                q, r = positive_qr(unfold(core, mode).mT)
                self._lower[mode], self._rows[mode] = r.mT, q.mT

    @property
    def moving_modes(self) -> tuple[int, ...]:
        """Modes whose basis can move."""
        return tuple(self._rows)

    def gradient(
        self, core_gradient: Tensor, factor_gradients: Sequence[Tensor | None]
    ) -> TangentVector:
        """Riemannian gradient P(grad_W L) from the gradients that autograd gives for C and U_i.

        C. = grad_C L,  K._i = (I - U_i U_i^T) grad_{U_i} L S_i^-T, as grad_{U_i} L = G_i S_i^T.

        Args:
            core_gradient: grad_C L, of shape r_1 x ... x r_d.
            factor_gradients: grad_{U_i} L, of shape n_i x r_i; None counts as zero.

        Returns:
            The projected gradient.

        Source: arXiv:2305.19059, section 3.
        """
        parts = self._zeros(core_gradient)
        for mode in self.moving_modes:
            basis, gradient = self.factors[mode], factor_gradients[mode]
            if basis is not None and gradient is not None:
                parts[mode] = reject(basis, gradient) @ _inverse_transpose(self._lower[mode])
        return TangentVector(core_gradient, tuple(parts))

    def project(self, tensor: Tensor) -> TangentVector:
        """Orthogonal projection of a full tensor Z onto the tangent space.

        C. = Z x_j U_j^T,  K._i = (I - U_i U_i^T) Mat_i(Z x_{j != i} U_j^T) Q_i.

        Args:
            tensor: Z, of shape n_1 x ... x n_d.

        Returns:
            The projection.
        """
        parts = self._zeros(tensor)
        for mode in self.moving_modes:
            basis = self.factors[mode]
            if basis is not None:
                others = multi_mode_product(tensor, self.factors, transpose=True, skip=mode)
                parts[mode] = reject(basis, unfold(others, mode) @ self._rows[mode].mT)
        core = multi_mode_product(tensor, self.factors, transpose=True)
        return TangentVector(core, tuple(parts))

    def embed(self, tangent: TangentVector, new_bases: Sequence[Tensor]) -> Tensor:
        """Coordinates of a tangent vector in the augmented bases [U_i | V_i].

        The old block holds C., the block new in mode i alone holds Ten_i(V_i^T K._i Q_i^T), and
        the rest is zero. What of K._i lies outside the range of V_i is left out.

        Args:
            tangent: The tangent vector.
            new_bases: V_i, of shape n_i x k_i, orthonormal and orthogonal to U_i; k_i may be 0.

        Returns:
            A tensor of shape (r_1 + k_1) x ... x (r_d + k_d).
        """
        ranks = tuple(self.core.shape)
        counts = [new.shape[1] for new in new_bases]
        result = self.core.new_zeros([r + k for r, k in zip(ranks, counts, strict=True)])
        old = tuple(slice(0, r) for r in ranks)
        result[old] = tangent.core
        for mode in self.moving_modes:
            count = counts[mode]
            block = (new_bases[mode].mT @ tangent.factors[mode]) @ self._rows[mode]
            where = (*old[:mode], slice(ranks[mode], ranks[mode] + count), *old[mode + 1 :])
            result[where] = fold(block, mode, (*ranks[:mode], count, *ranks[mode + 1 :]))
        return result

    def to_tensor(self, tangent: TangentVector) -> Tensor:
        """A tangent vector in full, of shape n_1 x ... x n_d: for checks and small problems."""
        ranks, sizes = self.core.shape, self.sizes
        result = multi_mode_product(tangent.core, self.factors)
        for mode in self.moving_modes:
            shape = (*ranks[:mode], sizes[mode], *ranks[mode + 1 :])
            term = fold(tangent.factors[mode] @ self._rows[mode], mode, shape)
            result = result + multi_mode_product(term, self.factors, skip=mode)
        return result

    def _zeros(self, like: Tensor) -> list[Tensor]:
        return [
            like.new_zeros(size, rank)
            for size, rank in zip(self.sizes, self.core.shape, strict=True)
        ]


def _inverse_transpose(lower: Tensor) -> Tensor:
    """S^-T, or its pseudo-inverse without the singular values below 8 eps of the largest.

    Autograd's gradient of U_i carries a relative error of eps; divided by a singular value
    smaller than that it would be noise. The directions left out are still moved by the core.
    """
    cutoff = 8 * torch.finfo(lower.dtype).eps
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
    condition = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse)
    if condition <= 1 / cutoff:  # false for NaN
        return inverse
    left, values, right = torch.linalg.svd(lower)
    kept = values > cutoff * values[0]
    result: Tensor = (left * torch.where(kept, 1 / values, 0)) @ right
    return result
