"""Which layers form a batch, and their weights, gradients and state in one stack."""

from __future__ import annotations

import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tdlrt.linalg import Factorization, Layout, TangentSpace, TangentVector
from tdlrt.nn.layer import resize_layers_
from tdlrt.optim.rules import Rule
from tdlrt.optim.slot import BASIS_CORE, LayerSlot, OptimizerState, working_dtype
from tdlrt.optim.steps import Iterate, Lifted, brought_along

__all__ = ["Batch", "Batches", "Members"]

# What one more batch costs on a CPU, in multiply-adds: some 200 small operations.
_BATCH_COST = 4e7

# Entries of padded stacks above which a batch on a GPU is not made larger.
_MOST_ENTRIES = 1 << 26

# Share of the past in the running mean of squared gradients of the cores.
_CURVATURE_DECAY = 0.9

_Versions: TypeAlias = list[list[tuple[int, int]]]
"""See `LayerSlot.versions`, of several layers."""

_Sizes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and ranks of a layer."""


class Batch:
    """Layers whose steps are computed together: their weights and state, zero-padded in stacks.

    The stacks stay where they are for as long as ranks do. The optimiser's state holds views of
    them, of the shapes of the parameters; weights are written to the parameters after every step.
    Between the passes of `bug` the ranks are those of the augmented bases, and the state is the
    core's alone. While bases rest, the state holds the core of their last step, too: the bases'
    parts of the moments stand in its rows.

    Args:
        slots: The layers. They agree in modes, type, device, param_group and names of moments.
        group: Index of their param_group.
        rule: The optimiser's rule; only the names of its state matter here.
        state: The optimiser's state.
        curvatures: Mean squares of the gradients by layer.
        space: The tangent space that a step has left at these weights, if it is known.
    """

    def __init__(
        self,
        slots: Sequence[LayerSlot],
        group: int,
        rule: type[Rule],
        state: OptimizerState,
        curvatures: MutableMapping[str, Tensor],
        space: TangentSpace | None = None,
    ) -> None:
        self.slots, self.group, self._rule = list(slots), group, rule
        self._state, self._curvatures = state, curvatures
        layers = [slot.layer for slot in slots]
        core = layers[0].core
        self._dtype, self._device = working_dtype(core), core.device
        sizes, ranks = [layer.shape for layer in layers], [layer.ranks for layer in layers]
        self.layout = Layout(sizes, ranks, layers[0].learned_modes, core.device)
        self._weights, self._weight_views = self._stacks()
        self._gradients, self._gradient_views = self._stacks()
        steps = [slot.steps(state) for slot in slots]
        self._steps = self._scalars(steps, torch.float32, 0.0)
        self._curvature = self._scalars([None] * len(steps), torch.float64, math.nan)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._basis_cores: Tensor | None = None
        self._versions: _Versions = []
        self._space: TangentSpace | None = None
        self._just_read = False
        self._given: list[Tensor] = []
        self._moments: dict[str, list[Tensor]] = {}
        self._moment_views: list[dict[str, list[Tensor]]] = []
        self._read_weights()
        self._read_state()
        self._read_curvatures()
        if space is not None and self._exact and space.layout.ranks == self.layout.ranks:
            weights, factors = self._weights[0], self._factors()
            self._space = TangentSpace(weights, factors, self.layout, space.factorizations)
            self._given = [space.core, *(space.factor(mode) for mode in self.layout.modes)]

    @property
    def _exact(self) -> bool:
        """Whether the parameters hold what the stacks do, to the last bit."""
        return self.slots[0].layer.core.dtype == self._dtype

    def _stacks(self, core_alone: bool = False) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Zeros for the core and the learned bases, and each member's part of them."""
        layout = self.layout
        shapes: list[tuple[int, ...]] = [layout.columns]
        if not core_alone:
            shapes += [(layout.rows[i], layout.columns[i]) for i in layout.modes]
        blank = torch.zeros((), dtype=self._dtype, device=self._device)
        stacks = [blank.new_zeros(len(layout), *shape) for shape in shapes]
        places = range(len(layout))
        return stacks, [_member(stacks, layout, place, layout.ranks[place]) for place in places]

    # --- what others may have written -------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether shapes and state are still those of the layers."""
        counts = int(self._rule.counts_steps)
        for place, slot in enumerate(self.slots):
            if slot.layer.ranks != self.layout.ranks[place]:
                return False
            views = self._moment_views[place]
            for number, parameter in enumerate(slot.parameters):
                own = self._state.get(parameter, {})
                wanted = {name: of[number] for name, of in views.items() if number < len(of)}
                if len(own) != len(wanted) + (counts if wanted and not number else 0):
                    return False
                if any(own.get(name) is not view for name, view in wanted.items()):
                    return False
        return True

    def refresh(self) -> None:
        """Take over what somebody else has written into weights or curvatures."""
        if not self._exact or self._versions != [slot.versions() for slot in self.slots]:
            self._read_weights()
        self._read_curvatures()

    def _read_weights(self) -> None:
        parameters = [p.detach() for slot in self.slots for p in slot.parameters]
        torch._foreach_copy_([view for of in self._weight_views for view in of], parameters)
        self._versions = [slot.versions() for slot in self.slots]
        self._space, self._just_read, self._given = None, True, []

    def changes(self) -> list[Tensor]:
        """By how much each parameter differs from the stack, where it should not."""
        just_read, self._just_read = self._just_read, False
        given, self._given = self._given, []
        if given:
            return list(torch._foreach_norm(torch._foreach_sub(self._weights, given)))
        if just_read or not self._exact:
            return []
        parameters = [p.detach() for slot in self.slots for p in slot.parameters]
        views = [view for of in self._weight_views for view in of]
        return list(torch._foreach_norm(torch._foreach_sub(parameters, views)))

    def _read_state(self) -> None:
        cores = [slot.moments(self._state, [BASIS_CORE]).get(BASIS_CORE) for slot in self.slots]
        names = self._rule.first_moments + self._rule.second_moments
        found = [slot.moments(self._state, names) for slot in self.slots]
        core_alone = any(len(of) == 1 for of in found[0].values())
        self._make_moments(found[0], core_alone=core_alone)
        for name in self._moments:
            views = [view for of in self._moment_views for view in of[name]]
            torch._foreach_copy_(views, [moment for of in found for moment in of[name]])
        if any(cores):
            self._rest_bases()
            for own, core in zip(self._moment_views, cores, strict=True):
                if core:
                    own[BASIS_CORE][0].copy_(core[0])

    def _rest_bases(self) -> None:
        """Note the cores of today, which moments refer to for as long as the bases stay."""
        (self._basis_cores,), views = self._stacks(core_alone=True)
        self._basis_cores.copy_(self._weights[0])
        for slot, own, of in zip(self.slots, self._moment_views, views, strict=True):
            own[BASIS_CORE] = of
            self._state[slot.layer.core][BASIS_CORE] = of[0]

    def _wake_bases(self) -> None:
        self._basis_cores = None
        for slot, own in zip(self.slots, self._moment_views, strict=True):
            if own.pop(BASIS_CORE, None):
                del self._state[slot.layer.core][BASIS_CORE]

    def _make_moments(self, names: Iterable[str], *, core_alone: bool = False) -> None:
        """Zeros for the state, published as the optimiser's."""
        self._moments, self._moment_views = {}, [{} for _ in self.slots]
        for name in names:
            self._moments[name], views = self._stacks(core_alone)
            for own, of in zip(self._moment_views, views, strict=True):
                own[name] = of
        for place, (slot, mine) in enumerate(zip(self.slots, self._moment_views, strict=True)):
            counted = self._rule.counts_steps and bool(mine)
            slot.set_moments(self._state, mine, self._steps[place] if counted else None)

    def _scalars(
        self, values: Sequence[Tensor | None], dtype: torch.dtype, missing: float
    ) -> Tensor:
        """One number of each member."""
        blank = torch.full((), missing, dtype=dtype, device=self._device)
        given = [blank if value is None else value.to(blank) for value in values]
        return torch.stack(given)

    def _read_curvatures(self) -> None:
        known = [self._curvatures.get(slot.name) for slot in self.slots]
        if any(value is not None and value._base is not self._curvature for value in known):
            self._curvature = self._scalars(known, torch.float64, math.nan)
            self._publish_curvatures(n for n, value in enumerate(known) if value is not None)

    def _publish_curvatures(self, places: Iterable[int]) -> None:
        for place in places:
            self._curvatures[self.slots[place].name] = self._curvature[place]

    # --- what a step reads ------------------------------------------------------------------------

    def members(self, names: Collection[str]) -> Members | None:
        """Those of these layers that are in the batch."""
        places = tuple(place for place, slot in enumerate(self.slots) if slot.name in names)
        if not places:
            return None
        if len(places) == len(self.slots):
            return Members(self, places, None)
        if places not in self._indices:
            self._indices[places] = torch.tensor(places, device=self._device)
        return Members(self, places, self._indices[places])

    def iterate(self) -> Iterate:
        """Weights and state at rest."""
        own = self._stored()
        if self._basis_cores is None:
            return own
        today = TangentSpace(self._weights[0], self._factors(), self.layout)
        moments = brought_along(own.moments, own.space, today, self._rule)
        return own._replace(space=today, moments=moments)

    def _stored(self) -> Iterate:
        """The stacks: while bases rest, with the rows of their last step."""
        if self._space is None:
            core, factors = self._weights[0], self._factors()
            then = core if self._basis_cores is None else self._basis_cores
            factorizations = TangentSpace(then, factors, self.layout).factorizations
            self._space = TangentSpace(core, factors, self.layout, factorizations)
        moments = {name: self._vector(stacks) for name, stacks in self._moments.items()}
        return Iterate(self._space, moments, self._steps)

    def lifted(self) -> Lifted:
        """Weights and the core's state, for a step on the core alone."""
        moments = {name: stacks[0] for name, stacks in self._moments.items()}
        ranks = self.layout.rank_tensor()
        return Lifted(self._weights[0], self._factors(), ranks, moments, self._steps)

    def _factors(self) -> list[Tensor | None]:
        by_mode = dict(zip(self.layout.modes, self._weights[1:], strict=True))
        return [by_mode.get(mode) for mode in range(len(self.layout.columns))]

    def _vector(self, stacks: Sequence[Tensor]) -> TangentVector:
        by_mode = dict(zip(self.layout.modes, stacks[1:], strict=True))
        return TangentVector(stacks[0], {mode: by_mode[mode] for mode in self.layout.moving})

    def gradients(self, places: Iterable[int], *, core_alone: bool = False) -> TangentVector:
        """What autograd left in `.grad` of these members, which is only read."""
        views, gradients = [], []
        for place in places:
            own = self.slots[place].parameters[: 1 if core_alone else None]
            for view, parameter in zip(self._gradient_views[place], own, strict=False):
                if parameter.grad is not None:
                    views.append(view)
                    gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)
        return self._vector(self._gradients)

    # --- what a step writes -----------------------------------------------------------------------

    def has_room(
        self, result: Iterate | Lifted, members: Members, ranks: Sequence[Sequence[int]]
    ) -> bool:
        """Whether results belong into the stacks there are: same ranks, same kind of state."""
        mine = [self.layout.ranks[place] for place in members.places]
        core = result.core if isinstance(result, Lifted) else result.space.core
        same = core.shape[1:] == self._weights[0].shape[1:] and [tuple(r) for r in ranks] == mine
        names, own = tuple(result.moments), tuple(self._moments)
        core_alone = any(len(stacks) == 1 for stacks in self._moments.values())
        alike = names == own and (not own or core_alone == isinstance(result, Lifted))
        return same and (alike or (not own and members.index is None))

    def store(
        self,
        result: Iterate | Lifted,
        places: Sequence[int],
        index: Tensor | None,
        accepted: Tensor | None = None,
    ) -> None:
        """Put results at the ranks there are in place: in stacks, parameters and state.

        Args:
            result: Weights and state of some members.
            places: Their places.
            index: The same as a tensor; None for all of them.
            accepted: A boolean on the device: where it is false, everything stays.
        """
        if tuple(result.moments) != tuple(self._moments):
            self._make_moments(result.moments, core_alone=isinstance(result, Lifted))
        own = self.lifted() if isinstance(result, Lifted) else self._stored()
        old, new = self._tensors_of(own), self._tensors_of(result)
        if accepted is not None:
            past = old if index is None else [stack[index] for stack in old]
            new = [torch.where(accepted, *pair) for pair in zip(new, past, strict=True)]
        _put(old, new, index)
        self._write_weights(places)
        if self._basis_cores is not None and index is None:
            self._wake_bases()
        elif self._basis_cores is not None:
            _put([self._basis_cores], [new[1]], index)

    def store_core(self, result: Lifted, places: Sequence[int], index: Tensor | None) -> None:
        """Put the results of a step on the core alone in place, at rest.

        Args:
            result: Weights and state of some members.
            places: Their places.
            index: The same as a tensor; None for all of them.
        """
        if tuple(result.moments) != tuple(self._moments):
            self._make_moments(result.moments)
        if not self._moments:
            self._space = None  # whose rows no moment refers to
        elif self._basis_cores is None:
            self._rest_bases()
        _put(self._tensors_of(self.lifted()), self._tensors_of(result), index)
        self._write_weights(places, core_alone=True)

    def _tensors_of(self, iterate: Iterate | Lifted) -> list[Tensor]:
        steps = iterate.steps.to(self._steps)
        if isinstance(iterate, Lifted):  # of which a step changes the core alone
            return [steps, iterate.core, *iterate.moments.values()]
        space, moving = iterate.space, self.layout.moving
        tensors = [steps, space.core]
        for mode in moving:
            tensors += [space.factor(mode), *space.factorizations[mode]]
        for moment in iterate.moments.values():
            tensors += [moment.core, *(moment.parts[mode] for mode in moving)]
        return tensors

    def _write_weights(self, places: Iterable[int], *, core_alone: bool = False) -> None:
        places, count = list(places), 1 if core_alone else None
        parameters = [p.detach() for place in places for p in self.slots[place].parameters[:count]]
        views = [view for place in places for view in self._weight_views[place][:count]]
        torch._foreach_copy_(parameters, views)
        for place in places:
            self._versions[place] = self.slots[place].versions()

    def curvature(self, *, observed: bool) -> Tensor:
        """Running mean squares of the entries of grad_C L, with the last gradients `observed`."""
        past = self._curvature
        if not observed:
            return past
        core = self._gradients[0].flatten(1)
        squares = torch.linalg.vector_norm(core, dim=1, dtype=torch.float64).square()
        squares = squares / self.layout.entries()
        return torch.lerp(squares, torch.where(past.isnan(), squares, past), _CURVATURE_DECAY)

    def set_curvature(self, curvature: Tensor, places: Iterable[int], index: Tensor | None) -> None:
        """Keep the running mean squares of some members."""
        if index is None:
            self._curvature.copy_(curvature)
        else:
            self._curvature.index_copy_(0, index, curvature)
        unknown = [p for p in places if self.slots[p].name not in self._curvatures]
        self._publish_curvatures(unknown)


