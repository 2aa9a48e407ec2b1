"""Layers whose steps are computed together: their weights, gradients and state in one stack."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tdlrt.linalg import Layout, TangentSpace, TangentVector
from tdlrt.optim.curvatures import Curvatures
from tdlrt.optim.packing import put, zero_stacks
from tdlrt.optim.rules import Rule
from tdlrt.optim.slot import LayerSlot, OptimizerState, working_dtype
from tdlrt.optim.state_stacks import StateStacks
from tdlrt.optim.steps import Iterate, Lifted, brought_along, core_brought_along
from tdlrt.optim.written import Turned, made_orthonormal, not_orthonormal, turn_gradients_

__all__ = ["Batch"]

Versions: TypeAlias = list[list[tuple[int, int]]]
"""See `LayerSlot.versions`, of several layers."""


class Batch:
    """Layers whose steps are computed together: their weights and state, zero-padded in stacks.

    The stacks stay where they are for as long as ranks do. Weights are written to the parameters
    after every step. Between the passes of `bug` the ranks are those of the augmented bases.

    Args:
        slots: The layers. They agree in modes, type, device, param_group and names of moments.
        group: Index of their param_group.
        rule: The optimiser's rule; only the names of its state matter here.
        state: The optimiser's state.
        curvatures: Mean squares of the gradients by layer.
        space: The tangent space that a step has left at these weights, if it is known.
        written: Whether others may have written the weights.

    Attributes:
        layout: Their true sizes.
        curvatures: Their part of the curvatures.
        turned: Layers by place whose parameters have the bases that others have written.
    """

    def __init__(
        self,
        slots: Sequence[LayerSlot],
        group: int,
        rule: type[Rule],
        state: OptimizerState,
        curvatures: MutableMapping[str, Tensor],
        space: TangentSpace | None = None,
        written: bool = True,
    ) -> None:
        self.slots, self.group, self._rule = list(slots), group, rule
        self._state = state
        layers = [slot.layer for slot in slots]
        core = layers[0].core
        self._kind = core.dtype, core.device
        sizes, ranks = [layer.shape for layer in layers], [layer.ranks for layer in layers]
        self.layout = Layout(sizes, ranks, layers[0].learned_modes, core.device)
        self._weights, self._weight_views = zero_stacks(self.layout, working_dtype(core))
        self._gradients: list[Tensor] = []  # made when a step first needs them
        self._gradient_views: list[list[Tensor]] = []
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self.turned: dict[int, Turned] = {}
        self._versions: Versions = []
        self._space: TangentSpace | None = None
        self._read_weights(written=written)
        self._stored = StateStacks(
            *(self.slots, self.layout, rule, state, self._weights, self._weight_views)
        )
        self.curvatures = Curvatures(self.slots, self.layout, curvatures)
        if space is not None and space.layout.ranks == self.layout.ranks:
            weights, factors = self._weights[0], self._factors()
            self._space = TangentSpace(weights, factors, self.layout, space.factorizations)

    # --- changes from outside -------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the ranks and the state of the layers are still those of the stacks."""
        for slot, ranks in zip(self.slots, self.layout.ranks, strict=True):
            core = slot.layer.core
            if (core.dtype, core.device) != self._kind or slot.layer.ranks != ranks:
                return False
        return self._stored.is_current()

    def refresh(self) -> None:
        """Read weights and curvatures again if they were written from outside."""
        written = self._versions != [slot.versions() for slot in self.slots]
        if written and self._versions and not self.differs():
            self._versions = [slot.versions() for slot in self.slots]  # written and restored
        elif written:
            self.reread()
        self.curvatures.read()

    def reread(self) -> None:
        """Read weights that were written from outside, and transport the state to them."""
        # Weights that are not finite will be refused: the state waits until they are restored.
        known = self._stored.moments and self._is_finite()
        if known and self._stored.core_alone:
            bases = [None if basis is None else basis.clone() for basis in self._factors()]
            self._read_weights(written=True)
            if self._is_finite():
                state, new = self.lifted().moments, self._factors()
                moved = core_brought_along(state, bases, new, self.layout, self._rule)
                put(list(state.values()), list(moved.values()), None)
            return
        before = self._copied() if known else None
        self._read_weights(written=True)
        if before is not None and self._is_finite():
            self._stored.wake_bases()
            today = self._at_last_step()
            moments = brought_along(before.moments, before.space, today.space, self._rule)
            put(self._tensors_of(today), self._tensors_of(today._replace(moments=moments)), None)

    def _is_finite(self) -> bool:
        return bool(torch.stack([stack.isfinite().all() for stack in self._weights]).all())

    def _copied(self) -> Iterate:
        """A copy of the present weights and state."""
        space, moments, steps, _ = self.iterate()
        factors = [None if factor is None else factor.clone() for factor in space.factors]
        own = TangentSpace(space.core.clone(), factors, self.layout, dict(space.factorizations))
        copies = {
            name: TangentVector(of.core.clone(), {i: part.clone() for i, part in of.parts.items()})
            for name, of in moments.items()
        }
        return Iterate(own, copies, steps)

    def _read_weights(self, *, written: bool) -> None:
        self._versions, self.turned = [], {}
        weights = [weight for slot in self.slots for weight in slot.weights(self._state)]
        torch._foreach_copy_([view for of in self._weight_views for view in of], weights)
        self._space = None
        if written:
            self._make_orthonormal()
        self._versions = [slot.versions() for slot in self.slots]

    def _make_orthonormal(self) -> None:
        """Make bases that were written from outside orthonormal in the stacks, with the same W."""
        modes = self.layout.modes
        bases = dict(zip(modes, self._weights[1:], strict=True))
        for place, wrong in not_orthonormal(bases, self.layout).items():
            core, *own = self._weight_views[place]
            views = dict(zip(modes, own, strict=True))
            slot, written = self.slots[place], {mode: views[mode] for mode in wrong}
            new, orthonormal, turns = made_orthonormal(core, written)
            self.turned[place] = Turned(turns, [p.detach().clone() for p in slot.parameters])
            core.copy_(new)
            for mode, basis in orthonormal.items():
                views[mode].copy_(basis)

    def differs(self) -> bool:
        """Whether parameters differ from the stacks; waits for the device."""
        return any(self.changes())

    def changes(self) -> list[Tensor]:
        """Norms of the differences between parameters and stacks; all should be zero.

        Parameters smaller than float32 are compared with the stacks after rounding.
        """
        parameters = [p.detach() for slot in self.slots for p in slot.parameters]
        expected = [
            tensor
            for place, views in enumerate(self._weight_views)
            for tensor in (self.turned[place].parameters if place in self.turned else views)
        ]
        if parameters[0].dtype != self._weights[0].dtype:
            expected = [e.to(p.dtype) for e, p in zip(expected, parameters, strict=True)]
        return list(torch._foreach_norm(torch._foreach_sub(parameters, expected)))

    # --- what a step reads ------------------------------------------------------------------------

    def index_of(self, places: tuple[int, ...]) -> Tensor | None:
        """Places of some layers as a tensor; None for all of them."""
        if len(places) == len(self.slots):
            return None
        if places not in self._indices:
            self._indices[places] = torch.tensor(places, device=self.layout.device)
        return self._indices[places]

    def iterate(self) -> Iterate:
        """The weights with their tangent space, and the state."""
        own = self._at_last_step()
        if self._stored.basis_cores is None:
            return own
        today = TangentSpace(self._weights[0], self._factors(), self.layout)
        moments = brought_along(own.moments, own.space, today, self._rule)
        return own._replace(space=today, moments=moments)

    def _at_last_step(self) -> Iterate:
        """The contents of the stacks; while bases rest, with the rows Q_i of their last step."""
        if self._space is None:
            core, factors, then = self._weights[0], self._factors(), self._stored.basis_cores
            then = core if then is None else then
            factorizations = TangentSpace(then, factors, self.layout).factorizations
            self._space = TangentSpace(core, factors, self.layout, factorizations)
        moments = {name: self._vector(stacks) for name, stacks in self._stored.moments.items()}
        return Iterate(self._space, moments, self._stored.steps)

    def lifted(self) -> Lifted:
        """The weights and the state of the core, for a step that moves the core only."""
        moments = {name: stacks[0] for name, stacks in self._stored.moments.items()}
        ranks = self.layout.rank_tensor()
        return Lifted(self._weights[0], self._factors(), ranks, moments, self._stored.steps)

    def _factors(self) -> list[Tensor | None]:
        by_mode = dict(zip(self.layout.modes, self._weights[1:], strict=True))
        return [by_mode.get(mode) for mode in range(len(self.layout.columns))]

    def _vector(self, stacks: Sequence[Tensor]) -> TangentVector:
        by_mode = dict(zip(self.layout.modes, stacks[1:], strict=True))
        return TangentVector(stacks[0], {mode: by_mode[mode] for mode in self.layout.moving})

    def gradients(self, places: Iterable[int], *, core_alone: bool = False) -> TangentVector:
        """The gradients of these members; `.grad` is read and not changed."""
        if not self._gradients:
            dtype = self._weights[0].dtype
            self._gradients, self._gradient_views = zero_stacks(self.layout, dtype)
        views, gradients, places = [], [], list(places)
        for place in places:
            own = self.slots[place].parameters[: 1 if core_alone else None]
            for view, parameter in zip(self._gradient_views[place], own, strict=False):
                if parameter.grad is not None:
                    views.append(view)
                    gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)
        for place in places:
            if place in self.turned:
                core, *bases = self._gradient_views[place]
                by_mode = dict(zip(self.layout.modes, bases, strict=True))
                slot, turns = self.slots[place], self.turned[place].turns
                turn_gradients_(slot.name, core, by_mode, turns)
        return self._vector(self._gradients)

    # --- what a step writes -----------------------------------------------------------------------

    def has_room(
        self, result: Iterate | Lifted, places: Sequence[int], ranks: Sequence[Sequence[int]]
    ) -> bool:
        """Whether results fit the present stacks: the same ranks and the same kind of state."""
        mine = [self.layout.ranks[place] for place in places]
        core = result.core if isinstance(result, Lifted) else result.space.core
        same = core.shape[1:] == self._weights[0].shape[1:] and [tuple(r) for r in ranks] == mine
        names, own = tuple(result.moments), tuple(self._stored.moments)
        alike = names == own and (not own or self._stored.core_alone == isinstance(result, Lifted))
        return same and (alike or (not own and len(places) == len(self.slots)))

    def store(
        self,
        result: Iterate | Lifted,
        places: Sequence[int],
        index: Tensor | None,
        accepted: Tensor | None = None,
    ) -> None:
        """Write results with the present ranks to stacks, parameters and state.

        Args:
            result: Weights and state of some members.
            places: Their places.
            index: The same as a tensor; None for all of them.
            accepted: A boolean on the device: where it is false, everything stays.
        """
        stored, is_lifted = self._stored, isinstance(result, Lifted)
        if tuple(result.moments) != tuple(stored.moments):
            stored.make(result.moments, core_alone=is_lifted)
        own = self.lifted() if is_lifted else self._at_last_step()
        old, new = self._tensors_of(own), self._tensors_of(result)
        if accepted is not None:
            past = old if index is None else [stack[index] for stack in old]
            new = [torch.where(accepted, *pair) for pair in zip(new, past, strict=True)]
        put(old, new, index)
        self._write_weights(places)
        if stored.basis_cores is not None and index is None:
            stored.wake_bases()
        elif stored.basis_cores is not None:
            put([stored.basis_cores], [new[1]], index)

    def store_core(self, result: Lifted, places: Sequence[int], index: Tensor | None) -> None:
        """Write the results of a step that moved the cores only, while the bases rest.

        Args:
            result: Weights and state of some members.
            places: Their places.
            index: The same as a tensor; None for all of them.
        """
        stored = self._stored
        if tuple(result.moments) != tuple(stored.moments):
            stored.make(result.moments)
        if not stored.moments:
            self._space = None  # no moment refers to its rows
        elif stored.basis_cores is None:
            stored.rest_bases()
        put(self._tensors_of(self.lifted()), self._tensors_of(result), index)
        self._write_weights(places, core_alone=not self.turned)

    def _tensors_of(self, iterate: Iterate | Lifted) -> list[Tensor]:
        steps = iterate.steps.to(self._stored.steps)
        if isinstance(iterate, Lifted):  # a step changes only its core
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
            self.turned.pop(place, None)

    def curvature(self, *, observed: bool) -> Tensor:
        """The curvatures of all members; `observed` adds the gradients of the last `gradients`."""
        return self.curvatures.after(self._gradients[0]) if observed else self.curvatures.past
