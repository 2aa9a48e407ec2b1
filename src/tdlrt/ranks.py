"""Rank policies: how many directions a layer may keep, at the start and while it trains."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, TypeAlias

from tdlrt.errors import NothingMatchedError, RankError
from tdlrt.linalg import Cutoff

__all__ = [
    "ByName",
    "Candidate",
    "CubicSchedule",
    "FixedRank",
    "LinearSchedule",
    "ParameterBudget",
    "RankPolicy",
    "RankSpec",
    "RelativeTolerance",
    "Schedule",
    "explicit_ranks",
    "initial_cutoff",
]

# Modes this small start full under a fractional rank: there is nothing to save in them.
SMALL_MODE = 4


class Schedule(ABC):
    """A number that depends on the step, for a tolerance or a budget."""

    @abstractmethod
    def value(self, step: int) -> float:
        """The number at a step, counted from 1."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value."""


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int

    _power: ClassVar[int]

    def __post_init__(self) -> None:
        _check_positive_integer("steps", self.steps)
        for name in ("start", "end"):
            _check_range(name, getattr(self, name), "a finite number", math.isfinite)

    def value(self, step: int) -> float:
        """The number at a step, counted from 1; `end` from step `steps` on."""
        left = max(0.0, 1 - step / self.steps)
        return self.end + (self.start - self.end) * left**self._power

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return min(self.start, self.end), max(self.start, self.end)


class LinearSchedule(_Ramp):
    """end + (start - end) (1 - t / steps) at step t, and `end` afterwards.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Length of the ramp.

    Raises:
        RankError: A value is no number, or steps is not positive.
    """

    _power = 1


class CubicSchedule(_Ramp):
    """end + (start - end) (1 - t / steps)^3 at step t, and `end` afterwards: fast at first.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Length of the ramp.

    Raises:
        RankError: A value is no number, or steps is not positive.

    Source: Zhu, Gupta, arXiv:1710.01878, equation 1.

    >>> CubicSchedule(0.5, 0.25, steps=100).value(50)
    0.28125
    """

    _power = 3


class Candidate(NamedTuple):
    """A layer whose ranks are to be chosen, in numbers on the host.

    Attributes:
        ranks: The ranks before the step.
        available: The ranks of the core C in the bases from which directions may be kept.
        shape: (n_1, ..., n_d) of the weight.
        modes: The modes that are factorised.
        squared_norm: ||C||^2.
        spectra: By mode, sigma_k^2 / ||C||^2 of Mat_i(C), largest first; for a policy that
            `needs_spectra`.
        curvature: Mean square of the entries of grad_C L, averaged over recent steps; None where
            no gradient was seen yet.
        resting: Whether the layer keeps its ranks in this step, for want of a gradient.
    """

    ranks: Sequence[int]
    available: Sequence[int]
    shape: Sequence[int]
    modes: Collection[int]
    squared_norm: float = 0.0
    spectra: Mapping[int, Sequence[float]] = MappingProxyType({})
    curvature: float | None = None
    resting: bool = False