@dataclass(frozen=True)
class Members:
    """Layers of one batch that take part in a step.

    Attributes:
        batch: The batch.
        places: Their places in it.
        index: The same as a tensor; None for all of them.
    """

    batch: Batch
    places: tuple[int, ...]
    index: Tensor | None

    @property
    def slots(self) -> list[LayerSlot]:
        """The layers."""
        return [self.batch.slots[place] for place in self.places]

    @property
    def layout(self) -> Layout:
        """Their true sizes."""
        layout = self.batch.layout
        return layout if self.index is None else layout.take(self.places)

    def iterate(self) -> Iterate:
        """Their weights and state at rest."""
        whole = self.batch.iterate()
        if self.index is None:
            return whole
        space, layout = whole.space, self.layout
        factors = [f if f is None else f[self.index] for f in space.factors]
        factorizations = {
            mode: Factorization(*(tensor[self.index] for tensor in of))
            for mode, of in space.factorizations.items()
        }
        taken = TangentSpace(space.core[self.index], factors, layout, factorizations)
        moments = {name: self._taken(moment) for name, moment in whole.moments.items()}
        return Iterate(taken, moments, whole.steps[self.index])

    def lifted(self) -> Lifted:
        """Their weights and the core's state, for a step on the core alone."""
        core, factors, ranks, moments, steps = self.batch.lifted()
        if self.index is None:
            return Lifted(core, factors, ranks, moments, steps)
        taken = {name: moment[self.index] for name, moment in moments.items()}
        factors = [f if f is None else f[self.index] for f in factors]
        return Lifted(core[self.index], factors, ranks[self.index], taken, steps[self.index])

    def core_gradient(self) -> Tensor:
        """grad_C L, as autograd left it."""
        core = self.batch.gradients(self.places, core_alone=True).core
        return core if self.index is None else core[self.index]

    def gradients(self) -> TangentVector:
        """grad_C L and grad_{U_i} L, as autograd left them."""
        gradients = self.batch.gradients(self.places)
        return gradients if self.index is None else self._taken(gradients)

    def _taken(self, vector: TangentVector) -> TangentVector:
        parts = {mode: part[self.index] for mode, part in vector.parts.items()}
        return TangentVector(vector.core[self.index], parts)

    def curvature(self, *, observed: bool) -> Tensor:
        """See `Batch.curvature`."""
        curvature = self.batch.curvature(observed=observed)
        return curvature if self.index is None else curvature[self.index]

    def set_curvature(self, curvature: Tensor) -> None:
        """See `Batch.set_curvature`."""
        self.batch.set_curvature(curvature, self.places, self.index)


