"""One number of parameters for the whole network."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

from tdlrt.errors import RankError
from tdlrt.linalg import Cutoff
from tdlrt.ranks.bounds import check_bounds, set_fields
from tdlrt.ranks.policy import Candidate, RankPolicy
from tdlrt.ranks.schedule import Schedule, check_values, settled, value_at

__all__ = ["ParameterBudget"]

# Part of their share of a budget that frozen layers must leave the others.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class ParameterBudget(RankPolicy):
    """The largest ranks whose parameters fit one budget for the whole network.

    Directions are removed until the parameters fit. The next direction to be removed is the one of
    all layers and modes that is worth least per parameter saved. If F is the mean square of the
    gradient of the layer's core, the smallest remaining direction k of a mode, with the singular
    value sigma_k, is worth

        sqrt(F) ||C|| log(E_k / E_{k-1}),    E_k = sigma_1^2 + ... + sigma_k^2.

    To first order this is sigma_k^2 sqrt(F) ||C|| / E_k, the geometric mean of its share of what
    the layer has left and of the rise in the loss that an empirical Fisher matrix F I predicts for
    its removal, sigma^2 F. Layers that follow one another keep the product of what each keeps, of
    which the logarithm is a sum: so no layer is emptied because its directions are all alike, and
    two cuts are worth what one cut to the same ranks is. The worth does not depend on the scale of
    a layer. No layer gets more parameters than its dense weight: where its
    ranks would, its own directions are removed first, as if that were its budget.

    A layer without a gradient keeps its ranks, and the others share the rest of the budget. What
    frozen layers leave is divided by the sizes of the dense weights, and the layers of a step never
    get less than their share, even if layers that wait for their turn still have more than theirs:
    so layers that take turns end at the ranks that they would have together.

    Args:
        fraction: Share in (0, 1] of the parameters of the dense weights of the Tucker layers, or
            a schedule of it. Compression is then at least 1 - fraction. Frozen ranks meet what a
            schedule ends with, even if they are frozen earlier.
        parameters: The number itself, or a schedule of it; instead of fraction.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are cut to multiples of this.
        spare: Share by which the budget may be exceeded until the ranks are frozen, for spare
            directions, which give new directions time to grow.

    Raises:
        RankError: A value is out of range, or not exactly one of fraction and parameters is given.
    """

    fraction: float | Schedule | None = None
    parameters: float | Schedule | None = None
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    spare: float = 0.0

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.parameters is None):
            raise RankError(
                f"ParameterBudget: got fraction={self.fraction} and parameters={self.parameters}; "
                "give exactly one of them"
            )
        if self.fraction is not None:
            expected = "a number in (0, 1], such as 0.1"
            fraction = check_values("fraction", self.fraction, expected, lambda x: 0 < x <= 1)
            set_fields(self, fraction=fraction)
        if self.parameters is not None:
            expected = "a number from 1"
            parameters = check_values("parameters", self.parameters, expected, lambda x: x >= 1)
            set_fields(self, parameters=parameters)
        bounds = check_bounds(self.min_rank, self.max_rank, self.multiple_of, self.spare)
        set_fields(self, **bounds)

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The ranks that fit the budget of this step together."""
        moving = {name: c for name, c in candidates.items() if not c.resting}
        sensitivities = self.sensitivities(moving)
        shares = {name: _Share(name, c, self, sensitivities[name]) for name, c in moving.items()}
        dense = sum(candidate.dense_parameters for candidate in candidates.values())
        if self.parameters is not None:
            limit = value_at(self.parameters, step)
        else:
            limit = value_at(self.fraction or 0.0, step) * dense
        limit *= 1 + self.spare
        waiting = [c for c in candidates.values() if c.resting and not c.frozen]
        left = limit - _parameters(c for c in candidates.values() if c.frozen)
        size = sum(c.dense_parameters for c in moving.values())
        share = size / max(1, size + sum(c.dense_parameters for c in waiting))
        for of in shares.values():
            _cut_to_fit([of], of.candidate.dense_parameters)
        _cut_to_fit(list(shares.values()), max(left - _parameters(waiting), left * share))
        return {
            name: Cutoff(tuple(shares[name].ranks if name in shares else candidate.ranks))
            for name, candidate in candidates.items()
        }

    def worth(self, name: str, candidate: Candidate, mode: int) -> Sequence[float]:
        """log(E_k / E_{k-1}) of each direction k of a mode, largest first.

        The largest direction, which is never removed, has its share sigma_1^2 / ||C||^2 in place of
        an infinite number. A subclass may measure the worth of directions in another way.

        Args:
            name: Name of the layer.
            candidate: The layer.
            mode: The mode.
        """
        spectrum = candidate.spectra[mode]
        kept = accumulate(spectrum, initial=0.0)
        return [
            math.log1p(share / before) if before > 0 else share
            for share, before in zip(spectrum, kept, strict=False)
        ]

    def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """How much a relative error of each layer changes the loss: sqrt(F) ||C||, over its mean.

        Args:
            candidates: The layers by name.

        Returns:
            The numbers by name; 1 for a layer that had no gradient so far, or only zero gradients.
        """
        known = {
            name: math.sqrt(c.curvature * c.squared_norm)
            for name, c in candidates.items()
            if c.curvature is not None
        }
        known = {name: value for name, value in known.items() if value > 0}
        mean = sum(known.values()) / max(1, len(known))
        return {name: known[name] / mean if name in known else 1.0 for name in candidates}

    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Refuse a budget below the smallest possible one.

        Raises:
            RankError: Even the smallest ranks have more parameters, or frozen layers leave the
                others less than half of their share.
        """
        trained = [c for c in candidates.values() if not c.frozen]
        kept = _parameters(c for c in candidates.values() if c.frozen)
        smallest = kept + sum(c.parameters_at(self._smallest_ranks(c)) for c in trained)
        dense = sum(candidate.dense_parameters for candidate in candidates.values())
        budget, unit, what = self.parameters, 1, " parameters"
        if budget is None:
            budget, unit, what = self.fraction, dense, ""
        lowest = budget.extremes[0] if isinstance(budget, Schedule) else budget
        if lowest is not None and lowest * unit < smallest:
            raise RankError(
                f"budget: got {lowest:g}{what}, but the smallest possible budget is {smallest} "
                f"parameters, a fraction of {smallest / dense:.4g} (min_rank={self.min_rank}, "
                f"multiple_of={self.multiple_of}, frozen layers keep {kept}); raise it"
            )
        part = sum(c.dense_parameters for c in trained) / dense
        if lowest is not None and kept > lowest * unit * (1 - _LEAST_SHARE * part):
            raise RankError(
                f"budget: got {lowest:g}{what}, a budget of {int(lowest * unit)} parameters, of "
                f"which frozen layers keep {kept}; that leaves the other layers less than half of "
                "their share. Raise it, or leave frozen layers out of factorize_"
            )

    def smallest_rank(self, size: int) -> int:
        """The smallest rank within the bounds of a mode with at most `size` directions."""
        rank = math.ceil(self.min_rank / self.multiple_of) * self.multiple_of
        return min(rank, size, self.max_rank or size)

    def _smallest_ranks(self, candidate: Candidate) -> list[int]:
        ranks = list(candidate.shape)
        for group in _rank_groups(candidate):
            rank = self.smallest_rank(min(candidate.shape[mode] for mode in group))
            for mode in group:
                ranks[mode] = rank
        return ranks

    def settled(self) -> ParameterBudget:
        """What frozen ranks meet: the number a schedule ends with, without spare directions."""
        fraction = None if self.fraction is None else settled(self.fraction)
        parameters = None if self.parameters is None else settled(self.parameters)
        return replace(self, fraction=fraction, parameters=parameters, spare=0.0)


# A step to the next smaller rank: its price, the layer, the modes, their rank before and after, and
# the parameters saved. The first three put cuts in order.
_Cut: TypeAlias = tuple[float, int, tuple[int, ...], int, int, int]


class _Share:
    """The share of one layer in a budget: its ranks, and the price of each cut in them."""

    def __init__(
        self, name: str, candidate: Candidate, policy: ParameterBudget, sensitivity: float
    ) -> None:
        self.candidate, self.policy = candidate, policy
        self.ranks = list(candidate.available)
        self.values: dict[tuple[int, ...], list[float]] = {}
        for group in sorted(_rank_groups(candidate)):
            shortest = min(group, key=lambda mode: candidate.available[mode])
            worths = policy.worth(name, candidate, shortest)[: candidate.available[shortest]]
            values = [sensitivity * worth for worth in worths]
            self.values[group] = values
            self.change(group, min(len(values), policy.max_rank or len(values)))

    @property
    def parameters(self) -> int:
        return self.candidate.parameters_at(self.ranks)

    def change(self, group: tuple[int, ...], rank: int) -> None:
        """Set the rank of a group."""
        for mode in group:
            self.ranks[mode] = rank

    def cuts(self, layer: int) -> Iterator[_Cut]:
        """Every cut down to the smallest ranks, the cheapest first; `ranks` is not changed.

        The price of a cut is the worth of the directions removed per parameter saved, once the cuts
        before it are made.
        """
        core = math.prod(self.ranks)
        queues = {group: self._offers(group) for group in self.values}
        offers = {group: offer for group, queue in queues.items() if (offer := next(queue, None))}
        while offers:
            lowest = math.inf
            cheapest: tuple[int, ...] = ()
            for group, (rank, smaller, worth, size, more) in offers.items():
                price = worth / ((rank - smaller) * (size + core // rank + more * smaller))
                if price < lowest:
                    lowest, cheapest = price, group
            rank, smaller, _, size, more = offers[cheapest]
            less = (rank - smaller) * (core // rank + more * smaller)
            yield lowest, layer, cheapest, rank, smaller, less + (rank - smaller) * size
            core -= less
            if (offer := next(queues[cheapest], None)) is None:
                del offers[cheapest]
            else:
                offers[cheapest] = offer

    def _offers(self, group: tuple[int, ...]) -> Iterator[tuple[int, int, float, int, int]]:
        """Ranks before and after each cut, the worth removed, the sum of n_i, 1 for a matrix or 0.

        From r to s a mode saves (r - s) (n_i + c / r) of the core's c parameters and its own; the
        two modes of a matrix, where c = r^2, save (r - s) (n_1 + n_2 + c / r + s).
        """
        values, step = self.values[group], self.policy.multiple_of
        lowest = self.policy.smallest_rank(len(values))
        size = sum(self.candidate.shape[mode] for mode in group)
        rank = self.ranks[group[0]]
        while rank > lowest:
            smaller = max((rank - 1) // step * step, lowest)
            yield rank, smaller, sum(values[smaller:rank]), size, len(group) - 1
            rank = smaller


def _parameters(candidates: Iterable[Candidate]) -> int:
    """Parameters of layers at the ranks that they have."""
    return sum(candidate.parameters_at(candidate.ranks) for candidate in candidates)


def _rank_groups(candidate: Candidate) -> list[tuple[int, ...]]:
    """Groups of modes that have one rank: the two modes of a matrix, or a mode by itself."""
    modes = candidate.modes
    together = len(candidate.shape) == 2 and len(modes) == 2
    return [tuple(modes)] if together else [(mode,) for mode in modes]


def _cut_to_fit(shares: Sequence[_Share], limit: float) -> None:
    """Cut ranks, the cheapest first, until all layers together have at most `limit` parameters.

    The last cut may save more than is needed. So the cuts are gone through once more, the dearest
    first, and each one that the limit leaves room for is undone.
    """
    total = sum(share.parameters for share in shares)
    made: list[_Cut] = []
    # A cut leaves the prices of other layers as they are, so each layer has a queue of its own.
    queues = [share.cuts(layer) for layer, share in enumerate(shares)]
    for cut in heapq.merge(*queues) if total > limit else ():
        made.append(cut)
        total -= cut[-1]
        if total <= limit:
            break
    for _, layer, group, _, after, _ in made:
        shares[layer].change(group, after)
    for _, layer, group, before, after, _ in reversed(made):
        share = shares[layer]
        if share.ranks[group[0]] == after:
            others = total - share.parameters
            share.change(group, before)
            if others + share.parameters <= limit:
                total = others + share.parameters
            else:
                share.change(group, after)