class RankPolicy(ABC):
    """Says which ranks to keep, for all layers at once."""

    @property
    def needs_spectra(self) -> bool:
        """Whether it compares layers: it sees all of them, and the spectra of those that move.

        Another policy is asked about the layers that move alone, and nothing is read for it.
        """
        return True

    @abstractmethod
    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """Where to cut each layer.

        Args:
            candidates: The layers by name.
            step: Number of the step, from 1.
        """

    @abstractmethod
    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Refuse a policy that these layers cannot meet; it looks at shapes and modes alone.

        Raises:
            RankError: The policy cannot be met.
        """

    @abstractmethod
    def settled(self) -> RankPolicy:
        """What cuts the ranks once, when they are frozen; `FixedRank()` where they may stay."""


@dataclass(frozen=True, kw_only=True)
class FixedRank(RankPolicy):
    """Every layer keeps the ranks it has; the directions still rotate."""

    needs_spectra = False

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The ranks r_i, whatever the singular values are."""
        return {name: Cutoff(tuple(candidate.ranks)) for name, candidate in candidates.items()}

    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Any layer can keep its ranks."""

    def settled(self) -> FixedRank:
        """The ranks as they are."""
        return self


@dataclass(frozen=True)
class RelativeTolerance(RankPolicy):
    """Smallest ranks with ||C - C_truncated|| <= tau ||C||, layer by layer.

    The squared budget tau^2 ||C||^2 is shared equally by the modes (a matrix has one truncation,
    which gets all of it), so the bound holds by construction. The bounds come after it.

    Args:
        tau: Relative tolerance in [0, 1), or a schedule of it; 0 discards nothing.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are rounded up to a multiple of this (mode sizes permitting).
        spare: Share of a rank, rounded up, that is kept beyond what tau asks. A direction is new
            with a singular value of the order of the learning rate; without this room it has
            one step to outgrow the tolerance, and ranks hardly grow. The spare directions go
            when the ranks are frozen.

    Raises:
        RankError: A value is out of its range.
    """

    needs_spectra = False

    tau: float | Schedule
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    spare: float = 0.0

    def __post_init__(self) -> None:
        _check_range("tau", self.tau, "a number in [0, 1), such as 0.1", lambda x: 0 <= x < 1)
        _check_bounds(self)

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The tolerance of this step."""
        return {name: self.cutoff(candidate.shape, step) for name, candidate in candidates.items()}

    def cutoff(self, shape: Sequence[int], step: int = 0) -> Cutoff:
        """Where to cut one layer.

        Args:
            shape: (n_1, ..., n_d) of the weight.
            step: Number of the step; 0 is the start of a schedule.
        """
        return Cutoff(
            limits=tuple(n if self.max_rank is None else self.max_rank for n in shape),
            tau=_value(self.tau, step),
            min_rank=self.min_rank,
            multiple_of=self.multiple_of,
            spare=self.spare,
        )

    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Any layer can meet a tolerance."""

    def settled(self) -> RankPolicy:
        """The same tolerance without spare directions, if it has any."""
        return replace(self, spare=0.0) if self.spare else FixedRank()


@dataclass(frozen=True)
class ParameterBudget(RankPolicy):
    """One number of parameters for the whole network, spent where it matters most.

    Among all layers and modes the direction goes first that is worth least per parameter that goes
    with it, until what is left fits. With F the mean square of the gradient of the layer's core, a
    direction with singular value sigma is worth sigma^2 sqrt(F) / ||C||: the geometric mean of its
    share of the layer, sigma^2 / ||C||^2, and of the rise in the loss that an empirical Fisher
    matrix F I expects from its removal, sigma^2 F. Neither depends on the scale of a layer.

    A layer without a gradient keeps its ranks, and the others share what it leaves of the budget.

    Args:
        fraction: Share in (0, 1] of the parameters of the dense weights of the Tucker layers, or
            a schedule of it. Compression is then at least 1 - fraction.
        parameters: The number itself, or a schedule of it; instead of fraction.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are cut to multiples of this.
        spare: Share of the budget that is kept beyond it until the ranks are frozen, so that new
            directions have time to grow.

    Raises:
        RankError: A value is out of its range, or not exactly one of fraction and parameters is
            given.
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
            _check_range("fraction", self.fraction, expected, lambda x: 0 < x <= 1)
        if self.parameters is not None:
            _check_range("parameters", self.parameters, "a number from 1", lambda x: x >= 1)
        _check_bounds(self)

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The ranks that fit the budget of this step together."""
        moving = {name: c for name, c in candidates.items() if not c.resting}
        sensitivities = self.sensitivities(moving)
        shares = {name: _Share(name, c, self, sensitivities[name]) for name, c in moving.items()}
        if self.parameters is not None:
            limit = _value(self.parameters, step)
        else:
            limit = _value(self.fraction or 0.0, step) * _dense_parameters(candidates)
        taken = sum(_parameters(c.ranks, c) for c in candidates.values() if c.resting)
        _spend(list(shares.values()), limit * (1 + self.spare) - taken)
        return {
            name: Cutoff(tuple(shares[name].ranks if name in shares else candidate.ranks))
            for name, candidate in candidates.items()
        }

    def worth(self, name: str, candidate: Candidate, mode: int) -> Sequence[float]:
        """Share of the layer in each direction of a mode: sigma_k^2 / ||C||^2, largest sigma first.

        Args:
            name: Name of the layer.
            candidate: The layer.
            mode: The mode.
        """
        return candidate.spectra[mode]

    def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """How much a relative error of each layer matters: sqrt(F) ||C||, its mean set to 1.

        It is 1, too, for a layer that has had no gradient, or only zeros, so far.

        Args:
            candidates: The layers by name.
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
            RankError: Even the smallest ranks need more.
        """
        smallest = sum(
            _parameters(_smallest_ranks(self, candidate), candidate)
            for candidate in candidates.values()
        )
        dense = _dense_parameters(candidates)
        name, budget, unit = "parameters", self.parameters, 1
        if budget is None:
            name, budget, unit = "fraction", self.fraction, dense
        lowest = budget.extremes[0] if isinstance(budget, Schedule) else budget
        if lowest is not None and lowest * unit < smallest:
            raise RankError(
                f"{name}: got {lowest:g}, but the smallest possible budget is {smallest} "
                f"parameters, a fraction of {smallest / dense:.4g} (min_rank={self.min_rank}, "
                f"multiple_of={self.multiple_of}); raise {name}"
            )

    def settled(self) -> ParameterBudget:
        """The same budget without spare directions: frozen ranks meet it in any case."""
        return replace(self, spare=0.0)


@dataclass(frozen=True)
class ByName(RankPolicy):
    """A policy per layer: the first whose name pattern (`*`, `?`, `[..]`) matches.

    A layer that no pattern matches keeps its ranks. A `ParameterBudget` counts its own layers.

    Args:
        policies: Policies by pattern.

    Raises:
        RankError: One of them is not a policy.
    """

    policies: Mapping[str, RankPolicy]

    def __post_init__(self) -> None:
        for pattern, policy in self.policies.items():
            if not isinstance(policy, RankPolicy):
                raise RankError(
                    f"rank_policy[{pattern!r}]: got {policy!r}, expected a rank policy such as "
                    "RelativeTolerance(0.1)"
                )

    @property
    def needs_spectra(self) -> bool:
        """Whether the policy of any layer needs them."""
        return any(policy.needs_spectra for policy in self.policies.values())

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """What the policy of each layer says."""
        cutoffs: dict[str, Cutoff] = {}
        for policy, group in self._groups(candidates):
            cutoffs |= policy.cutoffs(group, step)
        return cutoffs

    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Refuse a pattern without a layer, and policies that cannot be met.

        Raises:
            RankError: A policy cannot be met.
            NothingMatchedError: A pattern matches no layer.
        """
        for pattern in self.policies:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise NothingMatchedError(
                    f"rank_policy[{pattern!r}]: matches none of the Tucker layers "
                    f"{', '.join(candidates)}"
                )
        groups = self._groups(candidates)
        for pattern, policy in self.policies.items():
            if not any(policy is used for used, _ in groups):
                raise NothingMatchedError(
                    f"rank_policy[{pattern!r}]: earlier patterns take all of its layers; put it "
                    "before them"
                )
        for policy, group in groups:
            policy.check(group)

    def settled(self) -> ByName:
        """What the policy of each layer says."""
        return ByName({pattern: policy.settled() for pattern, policy in self.policies.items()})

    def _groups(
        self, candidates: Mapping[str, Candidate]
    ) -> list[tuple[RankPolicy, dict[str, Candidate]]]:
        patterns = [next((p for p in self.policies if fnmatchcase(n, p)), None) for n in candidates]
        layers = list(zip(patterns, candidates.items(), strict=True))
        return [
            (
                FixedRank() if pattern is None else self.policies[pattern],
                {name: candidate for its, (name, candidate) in layers if its == pattern},
            )
            for pattern in dict.fromkeys(patterns)
        ]


