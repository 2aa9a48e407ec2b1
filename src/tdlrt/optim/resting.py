"""Bases that move in one step of so many, and cores in every one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tdlrt.optim.members import Members
from tdlrt.optim.slot import LayerSlot, OptimizerState

__all__ = ["RestingBases"]


class RestingBases:
    """Which layers move their cores alone in the step under way.

    Args:
        slots: The layers by name.
        every: The bases of a layer move in one of so many of its steps.
    """

    def __init__(self, slots: Mapping[str, LayerSlot], every: int) -> None:
        self._slots, self._every = slots, every
        self._since: dict[str, int] = {}  # steps since the bases moved
        self._taken: dict[str, int] = {}  # steps that moved them, of layers that have rested

    def names(self, active: Collection[str]) -> Collection[str]:
        """Those of the layers whose bases rest in the step under way: all of them, or none.

        Args:
            active: Layers that have a gradient.
        """
        # All together, so that there are steps in which none rests.
        due = any(self._since.get(name, self._every) + 1 >= self._every for name in active)
        return () if due else active

    def end_step(
        self, active: Collection[str], resting: Collection[str], state: OptimizerState
    ) -> None:
        """Count a step.

        Args:
            active: Layers that have moved.
            resting: Those of them whose bases have not.
            state: The optimiser's state.
        """
        if self._every == 1:
            return
        for name in active:
            if name not in resting:
                self._since[name] = 0
                if name in self._taken:
                    self._taken[name] += 1
                continue
            self._since[name] += 1
            if name not in self._taken:
                steps = self._slots[name].steps(state)  # with this one
                self._taken[name] = 0 if steps is None else int(steps) - 1

    def steps_taken(self, members: Members, steps: Tensor) -> Tensor | None:
        """Steps that moved the bases of each layer; None where all steps of all layers did.

        Args:
            members: The layers.
            steps: Steps of each layer.
        """
        taken = [self._taken.get(slot.name, math.nan) for slot in members.slots]
        if all(math.isnan(count) for count in taken):
            return None
        known = torch.tensor(taken, dtype=steps.dtype, device=steps.device)
        return torch.where(known.isnan(), steps, known)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """What a training that goes on must know, by layer."""
        return {"since": dict(self._since), "taken": dict(self._taken)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what `state_dict` gave."""
        self._since, self._taken = dict(state.get("since", {})), dict(state.get("taken", {}))
