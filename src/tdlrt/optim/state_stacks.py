"""The state of the layers of a batch in stacks, of which the optimiser's state holds views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tdlrt.linalg import Layout
from tdlrt.optim.packing import scalars, zero_stacks
from tdlrt.optim.rules import Rule
from tdlrt.optim.slot import BASIS_CORE, MASTER, LayerSlot, OptimizerState

__all__ = ["StateStacks"]


class StateStacks:
    """Moments, numbers of steps and masters of the layers of a batch, zero-padded in stacks.

    Between the passes of `bug` the moments are the core's alone. While bases rest, the optimiser's
    state holds the core of their last step, too: the bases' parts of the moments stand in its rows.

    Args:
        slots: The layers.
        layout: Their true sizes.
        rule: The optimiser's rule; only the names of its state matter here.
        state: The optimiser's state, changed in place.
        weights: The stacks of the weights.
        views: The members' views of them.

    Attributes:
        moments: Stacks by name: one of the cores and, at rest, one for each basis.
        steps: Steps of each layer, B numbers.
        basis_cores: Cores of the last step that moved the bases; None where they do not rest.
    """

    def __init__(
        self,
        slots: Sequence[LayerSlot],
        layout: Layout,
        rule: type[Rule],
        state: OptimizerState,
        weights: Sequence[Tensor],
        views: Sequence[list[Tensor]],
    ) -> None:
        self._slots, self._layout, self._rule, self._state = slots, layout, rule, state
        self._weights = weights
        # Parameters smaller than the stacks are weights after rounding; those before it are state.
        exact = slots[0].layer.core.dtype == weights[0].dtype
        self._masters = [{} if exact else {MASTER: own} for own in views]
        steps = [slot.steps(state) for slot in slots]
        self.steps = scalars(steps, torch.float32, 0.0, layout.device)
        self.moments: dict[str, list[Tensor]] = {}
        self.basis_cores: Tensor | None = None
        self._views: list[dict[str, list[Tensor]]] = []
        self._read()

    @property
    def core_alone(self) -> bool:
        """Whether there are moments of the cores and none of the bases."""
        return any(len(stacks) == 1 for stacks in self.moments.values())

    def is_current(self) -> bool:
        """Whether the optimiser's state still consists of the views."""
        counts = int(self._rule.counts_steps and bool(self.moments))
        for slot, views in zip(self._slots, self._views, strict=True):
            for number, parameter in enumerate(slot.parameters):
                own = self._state.get(parameter, {})
                wanted = {name: of[number] for name, of in views.items() if number < len(of)}
                if len(own) != len(wanted) + (0 if number else counts):
                    return False
                if any(own.get(name) is not view for name, view in wanted.items()):
                    return False
        return True

    def _read(self) -> None:
        cores = [slot.moments(self._state, [BASIS_CORE]).get(BASIS_CORE) for slot in self._slots]
        names = self._rule.first_moments + self._rule.second_moments
        found = [slot.moments(self._state, names) for slot in self._slots]
        self.make(found[0], core_alone=any(len(of) == 1 for of in found[0].values()))
        for name in self.moments:
            views = [view for of in self._views for view in of[name]]
            torch._foreach_copy_(views, [moment for of in found for moment in of[name]])
        if any(cores):
            self.rest_bases()
            for own, core in zip(self._views, cores, strict=True):
                if core:
                    own[BASIS_CORE][0].copy_(core[0])

    def make(self, names: Iterable[str], *, core_alone: bool = False) -> None:
        """Make stacks for moments, of zeros where they are new, and publish views of them."""
        past, past_views = self.moments, self._views
        self.moments, self._views = {}, [dict(of) for of in self._masters]
        for name in names:
            if len(past.get(name, ())) == (1 if core_alone else len(self._weights)):
                self.moments[name], views = past[name], [of[name] for of in past_views]
            else:
                self.moments[name], views = zero_stacks(
                    self._layout, self._weights[0].dtype, core_alone=core_alone
                )
            for own, of in zip(self._views, views, strict=True):
                own[name] = of
        if self.basis_cores is not None:
            for own, before in zip(self._views, past_views, strict=True):
                own[BASIS_CORE] = before[BASIS_CORE]
        counted = self._rule.counts_steps and bool(self.moments)
        for place, (slot, mine) in enumerate(zip(self._slots, self._views, strict=True)):
            slot.set_moments(self._state, mine, self.steps[place] if counted else None)

    def rest_bases(self) -> None:
        """Keep the present cores: the moments refer to them while the bases rest."""
        (self.basis_cores,), views = zero_stacks(
            self._layout, self._weights[0].dtype, core_alone=True
        )
        self.basis_cores.copy_(self._weights[0])
        for slot, own, of in zip(self._slots, self._views, views, strict=True):
            own[BASIS_CORE] = of
            self._state[slot.layer.core][BASIS_CORE] = of[0]

    def wake_bases(self) -> None:
        """Drop them: the moments refer to the present cores."""
        self.basis_cores = None
        for slot, own in zip(self._slots, self._views, strict=True):
            if own.pop(BASIS_CORE, None):
                del self._state[slot.layer.core][BASIS_CORE]
