"""The batches of an optimiser: how they are made, and how results reach the layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from tdlrt.linalg import TangentSpace
from tdlrt.nn.layer import resize_layers_
from tdlrt.optim.batch import Batch
from tdlrt.optim.members import Members, members_of
from tdlrt.optim.packing import member_views
from tdlrt.optim.partition import partition, work
from tdlrt.optim.rules import Rule
from tdlrt.optim.slot import MASTER, LayerSlot, OptimizerState
from tdlrt.optim.steps import Iterate, Lifted

__all__ = ["Batches"]


class Batches:
    """The batches of an optimiser, made anew when ranks, groups or somebody else's changes ask.

    Args:
        slots: All layers by name.
        rule: The optimiser's rule.
        state: The optimiser's state.
        curvatures: Mean squares of the gradients by layer.
        group_of: Index of the param_group of each layer.

    Attributes:
        ranks_before: Ranks at rest of layers that are between the passes of `bug`: these, not the
            larger ones that they have there, say which layers form a batch.
        work: Multiply-adds of the step of a process, roughly; 0 before the first.
        generation: Counts what makes batches go: stacks stay where they are in between.
    """

    def __init__(
        self,
        slots: Mapping[str, LayerSlot],
        rule: type[Rule],
        state: OptimizerState,
        curvatures: MutableMapping[str, Tensor],
        group_of: Mapping[str, int],
    ) -> None:
        self.slots, self._rule = dict(slots), rule
        self._state, self._curvatures, self._group_of = state, curvatures, group_of
        self.ranks_before: Mapping[str, Sequence[int]] = {}
        self.generation = 0
        self.work = 0.0
        self._batches: list[Batch] = []
        self._within: dict[str, tuple[bool, int]] = {}
        # Spaces that a step has left at weights of new ranks, until their batches are made.
        self._left: dict[tuple[str, ...], TangentSpace] = {}

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return next(iter(self.slots.values())).layer.core.device

    def select(
        self, names: Collection[str], owners: Mapping[str, int] | None = None
    ) -> list[Members]:
        """The batches with some layers, up to date.

        Batches depend on what there is, not on what was before, so that a training that goes on
        from a checkpoint takes the same steps to the last bit.

        Args:
            names: The layers that take part in a step.
            owners: Process of each layer, by default the same of all. A batch has layers of one, so
                that batches are the same on all processes. All layers are in batches, except those
                that neither require a gradient nor have a state.
        """
        self._left = {}  # of a step that failed while its results were put in place
        concerned = self._concerned(names, owners or {})
        if self._within != concerned or not self._are_current():
            self.bring_up_to_date()
            self._make(concerned)
        found = [members for b in self._batches if (members := members_of(b, names)) is not None]
        for members in found:
            members.batch.refresh()
        return found

    def settle(self, owners: Mapping[str, int]) -> None:
        """Make the batches of the next step now, right after the weights were written.

        So the bases that the state belongs to are known when somebody else writes others.

        Args:
            owners: See `select`.
        """
        spaces, self._left = self._left, {}
        if not self._within or not self._are_current():
            turned = {b.slots[place].name for b in self._batches for place in b.turned}
            known = {slot.name for b in self._batches for slot in b.slots} - turned
            self._make(self._concerned(self._within, owners), known, spaces)

    def _are_current(self) -> bool:
        return all(batch.is_current() for batch in self._batches)

    def _concerned(
        self, names: Collection[str], owners: Mapping[str, int]
    ) -> dict[str, tuple[bool, int]]:
        """The layers that batches are made of: whether they require gradients, and their owners.

        Frozen ones with a state are among them: a batch knows the bases that the state belongs to.
        """
        taking_part = {*names, *self.ranks_before}
        cores = {name: slot.layer.core for name, slot in self.slots.items()}
        return {
            name: (core.requires_grad, owners.get(name, 0))
            for name, core in cores.items()
            if name in taking_part or core.requires_grad or self._state.get(core)
        }

    def changes(self, chosen: Iterable[Members] | None = None) -> Tensor:
        """Differences of the weights from those after the last step, see `Given`.

        Args:
            chosen: The layers to compare. All by default, as a step needs that may change ranks:
                for these, batches are made of all layers.
        """
        if chosen is None:
            self.refresh()
        compared = self._batches if chosen is None else [members.batch for members in chosen]
        found = [change for batch in compared for change in batch.changes()]
        return torch.stack(found) if found else torch.zeros(0, device=self.device)

    def _planned_ranks(self, slot: LayerSlot) -> Sequence[int]:
        return self.ranks_before.get(slot.name, slot.layer.ranks)

    def _make(
        self,
        names: dict[str, tuple[bool, int]],
        orthonormal: Collection[str] = (),
        spaces: Mapping[tuple[str, ...], TangentSpace] | None = None,
    ) -> None:
        """Make the batches of some layers; those that stay the same stay as they are.

        Args:
            names: See `_concerned`.
            orthonormal: Those whose bases need no check.
            spaces: Tangent spaces at the present weights of some batches.
        """
        past, batches = [b for b in self._batches if b.is_current()], []
        keyed: dict[tuple[object, ...], list[LayerSlot]] = {}
        for name, (_, owner) in names.items():
            key = (owner, *self._key(self.slots[name]))
            keyed.setdefault(key, []).append(self.slots[name])
        for slots in keyed.values():
            for part in partition(slots, self._planned_ranks):
                part = [slot for slot in slots if slot in part]  # in an order that stays
                same = next((batch for batch in past if batch.slots == part), None)
                group = self._group_of[part[0].name]
                batch = same or Batch(
                    *(part, group, self._rule, self._state, self._curvatures),
                    space=(spaces or {}).get(tuple(slot.name for slot in part)),
                    written=not all(slot.name in orthonormal for slot in part),
                )
                batches.append(batch)
        self._batches, self._within = batches, names
        loads: dict[int, float] = {}
        for name, (_, owner) in names.items():
            layer = self.slots[name].layer
            loads[owner] = loads.get(owner, 0.0) + work([(layer.shape, layer.ranks)])
        self.work = max(loads.values(), default=0.0)
        self.generation += 1

    def refresh(self) -> None:
        """Bring the state to the weights, where these were written from outside."""
        for batch in self._batches:
            if batch.is_current():
                batch.refresh()

    def bring_up_to_date(self) -> None:
        """Do the same also where weights were written without a change of their version."""
        self.refresh()
        self.reread()

    def reread(self) -> None:
        """Read weights again that were written without a change of their version."""
        for batch in self._batches:
            if batch.is_current() and batch.differs():
                batch.reread()

    def forget(self) -> None:
        """Make all batches again from the layers."""
        self._batches, self._within, self._left = [], {}, {}
        self.generation += 1

    def _key(self, slot: LayerSlot) -> tuple[object, ...]:
        """What the layers of a batch have in common."""
        layer = slot.layer
        names = self._rule.first_moments + self._rule.second_moments
        found = slot.moments(self._state, names)
        return (
            layer.learned_modes,
            len(layer.shape),
            layer.core.dtype,
            layer.core.device,
            layer.core.requires_grad,
            self._group_of[slot.name],
            tuple((name, len(found[name])) for name in names if name in found),
        )

    def assign(
        self, members: Members, result: Iterate | Lifted, ranks: Sequence[Sequence[int]]
    ) -> None:
        """Put a step's results in place: the one resize of layers and state together.

        Args:
            members: The layers.
            result: Their weights and state, of any ranks.
            ranks: The ranks.
        """
        batch = members.batch
        if batch.has_room(result, members.places, ranks):
            batch.store(result, members.places, members.index)
            return
        _write_out(members, result, ranks, self._state, self._rule)
        for place in members.places:
            batch.turned.pop(place, None)
        self.generation += 1
        if isinstance(result, Iterate):
            self._left[tuple(slot.name for slot in members.slots)] = result.space


def _write_out(
    members: Members,
    result: Iterate | Lifted,
    ranks: Sequence[Sequence[int]],
    state: OptimizerState,
    rule: type[Rule],
) -> None:
    """Write weights and state of any ranks to the layers and the optimiser's state."""
    layout, slots = members.batch.layout, members.slots
    if isinstance(result, Lifted):
        stacks = [result.core, *(f for f in result.factors if f is not None)]
        moments = {name: [moment] for name, moment in result.moments.items()}
    else:
        factors = {mode: result.space.factor(mode) for mode in layout.modes}
        stacks = [result.space.core, *factors.values()]
        still = {mode: torch.zeros_like(factor) for mode, factor in factors.items()}
        moments = {
            name: [moment.core, *(still | dict(moment.parts)).values()]
            for name, moment in result.moments.items()
        }
    if slots[0].layer.core.dtype != stacks[0].dtype:
        moments[MASTER] = stacks
    numbered = list(zip(range(len(slots)), members.places, ranks, strict=True))
    resize_layers_(
        [slot.layer for slot in slots],
        [member_views(stacks, layout, place, own, number) for number, place, own in numbered],
    )
    steps = result.steps.to(torch.float32)
    for (number, place, own), slot in zip(numbered, slots, strict=True):
        views = {n: member_views(of, layout, place, own, number) for n, of in moments.items()}
        counted = rule.counts_steps and bool(result.moments)
        slot.set_moments(state, views, steps[number] if counted else None)
