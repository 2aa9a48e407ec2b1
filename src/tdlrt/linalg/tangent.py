"""Tangent spaces of the manifold of Tucker tensors of fixed multilinear rank, in stacks.

At W = C x_j U_j, with Mat_i(C)^T = Q_i S_i^T, S_i lower triangular, every tangent vector is

    C. x_j U_j  +  sum_i  Ten_i(K._i Q_i^T) x_{j != i} U_j ,     U_i^T K._i = 0 ,

and its terms are mutually orthogonal: the squared norm is ||C.||^2 + sum_i ||K._i||^2.

All tensors have one leading dimension, of B members; where these differ in size, the tensors are
padded with zeros (`tdlrt.linalg.Layout`), which everything here keeps.
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
    """A tangent vector in the coordinates of the module's header.

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

    Autograd's gradient of U_i carries a relative error of eps; divided by a singular value sigma of
    Mat_i(C) below 8 eps ||C|| it would be noise. With delta, S_i^-T never exceeds 1 / (8 eps ||C||)
    and Q_i Q_i^T is the projection onto the rows of Mat_i(C) with its eigenvalues damped from 1 to
    sigma^2 / (sigma^2 + delta): by less than that noise from sigma = 64 eps ||C|| on, and to zero
    where sigma vanishes; for C in float64, where rounding adds up to eps ||C|| to sigma, to 1 / 64.
    At C = 0, Q_i is zero and no basis moves.

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
    # The type of the core must hold the inverse, and float64 the square.
    least = 8 * max(limits.tiny, math.sqrt(torch.finfo(torch.float64).tiny))
    damping = (8 * limits.eps * norm).clamp(min=least).square()
    basis, factor, inverse = damped_qr(matrix.mT, damping, padding)
    return Factorization(factor.mT.to(core), inverse.to(core), basis.mT.to(core).contiguous())


class TangentSpace:
    """The tangent spaces at W = C x_j U_j, with the factorisations of the cores that they need.

    Args:
        core: C, of shape B x r_1 x ... x r_d with r_i <= prod_{j != i} r_j in modes that move.
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
        """Modes in which the basis of a member can move."""
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
            # In this order, as S_i^-T can make what rounding leaves in the range of U_i large.
            part = reject(self.factor(mode), gradients[mode] @ self.factorizations[mode].inverse)
            parts[mode] = self.masked(part, mode)
        return TangentVector(core_gradient, parts)

    def masked(self, part: Tensor, mode: int) -> Tensor:
        """A part with zeros for the members that do not move, in place of rounding."""
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

        A Z that lies in the span of bases B_j which contain the U_j is given by its coordinates in
        them; then nothing larger than these coordinates is formed.

        Args:
            tensor: Z, of shape B x n_1 x ... x n_d, or its coordinates in B_j.
            bases: B_j, of shape B x n_j x b_j, orthonormal.
            projections: P_j with U_j = B_j P_j, of shape B x b_j x r_j; None for the identity.

        Returns:
            The projection.
        """
        inner = self.factors if projections is None else projections
        parts: dict[int, Tensor] = {}
        others, left = tensor, list(inner)  # a product begun, and what it lacks to become C.
        for mode in self.moving_modes:
            projection = inner[mode]
            if projection is None:  # nothing of Z lies outside U_i
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

        The old block holds C., the block new in mode i alone holds Ten_i(V_i^T K._i Q_i^T), and
        the rest is zero. What of K._i lies outside the range of V_i is left out.

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
        """K_i(1) of the point W - X: an unnormalised new basis.

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
        """A tangent vector in full, of shape B x n_1 x ... x n_d: for checks, small problems."""
        shape = tuple(self.core.shape[1:])
        result = multi_mode_product(tangent.core, self.factors)
        for mode, part in tangent.parts.items():
            term = fold(part @ self.rows(mode), mode, _resized(shape, mode, part.shape[1]))
            result = result + multi_mode_product(term, self.factors, skip=mode)
        return result


def pad_core(core: Tensor, new_bases: Mapping[int, Tensor]) -> Tensor:
    """A core of bases U_i in the bases [U_i | V_i], with zeros for what is new."""
    counts = [new_bases[i].shape[2] if i in new_bases else 0 for i in range(core.ndim - 1)]
    padding = [count for k in reversed(counts) for count in (0, k)]  # from the last mode on
    return torch.nn.functional.pad(core, padding)


def _resized(shape: tuple[int, ...], mode: int, size: int) -> tuple[int, ...]:
    return (*shape[:mode], size, *shape[mode + 1 :])