# A step to the next smaller rank: its price, the layer, the modes, their rank before and after, and
# the parameters saved. The first three put cuts in order.
_Cut: TypeAlias = tuple[float, int, tuple[int, ...], int, int, int]


class _Share:
    """What a layer has under a budget: its ranks, and what it costs to cut them."""

    def __init__(
        self, name: str, candidate: Candidate, policy: ParameterBudget, sensitivity: float
    ) -> None:
        self.candidate, self.bounds = candidate, policy
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
        return _parameters(self.ranks, self.candidate)

    def change(self, group: tuple[int, ...], rank: int) -> None:
        """Set the rank of a group."""
        for mode in group:
            self.ranks[mode] = rank

    def cuts(self, layer: int) -> Iterator[_Cut]:
        """Every cut down to the smallest ranks, the cheapest first; the ranks stay as they are.

        The price is the worth of what goes per parameter saved, with the cuts before it made.
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
        """Ranks before and after each cut, the worth of what goes, sum of n_i, and 1 for a matrix.

        From r to s a mode saves (r - s) (n_i + c / r) of the core's c parameters and its own; the
        two modes of a matrix, where c = r^2, save (r - s) (n_1 + n_2 + c / r + s).
        """
        values, step = self.values[group], self.bounds.multiple_of
        lowest = _smallest_rank(self.bounds, len(values))
        size = sum(self.candidate.shape[mode] for mode in group)
        rank = self.ranks[group[0]]
        while rank > lowest:
            smaller = max((rank - 1) // step * step, lowest)
            yield rank, smaller, sum(values[smaller:rank]), size, len(group) - 1
            rank = smaller


def _rank_groups(candidate: Candidate) -> list[tuple[int, ...]]:
    """Modes that share a rank: a matrix has one, which its two modes lose together."""
    modes = candidate.modes
    together = len(candidate.shape) == 2 and len(modes) == 2
    return [tuple(modes)] if together else [(mode,) for mode in modes]


def _smallest_ranks(bounds: ParameterBudget, candidate: Candidate) -> list[int]:
    ranks = list(candidate.shape)
    for group in _rank_groups(candidate):
        rank = _smallest_rank(bounds, min(candidate.shape[mode] for mode in group))
        for mode in group:
            ranks[mode] = rank
    return ranks


def _spend(shares: Sequence[_Share], limit: float) -> None:
    """Cut ranks, cheapest first, until all layers together have no more parameters than limit.

    The last cut may save more than it has to; what then fits again is taken back, dearest first.
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


