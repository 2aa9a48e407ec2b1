"""Tangent space of the manifold of Tucker tensors of fixed multilinear rank.

At W = C x_j U_j, with QR factorisations Mat_i(C)^T = Q_i S_i^T, every tangent vector is

    C. x_j U_j  +  sum_i  Ten_i(K._i Q_i^T) x_{j != i} U_j ,     U_i^T K._i = 0 ,

and its terms are mutually orthogonal: the squared norm is ||C.||^2 + sum_i ||K._i||^2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg.algebra import (
    check_ranks,
    fold,
    multi_mode_product,
    unfold,
)
from tdlrt.linalg.bases import positive_qr, reject

__all__ = ["TangentSpace", "TangentVector", "well_conditioned"]


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
        factors: U_i, of shape n_i x r_i with orthonormal columns.
        modes: The modes whose bases may move, all by default; a full basis (r_i = n_i) never does.

    Raises:
        RankError: A rank is larger than the product of the others.
    """

    def __init__(
        self,
        core: Tensor,
        factors: Sequence[Tensor],
        modes: Collection[int] | None = None,
    ) -> None:
        # Sums depend on strides in the last bit; with these a space rebuilt from stored values is
        # the same as one kept from the step before.
        self.core = core = core.contiguous()
        self.factors = tuple(factor.contiguous() for factor in factors)
        self.modes = tuple(range(core.ndim)) if modes is None else tuple(modes)
        self._lower: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._inverse: dict[int, Tensor] = {}
        self._settled = False
        moving = [i for i, r in enumerate(core.shape) if i in self.modes and len(factors[i]) > r]
        check_ranks(core.shape, moving)
        for mode in moving:
            q, r = positive_qr(unfold(core, mode).mT)
            self._lower[mode], self._rows[mode] = r.mT, q.mT

    @property
    def moving_modes(self) -> tuple[int, ...]:
        """Modes whose basis can move."""
        return tuple(self._rows)

    def invert(self) -> list[tuple[Tensor, Tensor]]:
        """S_i and S_i^-T for each moving mode, by a triangular solve, safe or not."""
        for mode, lower in self._lower.items():
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            self._inverse[mode] = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
        return [(lower, self._inverse[mode]) for mode, lower in self._lower.items()]

    def settle(self, safe: Sequence[bool] | None = None) -> None:
        """Fix S_i^-T for `gradient`: a pseudo-inverse with a cut-off where S_i is near singular.

        At W = 0, where every S_i is zero, no basis moves: only the core has a gradient there, and
        Q_i is arbitrary.

        Args:
            safe: `well_conditioned([self])`, read; by default this is done here.
        """
        if safe is None:
            safe = well_conditioned([self]).tolist()
        for (mode, lower), is_safe in zip([*self._lower.items()], safe, strict=True):
            if not is_safe and lower.any():
                self._inverse[mode] = _pseudo_inverse_transpose(lower)
            elif not is_safe:
                del self._lower[mode], self._rows[mode]
        self._settled = True

    def lower(self, mode: int) -> Tensor:
        """S_i, of shape r_i x r_i, for a moving mode."""
        return self._lower[mode]

    def rows(self, mode: int) -> Tensor:
        """Q_i^T, of shape r_i x prod_{j != i} r_j, for a moving mode."""
        return self._rows[mode]

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
        if not self._settled:
            self.settle()
        parts: dict[int, Tensor] = {}
        for mode in self.moving_modes:
            gradient = factor_gradients[mode]
            if gradient is not None:
                parts[mode] = reject(self.factors[mode], gradient) @ self._inverse[mode]
        return self.vector(core_gradient, parts)

    def project(
        self,
        tensor: Tensor,
        bases: Sequence[Tensor] | None = None,
        projections: Sequence[Tensor | None] | None = None,
    ) -> TangentVector:
        """Orthogonal projection of a tensor Z onto the tangent space.

        C. = Z x_j U_j^T,  K._i = (I - U_i U_i^T) Mat_i(Z x_{j != i} U_j^T) Q_i.

        A Z that lies in the span of bases B_j which contain the U_j is given by its coordinates in
        them; then nothing larger than these coordinates is formed.

        Args:
            tensor: Z, of shape n_1 x ... x n_d, or its coordinates in B_j.
            bases: B_j, orthonormal.
            projections: P_j with U_j = B_j P_j; None for the identity.

        Returns:
            The projection.
        """
        inner: Sequence[Tensor | None] = self.factors if projections is None else projections
        parts: dict[int, Tensor] = {}
        others, left = tensor, list(inner)  # a product begun, and what it lacks to become C.
        for mode in self.moving_modes:
            projection = inner[mode]
            if projection is not None:  # else nothing of Z lies outside U_i
                others = multi_mode_product(tensor, inner, transpose=True, skip=mode)
                left = [projection if j == mode else None for j in range(tensor.ndim)]
                part = reject(projection, unfold(others, mode) @ self._rows[mode].mT)
                parts[mode] = part if bases is None else bases[mode] @ part
        return self.vector(multi_mode_product(others, left, transpose=True), parts)

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
            result[where] = fold(block, mode, _resized(ranks, mode, count))
        return result

    def basis_step(self, tangent: TangentVector, lr: float, mode: int) -> Tensor:
        """K_i(1) of the point moved along -X: an unnormalised new basis.

        K_i(1) = Mat_i(W - lr X)(kron_{j != i} U_j) Q_i = U_i (S_i - lr Mat_i(C.) Q_i) - lr K._i.

        Args:
            tangent: X.
            lr: Step size.
            mode: i, one of the moving modes.

        Returns:
            A matrix of shape n_i x r_i.
        """
        inside = self._lower[mode] - lr * unfold(tangent.core, mode) @ self._rows[mode].mT
        return torch.addmm(tangent.factors[mode], self.factors[mode], inside, beta=-lr)

    def to_tensor(self, tangent: TangentVector) -> Tensor:
        """A tangent vector in full, of shape n_1 x ... x n_d: for checks and small problems."""
        ranks = tuple(self.core.shape)
        result = multi_mode_product(tangent.core, self.factors)
        for mode in self.moving_modes:
            shape = _resized(ranks, mode, len(self.factors[mode]))
            term = fold(tangent.factors[mode] @ self._rows[mode], mode, shape)
            result = result + multi_mode_product(term, self.factors, skip=mode)
        return result

    def vector(self, core: Tensor, parts: Mapping[int, Tensor]) -> TangentVector:
        """A tangent vector from its core and some basis parts, the others being zero."""
        return TangentVector(
            core,
            tuple(
                parts[mode] if mode in parts else torch.zeros_like(factor)
                for mode, factor in enumerate(self.factors)
            ),
        )


