"""Tangent spaces of the manifold of Tucker tensors of fixed multilinear rank, in stacks.

At W = C x_j U_j, with Mat_i(C)^T = Q_i S_i^T, S_i lower triangular, every tangent vector is

    C. x_j U_j  +  sum_i  Ten_i(K._i Q_i^T) x_{j != i} U_j ,     U_i^T K._i = 0 ,

and its terms are mutually orthogonal, so the squared norm is ||C.||^2 + sum_i ||K._i||^2.

All tensors are stacks with one leading dimension of B members, padded with zeros if the members
differ in size (see `tdlrt.linalg.Layout`). All functions here preserve these zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import RankError
from tdlrt.linalg.algebra import add_product, check_ranks, fold, multi_mode_product, unfold
from tdlrt.linalg.bases import damped_qr, reject
from tdlrt.linalg.stacks import Layout

__all__ = ["Factorization", "TangentSpace", "TangentVector", "factorize_core", "pad_core"]


class TangentVector(NamedTuple):
    """A tangent vector in the coordinates that the module's docstring defines.

    Attributes:
        core: C., of shape B x r_1 x ... x r_d.
        parts: K._i for each mode that moves, B x n_i x r_i, orthogonal to U_i.
    """

    core: Tensor
    parts: Mapping[int, Tensor]

    def squared_norms(self) -> Tensor:
        """Squared Frobenius norm of each member, B numbers in float64."""
        blocks = (self.core, *self.parts.values())
        norms = [
            torch.linalg.vector_norm(block.flatten(1), dim=1, dtype=torch.float64)
            for block in blocks
        ]
        return torch.stack(norms).square().sum(dim=0)


class Factorization(NamedTuple):
    """Mat_i(C) = S_i Q_i^T for one mode of a stack of cores; see `factorize_core`.

    Attributes:
        lower: S_i, B x r_i x r_i, lower triangular with a positive diagonal.
        inverse: S_i^-T, upper triangular.
        rows: Q_i^T, B x r_i x prod_{j != i} r_j.
    """

    lower: Tensor
    inverse: Tensor
    rows: Tensor


def factorize_core(core: Tensor, mode: int, padding: Tensor | None = None) -> Factorization:
    """Mat_i(C) = S_i Q_i^T with S_i S_i^T = Mat_i(C) Mat_i(C)^T + delta I, delta = (8 eps ||C||)^2.

    Autograd's gradient of U_i has a relative error of eps. Divided by a singular value sigma of
    Mat_i(C) below 8 eps ||C||, it would be noise. With delta, S_i^-T never exceeds
    1 / (8 eps ||C||), and Q_i Q_i^T is the projection onto the row space of Mat_i(C) with its
    eigenvalues damped from 1 to sigma^2 / (sigma^2 + delta). From sigma = 64 eps ||C|| on, the
    damping changes less than that noise does. As sigma goes to zero, the eigenvalue goes to zero
    too; if C is in float64, it stays at or below 1 / 64, because rounding adds up to eps ||C|| to
    sigma. If C = 0, Q_i is zero and no basis moves.

    Args:
        core: C, of shape B x r_1 x ... x r_d.
        mode: i.
        padding: See `tdlrt.linalg.Layout.padding`.

    Returns:
        The factors, in the type of the core.
    """
    matrix = unfold(core, mode, 1)
    norm = torch.linalg.vector_norm(core.flatten(1), dim=1, keepdim=True, dtype=torch.float64)
    limits = torch.finfo(core.dtype)
    # The inverse must be representable in the type of the core, and the square in float64.
    least = 8 * max(limits.tiny, math.sqrt(torch.finfo(torch.float64).tiny))
    damping = (8 * limits.eps * norm).clamp(min=least).square()
    basis, factor, inverse = damped_qr(matrix.mT, damping, padding)
    return Factorization(factor.mT.to(core), inverse.to(core), basis.mT.to(core).contiguous())


class TangentSpace:
    """The tangent spaces at W = C x_j U_j, with the factorisations Mat_i(C) = S_i Q_i^T.

    Args:
        core: C, of shape B x r_1 x ... x r_d, with r_i <= prod_{j != i} r_j for modes that move.
        factors: U_i, of shape B x n_i x r_i with orthonormal columns; None for a mode that is not
            factorised.
        layout: The true sizes.
        factorizations: `factorize_core` for each mode in `layout.moving`, computed by default.

    Raises:
        RankError: A rank is larger than the product of the others.
    """

    def __init__(
        self,
        core: Tensor,
        factors: Sequence[Tensor | None],
        layout: Layout,
        factorizations: Mapping[int, Factorization] | None = None,
    ) -> None:
        self.core, self.layout = core, layout
        self.factors = tuple(factors)
        if factorizations is None:
            for sizes, ranks in zip(layout.sizes, layout.ranks, strict=True):
                check_ranks(ranks, [i for i in layout.moving if ranks[i] < sizes[i]])
            factorizations = {
                mode: factorize_core(core, mode, layout.padding(mode)) for mode in layout.moving
            }
        self.factorizations = dict(factorizations)

    @property
    def moving_modes(self) -> tuple[int, ...]:
        """Modes in which the basis of at least one member can move."""
        return tuple(self.factorizations)

    def factor(self, mode: int) -> Tensor:
        """U_i, of shape B x n_i x r_i, for a mode that is factorised."""
        factor = self.factors[mode]
        if factor is None:
            raise RankError(f"mode: got {mode}, which is not factorised")
        return factor

    def lower(self, mode: int) -> Tensor:
        """S_i, of shape B x r_i x r_i, for a moving mode."""
        return self.factorizations[mode].lower

    def rows(self, mode: int) -> Tensor:
        """Q_i^T, of shape B x r_i x prod_{j != i} r_j, for a moving mode."""
        return self.factorizations[mode].rows

    def gradient(self, core_gradient: Tensor, gradients: Mapping[int, Tensor]) -> TangentVector:
        """Riemannian gradient P(grad_W L) from the gradients that autograd gives for C and U_i.

        C. = grad_C L,  K._i = (I - U_i U_i^T) grad_{U_i} L S_i^-T, as grad_{U_i} L = G_i S_i^T.

        Args:
            core_gradient: grad_C L, of shape B x r_1 x ... x r_d.
            gradients: grad_{U_i} L, of shape B x n_i x r_i, for each moving mode.

        Returns:
            The projected gradient.

        Source: arXiv:2305.19059, section 3.
        """
        parts: dict[int, Tensor] = {}
        for mode in self.moving_modes:
            # The projection comes last, because S_i^-T can amplify rounding errors in range U_i.
            part = reject(self.factor(mode), gradients[mode] @ self.factorizations[mode].inverse)
            parts[mode] = self.masked(part, mode)
        return TangentVector(core_gradient, parts)

    def masked(self, part: Tensor, mode: int) -> Tensor:
        """A part with exact zeros, instead of rounding errors, for the members that do not move."""
        moves = self.layout.moves(mode)
        return part if moves is None else torch.where(moves[:, None, None], part, 0.0)

    def project(
        self,
        tensor: Tensor,
        bases: Sequence[Tensor | None] | None = None,
        projections: Sequence[Tensor | None] | None = None,
    ) -> TangentVector:
        """Orthogonal projection of a tensor Z onto the tangent space.

        C. = Z x_j U_j^T,  K._i = (I - U_i U_i^T) Mat_i(Z x_{j != i} U_j^T) Q_i.

        If Z lies in the span of bases B_j that contain the U_j, it may be given by its coordinates
        in the B_j. Then no tensor larger than these coordinates is formed.

        Args:
            tensor: Z, of shape B x n_1 x ... x n_d, or its coordinates in B_j.
            bases: B_j, of shape B x n_j x b_j, orthonormal.
            projections: P_j with U_j = B_j P_j, of shape B x b_j x r_j; None for the identity.

        Returns:
            The projection.
        """
        inner = self.factors if projections is None else projections
        parts: dict[int, Tensor] = {}
        others, left = tensor, list(inner)  # a partial product, and the factors missing to C.
        for mode in self.moving_modes:
            projection = inner[mode]
            if projection is None:  # Z lies in the range of U_i
                parts[mode] = torch.zeros_like(self.factor(mode))
                continue
            others = multi_mode_product(tensor, inner, transpose=True, skip=mode)
            left = [projection if j == mode else None for j in range(len(inner))]
            part = reject(projection, unfold(others, mode, 1) @ self.rows(mode).mT)
            basis = None if bases is None else bases[mode]
            parts[mode] = self.masked(part if basis is None else basis @ part, mode)
        return TangentVector(multi_mode_product(others, left, transpose=True), parts)

    def embed(self, tangent: TangentVector, new_bases: Mapping[int, Tensor]) -> Tensor:
        """Coordinates of a tangent vector in the augmented bases [U_i | V_i].

        The old block holds C.. The block that is new in mode i alone holds
        Ten_i(V_i^T K._i Q_i^T), without the part of K._i outside the range of V_i. All other blocks
        are zero.

        Args:
            tangent: The tangent vector.
            new_bases: V_i, of shape B x n_i x k_i, orthonormal and orthogonal to U_i, for the modes
                that are augmented.

        Returns:
            A tensor of shape B x (r_1 + k_1) x ... x (r_d + k_d), k_i being 0 elsewhere.
        """
        shape = tuple(self.core.shape[1:])
        result = pad_core(tangent.core, new_bases)
        for mode, new in new_bases.items():
            block = (new.mT @ tangent.parts[mode]) @ self.rows(mode)
            where = [slice(0, r) for r in shape]
            where[mode] = slice(shape[mode], None)
            result[(slice(None), *where)] = fold(block, mode, _resized(shape, mode, new.shape[2]))
        return result

    def basis_step(self, displacement: TangentVector, mode: int) -> Tensor:
        """K_i(1) of the point W - X: the new basis before it is orthonormalised.

        K_i(1) = Mat_i(W - X)(kron_{j != i} U_j) Q_i = U_i (S_i - Mat_i(C.) Q_i) - K._i.

        Args:
            displacement: X.
            mode: i, one of the moving modes.

        Returns:
            Matrices of shape B x n_i x r_i.
        """
        moved = unfold(displacement.core, mode, 1)
        inside = add_product(self.lower(mode), moved, self.rows(mode).mT, alpha=-1)
        return add_product(displacement.parts[mode], self.factor(mode), inside, beta=-1)

    def to_tensor(self, tangent: TangentVector) -> Tensor:
        """A tangent vector in full, of shape B x n_1 x ... x n_d, for checks on small problems."""
        shape = tuple(self.core.shape[1:])
        result = multi_mode_product(tangent.core, self.factors)
        for mode, part in tangent.parts.items():
            term = fold(part @ self.rows(mode), mode, _resized(shape, mode, part.shape[1]))
            result = result + multi_mode_product(term, self.factors, skip=mode)
        return result


def pad_core(core: Tensor, new_bases: Mapping[int, Tensor]) -> Tensor:
    """The core of W in the bases [U_i | V_i]: the core in the bases U_i, padded with zeros."""
    counts = [new_bases[i].shape[2] if i in new_bases else 0 for i in range(core.ndim - 1)]
    padding = [count for k in reversed(counts) for count in (0, k)]  # from the last mode on
    return torch.nn.functional.pad(core, padding)


def _resized(shape: tuple[int, ...], mode: int, size: int) -> tuple[int, ...]:
    return (*shape[:mode], size, *shape[mode + 1 :])
