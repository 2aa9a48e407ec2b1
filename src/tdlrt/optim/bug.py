"""The integrator `bug`: a step on the bases, then steps on the core, each with its own gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tdlrt.nn.layer import resize_layers_
from tdlrt.optim.finite import Given, sizes
from tdlrt.optim.integrator import (
    Context,
    Pass,
    Result,
    active_layers,
    on_current_weights,
    truncate_together,
    unmoved,
)
from tdlrt.optim.members import Members
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.steps import Augmented, Lifted, basis_step, core_step
from tdlrt.optim.team import Team

__all__ = ["Bug"]


class Bug:
    """Basis step, lift, Galerkin steps on the core, truncation.

    Args:
        context: The objects that both integrators work with.
        core_steps: Number of core steps after each basis step.

    Attributes:
        core_steps_left: Number of core steps until the step ends; 0 between steps.

    Source: arXiv:2305.19059, algorithm 1.
    """

    def __init__(self, context: Context, core_steps: int) -> None:
        self._context, self.core_steps = context, core_steps
        self.core_steps_left = 0

    @property
    def moves_plain(self) -> bool:
        """Whether other parameters move in the next pass: in core steps alone."""
        return self.core_steps_left > 0

    @property
    def ranks_before(self) -> Mapping[str, Sequence[int]]:
        """Ranks before the basis step, by name of the layers that took it."""
        return self._context.batches.ranks_before

    @ranks_before.setter
    def ranks_before(self, ranks: Mapping[str, Sequence[int]]) -> None:
        self._context.batches.ranks_before = ranks

    def advance(self, team: Team) -> Pass:
        """Take a basis step, or a core step if the step under way has one left.

        Args:
            team: The assignment of layers to processes.

        Raises:
            NonFiniteError: A gradient, a weight or a result is not finite; nothing was changed.
        """
        return self._core_pass(team) if self.core_steps_left else self._basis_pass(team)

    def _basis_pass(self, team: Team) -> Pass:
        batches, adaptation, _, state, *_ = self._context
        active = active_layers(batches)
        ranks_before = {name: list(batches.slots[name].layer.ranks) for name in active}
        with team.agreement():
            steps, read = on_current_weights(
                self._context, lambda compares: self._lifted(team, active, compares=compares)
            )
        for (members, step), numbers in zip(steps, read, strict=True):
            width = len(members.layout.columns)
            rows = [numbers[n : n + width] for n in range(0, len(numbers), width)]
            batches.assign(members, step, [tuple(map(int, row)) for row in rows])
        team.exchange([batches.slots[name] for name in active], state, adaptation.curvatures)
        self.ranks_before = ranks_before
        self.core_steps_left = self.core_steps
        return Pass(ends_step=False)

    def _lifted(
        self, team: Team, active: Collection[str], *, compares: bool
    ) -> tuple[list[tuple[Members, Lifted]], list[list[float]]]:
        """Basis steps of layers: their weights in augmented bases, and the ranks there."""
        batches, _, finite, *_ = self._context
        chosen = batches.select(team.share(active), team.owners())
        given = finite.given(batches.device, batches.changes() if compares else None)
        pairs = [(members, members.iterate()) for members in chosen]
        gradients = [i.space.gradient(*members.gradients()) for members, i in pairs]
        steps = [
            (members, basis_step(iterate, gradient, self._context.rule(members)))
            for (members, iterate), gradient in zip(pairs, gradients, strict=True)
        ]
        found = [sizes([g.core, *g.parts.values()], g.core.dtype) for g in gradients]
        found += [members.sizes_after(step) for members, step in steps]
        return steps, finite.check(given, found, [step.ranks for _, step in steps])

    def _core_pass(self, team: Team) -> Pass:
        batches, adaptation, _, state, *_ = self._context
        last = self.core_steps_left == 1
        examined: tuple[str, ...] = ()
        if last and adaptation.examines:
            examined = tuple(self.ranks_before)
            team = Team() if adaptation.is_joint else team
        with team.agreement():
            results, curvatures = on_current_weights(
                self._context,
                lambda compares: self._core_results(team, last=last, compares=compares),
            )
        for members, curvature in curvatures:
            members.set_curvature(curvature)
        for result in results:
            batches.assign(*result)
        slots = [batches.slots[name] for name in self.ranks_before]
        team.exchange(slots, state, adaptation.curvatures)
        self.core_steps_left -= 1
        if last:
            self.ranks_before = {}
            adaptation.settling = False
        return Pass(ends_step=last, examined=examined)

    def _core_results(
        self, team: Team, *, last: bool, compares: bool
    ) -> tuple[list[Result], list[tuple[Members, Tensor]]]:
        """Core steps of layers, the last one with the truncation; and new curvatures."""
        batches, adaptation, finite, *_ = self._context
        names = team.share(self.ranks_before)
        moving = [n for n in names if batches.slots[n].layer.core.grad is not None]
        chosen = batches.select(moving, team.owners())
        changes = batches.changes(None if last else chosen) if compares else None
        given = finite.given(batches.device, changes)
        lifted = [
            core_step(members.lifted(), members.gradients().core, self._context.rule(members))
            for members in chosen
        ]
        observes = adaptation.observes
        observed = [members.curvature(observed=observes) for members in chosen]
        results: list[Result]
        if last:
            steps: list[tuple[Members, Augmented | Lifted]] = [*zip(chosen, lifted, strict=True)]
            still = [name for name in names if name not in moving]
            rest = batches.select(still, team.owners())
            steps += [(members, members.lifted()) for members in rest]
            if adaptation.settling:  # layers without a gradient are truncated too
                others = [n for n in adaptation.trained if n not in self.ranks_before]
                steps += unmoved(self._context, others)
            left = [members.curvature(observed=False) for members, _ in steps[len(chosen) :]]
            results = truncate_together(
                self._context, steps, [*observed, *left], given, self.ranks_before
            )
        else:
            advanced = list(zip(chosen, lifted, strict=True))
            finite.check(given, [members.sizes_after(step) for members, step in advanced])
            results = [(members, step, members.layout.ranks) for members, step in advanced]
        return results, list(zip(chosen, observed, strict=True)) if observes else []

    @contextmanager
    def without_basis_gradients(self) -> Iterator[None]:
        """Compute no gradients of bases inside the block, because a core step does not use them."""
        slots = [self._context.batches.slots[name] for name in self.ranks_before]
        resting = [basis for slot in slots for basis in slot.bases if basis.requires_grad]
        for basis in resting:
            basis.requires_grad_(False)
        try:
            yield
        finally:
            for basis in resting:
                basis.requires_grad_(True)

    @contextmanager
    def undone_on_error(self, team: Team) -> Iterator[None]:
        """End the step under way if a closure or a pass inside the block raises an error.

        Before the first core step the model is restored bit for bit. After it, the core steps that
        were taken are kept, and the layers are truncated.
        """
        batches = self._context.batches
        before = _Snapshot(self._context, list(batches.slots.values()))
        try:
            yield
        except BaseException:
            if self.core_steps_left == self.core_steps:
                before.restore(self.ranks_before)
            elif self.core_steps_left:
                given = Given.nothing(batches.device)
                steps = [(m, m.lifted()) for m in batches.select(self.ranks_before)]
                curvatures = [members.curvature(observed=False) for members, _ in steps]
                results = truncate_together(
                    self._context, steps, curvatures, given, self.ranks_before
                )
                for result in results:
                    batches.assign(*result)
            self.core_steps_left, self.ranks_before = 0, {}
            batches.settle(team.owners())
            raise


class _Snapshot:
    """A copy of the weights of layers, and their state, for restoring them."""

    def __init__(self, context: Context, slots: Sequence[LayerSlot]) -> None:
        self._context, self._slots = context, slots
        parameters = [p for slot in slots for p in slot.parameters]
        copies = iter(torch._foreach_mul([p.detach() for p in parameters], 1))
        self._values = {slot.name: [next(copies) for _ in slot.parameters] for slot in slots}
        self._state = {p: dict(context.state[p]) for p in parameters if p in context.state}

    def restore(self, names: Collection[str]) -> None:
        """Restore the weights and the state of these layers."""
        slots = [slot for slot in self._slots if slot.name in names]
        if not slots:
            return
        resize_layers_([slot.layer for slot in slots], [self._values[s.name] for s in slots])
        for slot in slots:
            for parameter in slot.parameters:
                self._context.state.pop(parameter, None)
                if parameter in self._state:
                    self._context.state[parameter] = self._state[parameter]
        self._context.batches.forget()