class Batches:
    """The batches of an optimiser, made anew when ranks, groups or somebody else's changes ask.

    Args:
        slots: All layers by name.
        rule: The optimiser's rule.
        state: The optimiser's state.
        curvatures: Mean squares of the gradients by layer.
        group_of: Index of the param_group of each layer.

    Attributes:
        resting_ranks: Ranks at rest of layers that are between the passes of `bug`: these, not the
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
        self.resting_ranks: Mapping[str, Sequence[int]] = {}
        self.generation = 0
        self.work = 0.0
        self._batches: list[Batch] = []
        self._within: tuple[str, ...] = ()
        # What the last step left: spaces, and the parameters' versions that they belong to.
        self._spaces: dict[tuple[str, ...], tuple[TangentSpace | None, _Versions]] = {}

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
        trained = [n for n in everything if n in names or self.slots[n].layer.core.requires_grad]
        if self._within != tuple(trained) or not all(b.is_current() for b in self._batches):
            self._make(tuple(trained))
        found = [members for b in self._batches if (members := b.members(names)) is not None]
        for members in found:
            members.batch.refresh()
        return found

    def changes(self, chosen: Iterable[Members]) -> Tensor:
        """By how much weights differ from what the last step left, see `Given`."""
        found = [change for members in chosen for change in members.batch.changes()]
        return torch.stack(found) if found else torch.zeros(0, device=self.device)

    def _planned_ranks(self, slot: LayerSlot) -> Sequence[int]:
        return self.resting_ranks.get(slot.name, slot.layer.ranks)

    def _make(self, names: tuple[str, ...]) -> None:
        self._batches = []
        keyed: dict[tuple[object, ...], list[LayerSlot]] = {}
        for name in names:
            keyed.setdefault(self._key(self.slots[name]), []).append(self.slots[name])
        for slots in keyed.values():
            for part in _partition(slots, self._planned_ranks):
                part = [slot for slot in slots if slot in part]  # in an order that stays
                group = self._group_of[part[0].name]
                space, versions = self._spaces.get(tuple(s.name for s in part), (None, []))
                if versions != [slot.versions() for slot in part]:
                    space = None
                batch = Batch(part, group, self._rule, self._state, self._curvatures, space)
                self._batches.append(batch)
        self._within, self._spaces = names, {}
        layers = (self.slots[name].layer for name in names)
        self.work = sum(_work([(layer.shape, layer.ranks)]) for layer in layers)
        self.generation += 1

    def forget(self) -> None:
        """Make all batches anew the next time, from what the layers hold."""
        self._batches, self._within, self._spaces = [], (), {}
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
        if batch.has_room(result, members, ranks):
            batch.store(result, members.places, members.index)
            return
        write_out(members, result, ranks, self._state, self._rule)
        self._batches, self._within = [], ()
        self.generation += 1
        if isinstance(result, Iterate):
            names = tuple(slot.name for slot in members.slots)
            self._spaces[names] = result.space, [slot.versions() for slot in members.slots]


def write_out(
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
    numbered = list(zip(range(len(slots)), members.places, ranks, strict=True))
    resize_layers_(
        [slot.layer for slot in slots],
        [_member(stacks, layout, place, own, number) for number, place, own in numbered],
    )
    steps = result.steps.to(torch.float32)
    for (number, place, own), slot in zip(numbered, slots, strict=True):
        views = {n: _member(of, layout, place, own, number) for n, of in moments.items()}
        counted = rule.counts_steps and bool(views)
        slot.set_moments(state, views, steps[number] if counted else None)


def _member(
    stacks: Sequence[Tensor],
    layout: Layout,
    place: int,
    ranks: Sequence[int],
    number: int | None = None,
) -> list[Tensor]:
    """A member's part of stacks of cores and of bases, or of cores alone."""
    core, *bases = (stack[place if number is None else number] for stack in stacks)
    views = [core[tuple(slice(0, rank) for rank in ranks)]]
    for mode, basis in zip(layout.modes, bases, strict=False):
        views.append(basis[: layout.sizes[place][mode], : ranks[mode]])
    return views


