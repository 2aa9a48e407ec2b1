"""The batches of an optimiser: how they are made, and how results reach the layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from tdlrt.linalg import TangentSpace
from tdlrt.nn.layer import resize_layers_
from tdlrt.optim.batch import Batch, Versions
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
        work: Multiply-adds of a step of all layers, roughly; 0 before the first.
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
        self._within: tuple[str, ...] = ()
        # What the last step left: spaces, and the parameters' versions that they belong to.
        self._left: dict[tuple[str, ...], tuple[TangentSpace | None, Versions]] = {}

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return next(iter(self.slots.values())).layer.core.device

    def select(
        self, names: Collection[str], within: Collection[str] | None = None
    ) -> list[Members]:
        """The batches with some layers, up to date.

        Batches depend on what there is, not on what was before, so that a training that goes on
        from a checkpoint takes the same steps to the last bit.

        Args:
            names: The layers that take part in a step.
            within: The layers that batches are made of: by default all that require gradients.
        """
        everything = self.slots if within is None else within
        taking_part = {*names, *self.ranks_before}
        trained = [
            n for n in everything if n in taking_part or self.slots[n].layer.core.requires_grad
        ]
        if self._within != tuple(trained) or not all(b.is_current() for b in self._batches):
            self.refresh()
            self._make(tuple(trained))
        found = [members for b in self._batches if (members := members_of(b, names)) is not None]
        for members in found:
            members.batch.refresh()
        return found

    def changes(self, chosen: Iterable[Members]) -> Tensor:
        """Differences of the weights from those after the last step, see `Given`."""
        found = [change for members in chosen for change in members.batch.changes()]
        return torch.stack(found) if found else torch.zeros(0, device=self.device)

    def _planned_ranks(self, slot: LayerSlot) -> Sequence[int]:
        return self.ranks_before.get(slot.name, slot.layer.ranks)

    def _make(self, names: tuple[str, ...]) -> None:
        self._batches = []
        keyed: dict[tuple[object, ...], list[LayerSlot]] = {}
        for name in names:
            keyed.setdefault(self._key(self.slots[name]), []).append(self.slots[name])
        for slots in keyed.values():
            for part in partition(slots, self._planned_ranks):
                part = [slot for slot in slots if slot in part]  # in an order that stays
                group = self._group_of[part[0].name]
                space, versions = self._left.get(tuple(s.name for s in part), (None, []))
                written = versions != [slot.versions() for slot in part]
                batch = Batch(
                    *(part, group, self._rule, self._state, self._curvatures),
                    space=None if written else space,
                    written=written,
                )
                self._batches.append(batch)
        self._within, self._left = names, {}
        layers = (self.slots[name].layer for name in names)
        self.work = sum(work([(layer.shape, layer.ranks)]) for layer in layers)
        self.generation += 1

    def refresh(self) -> None:
        """Bring the state to the weights, where these were written from outside."""
        for batch in self._batches:
            if batch.is_current():
                batch.refresh()

    def reread(self) -> None:
        """Read weights again that were written without a change of their version."""
        for batch in self._batches:
            if batch.differs():
                batch.reread()

    def forget(self) -> None:
        """Make all batches again from the layers when they are next needed."""
        self._batches, self._within, self._left = [], (), {}
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
        self._batches, self._within = [], ()
        self.generation += 1
        names = tuple(slot.name for slot in members.slots)
        space = result.space if isinstance(result, Iterate) else None
        self._left[names] = space, [slot.versions() for slot in members.slots]


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