def well_conditioned(spaces: Sequence[TangentSpace]) -> Tensor:
    """Whether a triangular solve with S_i is safe, for each moving mode of each space.

    It is where ||S_i|| ||S_i^-1|| <= 1 / (8 eps). A core that is not finite counts as safe: no
    cut-off would help.

    Args:
        spaces: At least one; computing this readies them for `settle`.

    Returns:
        Booleans, space after space, on the device of the first core.
    """
    device = spaces[0].core.device
    pairs = [pair for space in spaces for pair in space.invert()]
    if not pairs:
        return torch.ones(0, dtype=torch.bool, device=device)
    sizes = torch._foreach_norm([lower for lower, _ in pairs])
    conditions = torch._foreach_mul(sizes, torch._foreach_norm([inverse for _, inverse in pairs]))
    parts = torch._foreach_mul(conditions, [_cutoff(lower.dtype) for lower, _ in pairs])
    safe = torch.stack([part.to(device) for part in parts]) <= 1  # false for NaN
    return safe | ~torch.stack([size.to(device) for size in sizes]).isfinite()


def _resized(shape: tuple[int, ...], mode: int, size: int) -> tuple[int, ...]:
    return (*shape[:mode], size, *shape[mode + 1 :])


def _cutoff(dtype: torch.dtype) -> float:
    """Singular values of S below this part of the largest are left out of its inverse: 8 eps.

    Autograd's gradient of U_i carries a relative error of eps; divided by a singular value
    smaller than that it would be noise. The directions left out are still moved by the core.
    """
    return 8 * torch.finfo(dtype).eps


def _pseudo_inverse_transpose(lower: Tensor) -> Tensor:
    """Pseudo-inverse of S^T without the singular values below the cut-off."""
    left, values, right = _svd(lower.double())
    limit = _cutoff(lower.dtype) * values[0]
    kept = values > torch.clamp(limit, min=torch.finfo(lower.dtype).tiny)
    result: Tensor = (left * torch.where(kept, 1 / values, 0)) @ right
    return result.to(lower.dtype)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD with a second chance: LAPACK's fails on a few finite matrices, then not on M^T."""
    try:
        left, values, right = torch.linalg.svd(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, values, right = torch.linalg.svd(matrix.mT)
        left, right = right.mT, left.mT
    return left, values, right
