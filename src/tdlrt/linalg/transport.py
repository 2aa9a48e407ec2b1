"""Transport of tangent vectors, and of squared coordinates, from one point to another.

All tensors have one leading dimension, see `tdlrt.linalg.tangent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg.algebra import add_product, fold, mode_product, multi_mode_product, unfold
from tdlrt.linalg.stacks import Layout
from tdlrt.linalg.tangent import TangentSpace, TangentVector

__all__ = ["Cut", "Transport", "stochastic"]


class Cut(NamedTuple):
    """The coordinates of a tangent vector X that follow from the new bases V_j; see `Transport`.

    Attributes:
        core: X x_j V_j^T.
        along: Y_i by mode i: X x_{j != i} V_j^T without the term of K._i, in the basis U_i.
        across: N_i = V_i^T K._i, by mode that moves at the source.
    """

    core: Tensor
    along: Mapping[int, Tensor]
    across: Mapping[int, Tensor]


class Transport:
    """Transports tangent vectors from a source point to a target point, in coordinates.

    Let U_j be the bases at the source, V_j the bases at the target, R_j = V_j^T U_j (r'_j x r_j)
    and N_j = V_j^T K._j. Then a tangent vector X has

        X x_{j != i} V_j^T = Y_i (in U_i) + Z_i (in K._i),    Z_i = Ten_i(Q_i^T) x_{j != i} R_j ,

    where Y_i and Z_i are of the size of a core. No tensor of the size of a weight is formed, and
    the ranks of the two points may differ.

    Args:
        source: Tangent space at the source.
        bases: V_j, of shape B x n_j x r'_j, orthonormal; the same object U_j if it stays.
        layout: The true sizes at the target.
    """

    def __init__(
        self, source: TangentSpace, bases: Sequence[Tensor | None], layout: Layout
    ) -> None:
        self._source, self._bases, self._layout = source, tuple(bases), layout
        self._overlaps: dict[int, Tensor] = {}
        for mode, (old, new) in enumerate(zip(source.factors, bases, strict=True)):
            if old is not None and new is not None and new is not old:
                self._overlaps[mode] = new.mT @ old
        shape = tuple(source.core.shape[1:])
        self._terms = {mode: fold(source.rows(mode), mode, shape) for mode in source.moving_modes}
        self._rows = {mode: self._apply(term, mode) for mode, term in self._terms.items()}
        self._turns: dict[int, Tensor] = {}

    def _apply(self, tensor: Tensor, *skipped: int) -> Tensor:
        """T x_j R_j in all modes that are not skipped."""
        order = len(self._bases)
        matrices = [None if j in skipped else self._overlaps.get(j) for j in range(order)]
        return multi_mode_product(tensor, matrices)

    def _overlap(self, mode: int, tensor: Tensor) -> Tensor:
        """R_i M, which is M if the basis of the mode stays."""
        return self._overlaps[mode] @ tensor if mode in self._overlaps else tensor

    def point(self) -> Tensor:
        """C x_j R_j, the core of the source in the bases V_j.

        For a moving mode i it equals Z_i x_i (R_i S_i), because Mat_i(C) = S_i Q_i^T.
        """
        for mode, rows in self._rows.items():
            return mode_product(rows, self._overlap(mode, self._source.lower(mode)), mode)
        return self._apply(self._source.core)

    def cut(self, tangent: TangentVector) -> Cut:
        """The coordinates of a tangent vector of the source that follow from the bases V_j.

        Args:
            tangent: X.

        Returns:
            X x_j V_j^T, and the parts that `vector` needs.
        """
        across: dict[int, Tensor] = {}
        for mode, part in tangent.parts.items():
            basis = self._bases[mode]
            if basis is not None:
                across[mode] = basis.mT @ part
        along: dict[int, Tensor] = {}
        for mode in self._wanted():
            along[mode] = self._apply(tangent.core, mode)
            for other, part in across.items():
                if other != mode:
                    term = mode_product(self._terms[other], part, other)
                    along[mode] = along[mode] + self._apply(term, mode, other)
        if not along:
            return Cut(tangent.core, along, across)
        mode, part = next(iter(along.items()))
        core = mode_product(part, self._overlaps[mode], mode) if mode in self._overlaps else part
        if mode in across:
            core = core + mode_product(self._rows[mode], across[mode], mode)
        return Cut(core, along, across)

    def _wanted(self) -> list[int]:
        """Modes whose Y_i is needed: the moving modes of the target, or else one for the core."""
        return list(self._layout.moving or tuple(self._overlaps)[:1])

    def vector(self, tangent: TangentVector, cut: Cut, target: TangentSpace) -> TangentVector:
        """Orthogonal projection of a tangent vector of the source onto the target's tangent space.

        C. = X x_j V_j^T,  K._i = (I - V_i V_i^T) (U_i Mat_i(Y_i) + K._i Mat_i(Z_i)) Q'_i.

        Args:
            tangent: X.
            cut: `cut(tangent)`.
            target: Tangent space at a point with the bases V_j.

        Returns:
            The projection.
        """
        parts: dict[int, Tensor] = {}
        for mode in target.moving_modes:
            inside = unfold(cut.along[mode], mode, 1) @ target.rows(mode).mT
            part = self._source.factor(mode) @ inside
            shadow = self._overlap(mode, inside)
            if mode in self._rows:
                turn = self._turn(mode, target).mT
                part = add_product(part, tangent.parts[mode], turn)
                shadow = add_product(shadow, cut.across[mode], turn)
            part = add_product(part, target.factor(mode), shadow, alpha=-1)
            parts[mode] = target.masked(part, mode)
        return TangentVector(cut.core, parts)

    def _turn(self, mode: int, target: TangentSpace) -> Tensor:
        """T_i = Q'_i^T Mat_i(Z_i)^T, computed once, because a transport has one target."""
        if mode not in self._turns:
            self._turns[mode] = target.rows(mode) @ unfold(self._rows[mode], mode, 1).mT
        return self._turns[mode]

    def squares(self, tangent: TangentVector, target: TangentSpace) -> TangentVector:
        """Transport one non-negative number per coordinate, such as a mean of squares.

        Coordinates are transported by X_C -> X_C x_j R_j and K._i -> K._i T_i^T with
        T_i = Q'_i^T Mat_i(Z_i)^T, so the variances of uncorrelated coordinates are transported by
        the squared entries of R_j and T_i. Where a row of these sums to less than 1, the mean of
        the old values fills it up (see `stochastic`). So constants are preserved, and no value
        leaves the range of the old values. A basis that starts to move, as all bases do that leave
        a core of zeros, gets the mean of the core's values; so does its padding, which nothing
        reads.

        Args:
            tangent: The numbers, in the shape of a tangent vector of the source.
            target: Tangent space at a point with the bases V_j.

        Returns:
            The numbers for the coordinates of the target.
        """
        old, new, dtype = self._source.layout, target.layout, tangent.core.dtype
        core = multi_mode_product(
            tangent.core,
            [
                stochastic(self._overlaps[mode], old.shares(mode, new, dtype))
                if mode in self._overlaps
                else None
                for mode in range(len(self._bases))
            ],
        )
        parts: dict[int, Tensor] = {}
        entries = target.layout.entries()
        means = (core.flatten(1).double().sum(dim=1) / entries).to(core)[:, None, None]
        for mode in target.moving_modes:
            begun = means.expand(target.factor(mode).shape)
            if mode not in self._rows:
                part = begun
            else:
                turn = stochastic(self._turn(mode, target), old.shares(mode, new, dtype))
                # With a core of zeros no basis has moved either.
                moved = (self._source.rows(mode) != 0).flatten(1).any(dim=1)
                moves = old.moves(mode)
                moved = moved if moves is None else moved & moves
                part = torch.where(moved[:, None, None], tangent.parts[mode] @ turn.mT, begun)
            parts[mode] = target.masked(part, mode)
        return TangentVector(core, parts)


def stochastic(weights: Tensor, shares: Tensor | None = None) -> Tensor:
    """Row-stochastic matrix from squared entries, A = M o M + (1 - (M o M) 1) 1^T / r.

    Args:
        weights: M, of shape ... x r' x r, with rows of norm at most 1.
        shares: 1^T / r with zeros where M is padding, ... x r' x r; 1 / r everywhere by default.

    Returns:
        A, non-negative, with rows that sum to 1.
    """
    squares = weights.square()
    rest = (1 - squares.sum(dim=-1, keepdim=True)).clamp(min=0)
    if shares is None:
        return squares + rest / weights.shape[-1]
    return squares + rest * shares