def _parameters(ranks: Sequence[int], candidate: Candidate) -> int:
    factors = sum(candidate.shape[mode] * ranks[mode] for mode in candidate.modes)
    return math.prod(ranks) + factors


def _dense_parameters(candidates: Mapping[str, Candidate]) -> int:
    return sum(math.prod(candidate.shape) for candidate in candidates.values())


def _value(number: float | Schedule, step: int) -> float:
    return number.value(step) if isinstance(number, Schedule) else number


def _smallest_rank(bounds: ParameterBudget, size: int) -> int:
    rank = math.ceil(bounds.min_rank / bounds.multiple_of) * bounds.multiple_of
    return min(rank, size, bounds.max_rank or size)


def _check_range(name: str, number: object, expected: str, holds: Callable[[float], bool]) -> None:
    values = number.extremes if isinstance(number, Schedule) else (number,)
    for value in values:
        ordinary = isinstance(value, int | float) and not isinstance(value, bool)
        if not ordinary or not holds(value):  # type: ignore[arg-type]  # NaN fails, too
            raise RankError(f"{name}: got {number!r}, expected {expected}")


def _check_bounds(bounds: RelativeTolerance | ParameterBudget) -> None:
    for name in ("min_rank", "multiple_of"):
        _check_positive_integer(name, getattr(bounds, name))
    if bounds.max_rank is not None:
        _check_positive_integer("max_rank", bounds.max_rank)
        if bounds.max_rank < bounds.min_rank:
            raise RankError(
                f"max_rank: got {bounds.max_rank}, below min_rank={bounds.min_rank}; "
                "raise max_rank or lower min_rank"
            )
    expected = "a share of at least 0, such as 0.25"
    _check_range("spare", bounds.spare, expected, lambda x: 0 <= x < math.inf)


RankSpec: TypeAlias = float | int | Sequence[int] | Literal["full"] | RelativeTolerance

_EXPECTED = (
    "a fraction in (0, 1], a positive int, a tuple with one rank per mode, 'full' "
    "or a RelativeTolerance"
)


def initial_cutoff(spec: RankSpec, shape: Sequence[int]) -> Cutoff:
    """Truncation that a user's rank means for a weight.

    A fraction applies to the channel modes (the first two; at least 1), and the other modes and
    modes of size 4 or less start full. An int is clipped to each mode. A tuple is taken as it is.

    Args:
        spec: The rank.
        shape: (n_1, ..., n_d) of the weight.

    Raises:
        RankError: The rank is not one of the above, not positive, or larger than its mode.
    """
    if isinstance(spec, RelativeTolerance):
        return spec.cutoff(shape)
    return Cutoff(explicit_ranks(spec, shape))


def explicit_ranks(spec: object, shape: Sequence[int]) -> tuple[int, ...]:
    """Ranks that a fraction, an int, a tuple or 'full' means for a weight of the given shape.

    Raises:
        RankError: The rank is none of these, not positive, or larger than its mode.
    """
    if spec == "full":
        return tuple(shape)
    if isinstance(spec, float):
        if not 0 < spec <= 1:
            raise RankError(f"rank: got the fraction {spec}, expected {_EXPECTED}")
        return tuple(
            max(1, math.floor(spec * n + 0.5)) if mode < 2 and n > SMALL_MODE else n
            for mode, n in enumerate(shape)
        )
    if isinstance(spec, int) and not isinstance(spec, bool):
        if spec < 1:
            raise RankError(f"rank: got {spec}, expected {_EXPECTED}")
        return tuple(min(spec, n) for n in shape)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _tuple_ranks(spec, shape)
    raise RankError(f"rank: got {spec!r}, expected {_EXPECTED}")


def _tuple_ranks(spec: Sequence[object], shape: Sequence[int]) -> tuple[int, ...]:
    if len(spec) != len(shape):
        raise RankError(
            f"rank: got {len(spec)} ranks {tuple(spec)} for a weight of {len(shape)} modes "
            f"{tuple(shape)}; give one rank per mode"
        )
    ranks = []
    for mode, (rank, size) in enumerate(zip(spec, shape, strict=True)):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
            raise RankError(
                f"rank: got {rank!r} for mode {mode} of size {size}, expected an int from 1 "
                f"to {size}"
            )
        ranks.append(rank)
    return tuple(ranks)


def _check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RankError(f"{name}: got {value!r}, expected an int of at least 1")
