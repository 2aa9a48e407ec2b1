"""In which steps ranks are examined, and the ranks that the policy chooses then."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg import (
    Cutoff,
    Layout,
    Truncation,
    possible_ranks,
    relative_spectrum,
    truncate_stack,
)
from tdlrt.optim.finite import Finite, Given
from tdlrt.optim.members import Members
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.steps import Augmented, Lifted
from tdlrt.ranks import Candidate, FixedRank, RankPolicy

__all__ = ["Adaptation", "Examined"]

# Without adapt_every, ranks are examined in each of the first steps, in which they change fast, and
# every ten steps afterwards: docs/results.md shows the effect of other periods.
_EARLY_STEPS = 100
_LATER_EVERY = 10

# After so many steps in which a layer's ranks were not examined, the user gets a warning.
_LONG_WITHOUT_ADAPTATION = 1000


class Examined(NamedTuple):
    """Layers after a step, with the ranks that they are to keep.

    Attributes:
        members: The layers.
        step: Their weights and state in augmented bases.
        truncation: How the cores are cut.
        layout: The true sizes afterwards.
    """

    members: Members
    step: Augmented | Lifted
    truncation: Truncation
    layout: Layout


class Adaptation:
    """The policy that applies to the step under way, and its choice of ranks.

    Args:
        policy: The user's policy.
        slots: The layers by name.
        adapt_every: Ranks are examined every so many steps; None for every one of the first 100,
            and every tenth after them.

    Attributes:
        steps: Whole steps taken.
        frozen: Whether the ranks stay fixed from now on.
        settling: Whether they are truncated a last time at the end of the step under way.
        postponed: Whether an examination was due in a step in which bases rested.
        curvatures: Mean squares of the gradients by layer.
    """

    def __init__(
        self, policy: RankPolicy, slots: Mapping[str, LayerSlot], adapt_every: int | None
    ) -> None:
        self._slots, self._every = slots, adapt_every
        self.check(policy)
        self.rank_policy = policy
        self.steps = 0
        self.frozen = False
        self.settling = False
        self.postponed = False
        self.curvatures: dict[str, Tensor] = {}
        self._examined = dict.fromkeys(slots, 0)
        self._warned = False

    def check(self, policy: RankPolicy) -> None:
        """Refuse a policy that the layers cannot meet."""
        policy.check({name: self._candidate(name) for name in self._slots})

    @property
    def policy(self) -> RankPolicy:
        """The policy of the step under way."""
        if self.settling:
            return self.rank_policy.settled()
        step = self.steps + 1
        if self._every is None:
            due = step <= _EARLY_STEPS or step % _LATER_EVERY == 0
        else:
            due = step % self._every == 0
        due = due or self.postponed
        return self.rank_policy if due and not self.frozen else FixedRank()

    @property
    def examines(self) -> bool:
        """Whether ranks may change in the step under way."""
        return not isinstance(self.policy, FixedRank)

    @property
    def is_joint(self) -> bool:
        """Whether the step under way needs the spectra of all layers."""
        return self.examines and self.policy.needs_spectra

    @property
    def trained(self) -> list[str]:
        """Layers that require a gradient, or have had one; others are left as they are."""
        return [
            name
            for name, slot in self._slots.items()
            if slot.layer.core.requires_grad or name in self.curvatures
        ]

    @property
    def observes(self) -> bool:
        """Whether the curvatures are still needed."""
        return not self.frozen or self.settling

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on must know."""
        return {
            "steps": self.steps,
            "frozen": self.frozen,
            "settling": self.settling,
            "postponed": self.postponed,
            "curvatures": {name: value.clone() for name, value in self.curvatures.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.steps, self.frozen = state["steps"], state["frozen"]
        self.settling, self.postponed = state["settling"], state.get("postponed", False)
        self.curvatures.clear()
        self.curvatures.update(state.get("curvatures", {}))
        self._examined = dict.fromkeys(self._slots, self.steps)

    def end_step(self, examined: Iterable[str], *, postponed: bool = False) -> None:
        """Count a whole step in which the ranks of these layers were examined, or were to be."""
        self.steps += 1
        self.postponed = postponed
        self._examined |= dict.fromkeys(examined, self.steps)
        self._warn_if_never_examined()

    def examine(
        self,
        steps: Sequence[tuple[Members, Augmented | Lifted]],
        curvatures: Sequence[Tensor],
        finite: Finite,
        given: Given,
        ranks_before: Mapping[str, Sequence[int]],
    ) -> list[Examined]:
        """Choose the ranks of all layers of a step, with one transfer to the host.

        Args:
            steps: Layers with their weights in augmented bases.
            curvatures: Mean squares of their gradients, this step's included.
            finite: Refuses results that are not finite.
            given: See `Finite.given`.
            ranks_before: Ranks before the step, where the layers have others now.

        Raises:
            NonFiniteError: As `finite` says; nothing was changed.
        """
        policy = self.policy
        sizes = [members.sizes_after(step) for members, step in steps]
        candidates = {name: self._candidate(name)._replace(resting=True) for name in self._slots}
        available: list[Sequence[Sequence[int]]] = []
        if policy.needs_spectra:
            available = self._read_spectra(steps, curvatures, finite, given, sizes, candidates)
        for name, ranks in ranks_before.items():
            candidates[name] = candidates[name]._replace(ranks=tuple(ranks))
        for members, _ in steps:
            for slot in members.slots:
                candidates[slot.name] = candidates[slot.name]._replace(resting=False)
        asked = (
            candidates
            if policy.needs_spectra
            else {
                slot.name: candidates[slot.name] for members, _ in steps for slot in members.slots
            }
        )
        cutoffs = policy.cutoffs(asked, self.steps + 1)
        own = [[cutoffs[slot.name] for slot in members.slots] for members, _ in steps]
        truncations = [
            truncate_stack(step.core, step.ranks, cuts, members.layout.modes)
            for (members, step), cuts in zip(steps, own, strict=True)
        ]
        if available and all(cut.tau == 0 for cuts in own for cut in cuts):
            kept = [
                [
                    _explicit(cut, ranks, members.layout.modes)
                    for cut, ranks in zip(cuts, of, strict=True)
                ]
                for (members, _), cuts, of in zip(steps, own, available, strict=True)
            ]
        else:
            read = finite.check(given, sizes, [t.ranks for t in truncations])
            kept = [_ranks(numbers, len(cuts)) for numbers, cuts in zip(read, own, strict=True)]
        return [
            _fitting(members, step, truncation, ranks)
            for (members, step), truncation, ranks in zip(steps, truncations, kept, strict=True)
        ]

    def _read_spectra(
        self,
        steps: Sequence[tuple[Members, Augmented | Lifted]],
        curvatures: Sequence[Tensor],
        finite: Finite,
        given: Given,
        sizes: Sequence[Tensor],
        candidates: dict[str, Candidate],
    ) -> list[Sequence[Sequence[int]]]:
        """Bring singular values, norms and curvatures of all layers to the host."""
        wanted, layers = [], []
        for (members, step), curvature in zip(steps, curvatures, strict=True):
            modes = members.layout.modes
            decided = modes[:1] if _is_matrix(members.layout) else modes
            spectra = [relative_spectrum(step.core, mode) for mode in decided]
            wanted += [step.ranks, _core_norms(step.core), curvature, *spectra]
            layers.append((members, decided))
        numbers = iter(finite.check(given, sizes, wanted))
        available: list[Sequence[Sequence[int]]] = []
        for members, decided in layers:
            count = len(members.places)
            ranks = _ranks(next(numbers), count)
            norms, curves = next(numbers), next(numbers)
            tables = {mode: _rows(next(numbers), count) for mode in decided}
            for number, slot in enumerate(members.slots):
                own = {
                    mode: tables[mode if mode in tables else decided[0]][number][
                        : ranks[number][mode]
                    ]
                    for mode in members.layout.modes
                }
                seen = curves[number]
                candidates[slot.name] = candidates[slot.name]._replace(
                    available=tuple(ranks[number]),
                    squared_norm=norms[number] ** 2,
                    spectra=own,
                    curvature=None if math.isnan(seen) else seen,
                )
            available.append(ranks)
        return available

    def _candidate(self, name: str) -> Candidate:
        layer = self._slots[name].layer
        return Candidate(
            *(layer.ranks, layer.ranks, layer.shape, layer.learned_modes),
            frozen=not layer.core.requires_grad,
        )

    def _warn_if_never_examined(self) -> None:
        if self._warned or self.frozen or isinstance(self.rank_policy, FixedRank):
            return
        idle = [
            name
            for name, step in self._examined.items()
            if self.steps - step >= _LONG_WITHOUT_ADAPTATION
        ]
        if idle:
            self._warned = True
            every = self._every or _LATER_EVERY
            warnings.warn(
                f"the ranks of {', '.join(idle)} have not been examined for "
                f"{_LONG_WITHOUT_ADAPTATION} steps (adapt_every={every}); lower "
                "adapt_every, check that these layers get a gradient, or call freeze_ranks()",
                stacklevel=_level_of_the_user(),
            )


def _core_norms(core: Tensor) -> Tensor:
    """||C|| of each member of a stack, B numbers in float64."""
    norms: Tensor = torch.linalg.vector_norm(core.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _is_matrix(layout: Layout) -> bool:
    return len(layout.columns) == 2 and len(layout.modes) == 2


def _explicit(cutoff: Cutoff, available: Sequence[int], modes: Collection[int]) -> tuple[int, ...]:
    """Ranks that a cut-off without a tolerance keeps."""
    kept = [
        min(rank, limit) if mode in modes else rank
        for mode, (rank, limit) in enumerate(zip(available, cutoff.limits, strict=True))
    ]
    return (min(kept),) * 2 if len(kept) == 2 and len(modes) == 2 else tuple(kept)


def _fitting(
    members: Members, step: Augmented | Lifted, truncation: Truncation, ranks: list[tuple[int, ...]]
) -> Examined:
    """The truncation with ranks that fit together, r_i <= prod_{j != i} r_j."""
    layout = members.layout
    possible = [possible_ranks(of, layout.modes) for of in ranks]
    if possible != ranks:
        again = truncate_stack(
            truncation.core, truncation.ranks, [Cutoff(limits=of) for of in possible], layout.modes
        )
        projections = tuple(
            first if first is None or second is None else first @ second
            for first, second in zip(truncation.projections, again.projections, strict=True)
        )
        truncation = Truncation(again.core, projections, again.ranks)
    target = Layout(layout.sizes, possible, layout.modes, layout.device)
    return Examined(members, step, truncation, target)


def _rows(numbers: Sequence[float], count: int) -> list[Sequence[float]]:
    """A flat table as `count` rows."""
    width = len(numbers) // max(1, count)
    return [numbers[width * n : width * (n + 1)] for n in range(count)]


def _ranks(numbers: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """Ranks of `count` members from a flat table of them."""
    return [tuple(map(int, row)) for row in _rows(numbers, count)]


def _level_of_the_user() -> int:
    """Which `stacklevel` names the line outside torch and this package that led to the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _package(frame) in ("tdlrt", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
