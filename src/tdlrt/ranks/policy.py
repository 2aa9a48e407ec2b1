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
        available: (r_1, ..., r_d) of the core that is truncated. A step adds new directions to the
            bases, so these may be up to twice the ranks before the step. For a policy without
            `needs_spectra` they are the layer's present ranks, because nothing is read on the host.
        shape: (n_1, ..., n_d) of the weight: outputs, inputs, then the kernel.
        modes: The modes that are factorised, from 0; any other mode i always has r_i = n_i.
        squared_norm: ||C||^2, for a policy that `needs_spectra`.
        spectra: By mode, sigma_k^2 / ||C||^2 of the singular values of Mat_i(C), largest first, for
            a policy that `needs_spectra`.
        curvature: Mean square of the entries of grad_C L, averaged over recent steps, for a policy
            that `needs_spectra`; None if the layer had no gradient yet.
        resting: Whether the layer has no gradient in this step and therefore keeps its ranks.
        frozen: Whether the layer requires no gradient (`requires_grad=False`).
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
        """Number of entries of the dense weight: n_1 n_2 ... n_d."""
        return math.prod(self.shape)

    def parameters_at(self, ranks: Sequence[int]) -> int:
        """Number of parameters of core and learned bases at given ranks: prod r_i + sum n_i r_i.

        >>> Candidate((3, 3), (3, 3), shape=(10, 20), modes=(0, 1)).parameters_at((2, 2))
        64
        """
        return math.prod(ranks) + sum(self.shape[mode] * ranks[mode] for mode in self.modes)


class RankPolicy(ABC):
    """Base class of rank policies, which choose the ranks of all layers at once.

    `TDLRT` calls `check` when it gets the policy, `cutoffs` at the end of every step in which
    ranks are examined, and `settled` when ranks are frozen. Derive your own policy from this class.
    A policy is not stored in the optimiser's state_dict, so it should not change during a training:
    make it a frozen dataclass.
    """

    @property
    def needs_spectra(self) -> bool:
        """Whether `cutoffs` reads singular values; a subclass may set it as a class attribute.

        If true, `cutoffs` gets all layers, including those without a gradient, and the spectra of
        those with one. The spectra are copied to the host in one transfer. If false, `cutoffs` gets
        only the layers that have a gradient, and nothing is copied to the host.
        """
        return True

    @abstractmethod
    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """Choose a cutoff for each layer.

        Args:
            candidates: The layers by name.
            step: Number of the step, from 1.

        Returns:
            A cutoff for every candidate by name. It has one limit per mode, of at least 1, and
            possibly a tolerance. The caller lowers limits that exceed the available rank or the
            product of the other ranks. The limit of a mode that is not factorised has no effect,
            and for a matrix the smaller of its two limits counts.
        """

    def check(self, candidates: Mapping[str, Candidate]) -> None:  # noqa: B027
        """Refuse layers for which the policy cannot be met. By default every layer is accepted.

        Args:
            candidates: The layers by name, without spectra, norms and curvatures.

        Raises:
            RankError: The policy cannot be met.
        """

    def settled(self) -> RankPolicy:
        """The policy that chooses the final ranks when ranks are frozen.

        By default `FixedRank()`, which keeps the ranks of that moment.
        """
        return FixedRank()


@dataclass(frozen=True, kw_only=True)
class FixedRank(RankPolicy):
    """Every layer keeps its ranks; its bases still rotate."""

    needs_spectra = False

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The present ranks r_i as limits."""
        return {name: Cutoff(tuple(candidate.ranks)) for name, candidate in candidates.items()}