def _put(stacks: Sequence[Tensor], values: Sequence[Tensor], index: Tensor | None) -> None:
    """Write values into stacks, in the places of an index or in all."""
    if index is None:
        torch._foreach_copy_(list(stacks), list(values))
    else:
        for stack, value in zip(stacks, values, strict=True):
            stack.index_copy_(0, index, value)


def _partition(
    slots: Sequence[LayerSlot], ranks_of: Callable[[LayerSlot], Sequence[int]]
) -> Iterator[list[LayerSlot]]:
    """Layers that may form one batch, in batches.

    On a GPU one, unless it gets too large. On a CPU layers of similar size: what padding adds to
    the arithmetic must not exceed what one batch less saves.
    """
    on_cpu = slots[0].layer.core.device.type == "cpu"
    sizes = {slot.name: (slot.layer.shape, tuple(ranks_of(slot))) for slot in slots}
    batch: list[LayerSlot] = []
    own: list[_Sizes] = []
    for slot in sorted(slots, key=lambda slot: (_work([sizes[slot.name]]), sizes[slot.name])):
        size = sizes[slot.name]
        together = [*own, size]
        if on_cpu:
            good = _work(together) <= _work(own) + _work([size]) + _BATCH_COST
        else:
            good = _entries(together) <= _MOST_ENTRIES
        if batch and not good:
            yield batch
            batch, own = [], []
        batch.append(slot)
        own.append(size)
    yield batch


def _room(members: Sequence[_Sizes]) -> tuple[list[int], list[int]]:
    """Rows and columns of the bases in a stack of these layers."""
    shapes, ranks = zip(*members, strict=True)
    return [max(of) for of in zip(*shapes, strict=True)], [
        max(of) for of in zip(*ranks, strict=True)
    ]


def _work(members: Sequence[_Sizes]) -> float:
    """Multiply-adds of a step, roughly: some ten products of each basis and of the core."""
    if not members:
        return 0.0
    rows, columns = _room(members)
    core = math.prod(columns)
    moving = [
        (n, r)
        for i, (n, r) in enumerate(zip(rows, columns, strict=True))
        if any(shape[i] > ranks[i] for shape, ranks in members)
    ]
    return 10.0 * len(members) * sum(n * r**2 + core * r for n, r in moving)


def _entries(members: Sequence[_Sizes]) -> int:
    rows, columns = _room(members)
    bases = sum(n * r for n, r in zip(rows, columns, strict=True))
    return len(members) * (math.prod(columns) + bases)
