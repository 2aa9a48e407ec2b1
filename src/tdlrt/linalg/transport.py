"""Moving what belongs to one point of the manifold to another: vectors, and squares of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tdlrt.linalg.algebra import fold, mode_product, multi_mode_product, unfold
from tdlrt.linalg.tangent import TangentSpace, TangentVector

__all__ = ["Cut", "Transport", "stochastic"]


class Cut(NamedTuple):
    """A tangent vector X in other bases V_j, as far as these alone determine it; see `Transport`.

    Attributes:
        core: X x_j V_j^T.
        along: Y_i, for each mode i: X x_{j != i} V_j^T without the term of K._i, in U_i.
        across: N_i = V_i^T K._i, for each mode that moves at the source.
    """

    core: Tensor
    along: Mapping[int, Tensor]
    across: Mapping[int, Tensor]


class Transport:
    """Moves what belongs to one point to another one, in coordinates.

    With R_j = V_j^T U_j (r'_j x r_j), U_j the bases at the source and V_j those at the target, and
    N_j = V_j^T K._j, a tangent vector X has

        X x_{j != i} V_j^T = Y_i (in U_i) + Z_i (in K._i),    Z_i = Ten_i(Q_i^T) x_{j != i} R_j ,

    all small. Nothing of the size of a weight is formed, and the ranks may differ.

    Args:
        source: Tangent space at the old point.
        bases: V_j, orthonormal; U_j itself for a mode that is not factorised.
    """

    def __init__(self, source: TangentSpace, bases: Sequence[Tensor]) -> None:
        self._source, self._bases = source, bases
        self._overlaps = {
            mode: bases[mode].mT @ source.factors[mode]
            for mode in source.modes
            if source.factors[mode].shape[0] > source.factors[mode].shape[1]  # it may move, later
            or bases[mode] is not source.factors[mode]
        }
        shape = tuple(source.core.shape)
        self._rows = {
            mode: self._apply(fold(source.rows(mode), mode, shape), mode)
            for mode in source.moving_modes
        }
        self._target: TangentSpace | None = None
        self._turns: dict[int, Tensor] = {}

    def _apply(self, tensor: Tensor, *skipped: int) -> Tensor:
        """T x_j R_j over the modes that are not skipped."""
        matrices = [
            None if mode in skipped else self._overlaps.get(mode) for mode in range(tensor.ndim)
        ]
        return multi_mode_product(tensor, matrices)

    def point(self) -> Tensor:
        """C x_j R_j, the core of the source in the bases V_j.

        Of a moving mode i, Mat_i(C) = S_i Q_i^T makes it Z_i x_i (R_i S_i).
        """
        for mode, rows in self._rows.items():
            return mode_product(rows, self._overlaps[mode] @ self._source.lower(mode), mode)
        return self._apply(self._source.core)

    def cut(self, tangent: TangentVector) -> Cut:
        """Coordinates of a tangent vector of the source that the bases V_j determine.

        Args:
            tangent: X.

        Returns:
            X x_j V_j^T, and the parts that `vector` goes on with.
        """
        source, shape = self._source, tuple(self._source.core.shape)
        across = {
            mode: self._bases[mode].mT @ tangent.factors[mode] for mode in source.moving_modes
        }
        terms = {
            mode: fold(
                part @ source.rows(mode), mode, (*shape[:mode], len(part), *shape[mode + 1 :])
            )
            for mode, part in across.items()
        }
        along: dict[int, Tensor] = {}
        for mode in self._overlaps:
            along[mode] = self._apply(tangent.core, mode)
            for other, term in terms.items():
                if other != mode:
                    along[mode] = along[mode] + self._apply(term, mode, other)
        if not along:
            return Cut(tangent.core, along, across)
        mode, part = next(iter(along.items()))
        core = mode_product(part, self._overlaps[mode], mode)
        if mode in across:
            core = core + mode_product(self._rows[mode], across[mode], mode)
        return Cut(core, along, across)

    def vector(self, tangent: TangentVector, cut: Cut, target: TangentSpace) -> TangentVector:
        """Orthogonal projection of a tangent vector of the source onto the target's space.

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
            inside = unfold(cut.along[mode], mode) @ target.rows(mode).mT
            part = self._source.factors[mode] @ inside
            shadow = self._overlaps[mode] @ inside
            if mode in self._rows:
                turn = self._turn(mode, target).mT
                part.addmm_(tangent.factors[mode], turn)
                shadow.addmm_(cut.across[mode], turn)
            parts[mode] = part.addmm_(self._bases[mode], shadow, alpha=-1)
        return target.vector(cut.core, parts)

    def _turn(self, mode: int, target: TangentSpace) -> Tensor:
        """T_i = Q'_i^T Mat_i(Z_i)^T, formed once for all that moves to this target."""
        if self._target is not target:
            self._target, self._turns = target, {}
        if mode not in self._turns:
            self._turns[mode] = target.rows(mode) @ unfold(self._rows[mode], mode).mT
        return self._turns[mode]

    def squares(self, tangent: TangentVector, target: TangentSpace) -> TangentVector:
        """Move a quantity per coordinate, such as a mean of squares, that is not a tensor of W.

        Under X_C -> X_C x_j R_j and K._i -> K._i T_i^T, T_i = Q'_i^T Mat_i(Z_i)^T, the variances of
        uncorrelated coordinates go through the squared entries of R_j and T_i. What the old
        coordinates do not explain gets their mean: see `stochastic`. So constants stay as they are
        and no value leaves the range of the old ones. A basis that begins to move gets the mean of
        the core's.

        Args:
            tangent: The quantity, of the shape of a tangent vector of the source.
            target: Tangent space at a point with the bases V_j.

        Returns:
            The quantity in the coordinates of the target.
        """
        weights = [self._overlaps.get(mode) for mode in range(tangent.core.ndim)]
        core = multi_mode_product(
            tangent.core, [w if w is None else stochastic(w) for w in weights]
        )
        parts: dict[int, Tensor] = {}
        for mode in target.moving_modes:
            if mode in self._rows:
                turn = stochastic(self._turn(mode, target))
                parts[mode] = tangent.factors[mode] @ turn.mT
            else:
                parts[mode] = core.mean().expand(target.factors[mode].shape).clone()
        return target.vector(core, parts)


def stochastic(weights: Tensor) -> Tensor:
    """Row-stochastic matrix of the squared entries, A = M o M + (1 - (M o M) 1) 1^T / r.

    Args:
        weights: M, of shape r' x r, with rows of norm at most 1.

    Returns:
        A, non-negative with rows that add up to 1.
    """
    squares = weights.square()
    rest = squares.sum(dim=1, keepdim=True).neg_().add_(1).clamp_(min=0)
    return squares.add_(rest, alpha=1 / weights.shape[1])
