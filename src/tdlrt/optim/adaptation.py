"""In which steps ranks are examined, and by which policy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from tdlrt.optim.examination import Examined, Moved, examine
from tdlrt.optim.finite import Finite, Given
from tdlrt.optim.slot import LayerSlot
from tdlrt.ranks import Candidate, FixedRank, RankPolicy

__all__ = ["Adaptation"]

# Without adapt_every, ranks are examined in each of the first steps, in which they change fast, and
# every ten steps afterwards: docs/results.md shows the effect of other periods.
_EARLY_STEPS = 100
_LATER_EVERY = 10

# After so many steps in which a layer's ranks were not examined, the user gets a warning.
_LONG_WITHOUT_ADAPTATION = 1000


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
        steps: Moved,
        curvatures: Sequence[Tensor],
        finite: Finite,
        given: Given,
        ranks_before: Mapping[str, Sequence[int]],
    ) -> list[Examined]:
        """Choose the ranks of all layers of the step under way, see `examination.examine`.

        Args:
            steps: The layers that have moved.
            curvatures: Mean squares of their gradients, this step's included.
            finite: Refuses results that are not finite.
            given: See `Finite.given`.
            ranks_before: Ranks before the step, where the layers have others now.

        Raises:
            NonFiniteError: As `finite` says; nothing was changed.
        """
        moved = {slot.name for members, _ in steps for slot in members.slots}
        candidates = {name: self._candidate(name) for name in self._slots}
        for name, candidate in candidates.items():
            ranks = tuple(ranks_before.get(name, candidate.ranks))
            candidates[name] = candidate._replace(ranks=ranks, resting=name not in moved)
        number = self.steps + 1
        return examine(self.policy, number, candidates, steps, curvatures, finite, given)

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


def _level_of_the_user() -> int:
    """Which `stacklevel` names the line outside torch and this package that led to the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _package(frame) in ("tdlrt", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
