"""The protocol of a rank policy, and the policy that changes nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from tdlrt.linalg import Cutoff

__all__ = ["Candidate", "FixedRank", "RankPolicy"]


class Candidate(NamedTuple):
    """A layer whose ranks are to be chosen, described by numbers on the host.

    Its weight is W = C x_1 U_1 ... x_d U_d, with a core C of shape r_1 x ... x r_d.

    Attributes:
        ranks: (r_1, ..., r_d) before the step.
        available: (r_1, ..., r_d) of the core from which directions may be kept. A step adds new
            directions to the bases, so these may be up to twice the ranks before the step. They
            are the layer's own for a policy without `needs_spectra`, for which nothing is read.
        shape: (n_1, ..., n_d) of the weight: outputs, inputs, then the kernel.
        modes: The modes that are factorised, from 0; any other mode i has r_i = n_i for good.
        squared_norm: ||C||^2; for a policy that `needs_spectra`.
        spectra: By mode, sigma_k^2 / ||C||^2 of the singular values of Mat_i(C), largest first;
            for a policy that `needs_spectra`.
        curvature: Mean square of the entries of grad_C L, averaged over recent steps; for a policy
            that `needs_spectra`, and None where no gradient was seen yet.
        resting: Whether the layer has no gradient in this step and so keeps its ranks.
        frozen: Whether it requires none (`requires_grad=False`).
    """

    ranks: Sequence[int]
    available: Sequence[int]
    shape: Sequence[int]
    modes: Collection[int]
    squared_norm: float = 0.0
    spectra: Mapping[int, Sequence[float]] = MappingProxyType({})
    curvature: float | None = None
    resting: bool = False
    frozen: bool = False

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense weight: n_1 n_2 ... n_d."""
        return math.prod(self.shape)

    def parameters_at(self, ranks: Sequence[int]) -> int:
        """Numbers in the core and in the learned bases at some ranks: prod r_i + sum n_i r_i.

        >>> Candidate((3, 3), (3, 3), shape=(10, 20), modes=(0, 1)).parameters_at((2, 2))
        64
        """
        return math.prod(ranks) + sum(self.shape[mode] * ranks[mode] for mode in self.modes)


class RankPolicy(ABC):
    """Says which ranks to keep, for all layers at once; derive from it for a policy of your own.

    `TDLRT` calls `check` when it gets the policy, `cutoffs` at the end of every step in which
    ranks are examined, and `settled` when they are frozen. A policy is not stored with the
    optimiser's state, so it should not change: make it a frozen dataclass.
    """

    @property
    def needs_spectra(self) -> bool:
        """Whether the policy reads singular values; a class attribute may say so.

        If so, `cutoffs` is given all layers, those that rest included, with the spectra of those
        that move. They come to the host in one transfer. Otherwise it is given the layers that
        move alone, and nothing is read for it.
        """
        return True

    @abstractmethod
    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """Where to cut each layer.

        Args:
            candidates: The layers by name.
            step: Number of the step, from 1.

        Returns:
            A cut-off by name for every candidate: limits of at least 1, one per mode, alone or
            with a tolerance. The caller brings down ranks beyond what a layer has, or above the
            product of its other ranks. The limit of a mode that is not factorised has no effect,
            and a matrix keeps the smaller of its two ranks.
        """

    def check(self, candidates: Mapping[str, Candidate]) -> None:  # noqa: B027
        """Refuse layers for which the policy cannot be met; by default none are.

        Args:
            candidates: The layers by name, without spectra, norms and curvatures.

        Raises:
            RankError: The policy cannot be met.
        """

    def settled(self) -> RankPolicy:
        """The policy that chooses the ranks one last time, as they are frozen.

        By default `FixedRank()`: the ranks at that moment stay.
        """
        return FixedRank()


@dataclass(frozen=True, kw_only=True)
class FixedRank(RankPolicy):
    """Every layer keeps the ranks it has; the directions still rotate."""

    needs_spectra = False

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The ranks r_i, whatever the singular values are."""
        return {name: Cutoff(tuple(candidate.ranks)) for name, candidate in candidates.items()}
