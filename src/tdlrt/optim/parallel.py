"""The integrator that takes one gradient a step."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.linalg import TangentVector
from tdlrt.optim.integrator import (
    Context,
    Pass,
    Result,
    active_layers,
    on_current_weights,
    truncate_together,
)
from tdlrt.optim.members import Members
from tdlrt.optim.rules import Rule
from tdlrt.optim.steps import Iterate, Lifted, augmented_step, core_step, fixed_rank_step
from tdlrt.optim.team import Team

__all__ = ["Parallel"]


class Parallel:
    """W_1 = R(W_0 - lr P(grad L(W_0))), R the truncation or the projection onto new bases.

    Where bases rest (see `RestingBases`) the step is C_1 = C_0 - lr grad_C L(W_0) in them.

    Args:
        context: What it works with.

    Attributes:
        moves_plain: Whether other parameters move in the next pass.

    Source: arXiv:2412.00858.
    """

    moves_plain = True

    def __init__(self, context: Context) -> None:
        self._context = context

    def advance(self, team: Team) -> Pass:
        """One step of all layers that have a gradient.

        Args:
            team: Who computes the steps of which layers.

        Raises:
            NonFiniteError: Something is not finite; nothing was changed.
        """
        context = self._context
        batches, adaptation = context.batches, context.adaptation
        active = active_layers(batches)
        if context.capturable and not adaptation.examines:
            return self._without_a_wait(active)
        resting = context.resting.names(active)
        examines = adaptation.examines and not resting
        if examines and adaptation.is_joint:  # every process compares the spectra of all layers
            team = Team()
        with team.agreement():
            step = on_current_weights(
                context,
                lambda compares: self._computed(
                    team, active, resting, examines=examines, compares=compares
                ),
            )
        if adaptation.observes:
            for members, curvature in step.curvatures:
                members.set_curvature(curvature)
        for members, core in step.cores:
            members.batch.store_core(core, members.places, members.index)
        for result in step.results:
            batches.assign(*result)
        slots = [batches.slots[name] for name in active]
        team.exchange(slots, context.state, adaptation.curvatures)
        context.resting.end_step(active, resting, context.state)
        return Pass(
            ends_step=True,
            examined=active if examines else (),
            postponed=adaptation.examines and not examines,
        )

    def _without_a_wait(self, active: Collection[str]) -> Pass:
        """A step at fixed ranks that changes nothing, on the device, where it is not finite."""
        batches, adaptation, finite, *_ = self._context
        chosen = batches.select(active)
        found = [fixed_rank_step(*self._read(members)) for members in chosen]
        sizes = [m.sizes_after(iterate) for m, iterate in zip(chosen, found, strict=True)]
        accepted = finite.accepted(finite.given(batches.device), sizes)
        for members, iterate in zip(chosen, found, strict=True):
            if adaptation.observes:
                curvature = members.curvature(observed=True)
                past = members.curvature(observed=False)
                members.set_curvature(torch.where(accepted, curvature, past))
            members.batch.store(iterate, members.places, members.index, accepted)
        return Pass(ends_step=True, accepted=accepted)

    def _computed(
        self,
        team: Team,
        active: Collection[str],
        resting: Collection[str],
        *,
        examines: bool,
        compares: bool,
    ) -> _Step:
        """The step of the layers of this process."""
        batches, adaptation, finite, *_ = self._context
        chosen = batches.select(team.share(active), team.owners())
        still, moving = (chosen, []) if resting else ([], chosen)
        changes = batches.changes(None if examines else chosen) if compares else None
        given = finite.given(batches.device, changes)
        cores = [
            core_step(members.lifted(), members.core_gradient(), self._context.rule(members))
            for members in still
        ]
        steps = [self._read(members) for members in moving]
        observes = adaptation.observes
        curvatures = [members.curvature(observed=observes) for members in (*still, *moving)]
        results: list[Result]
        if examines:
            augmented = [(m, augmented_step(*of)) for m, of in zip(moving, steps, strict=True)]
            results = truncate_together(self._context, augmented, curvatures, given)
        else:
            found = [fixed_rank_step(*of) for of in steps]
            after: list[tuple[Members, Iterate | Lifted]]
            after = [*zip(still, cores, strict=True), *zip(moving, found, strict=True)]
            finite.check(given, [members.sizes_after(step) for members, step in after])
            pairs = zip(moving, found, strict=True)
            results = [(members, iterate, members.layout.ranks) for members, iterate in pairs]
        return _Step(
            list(zip((*still, *moving), curvatures, strict=True)),
            list(zip(still, cores, strict=True)),
            results,
        )

    def _read(self, members: Members) -> tuple[Iterate, TangentVector, Rule]:
        """Weights, projected gradients and the rule that layers move by."""
        iterate = members.iterate()
        taken = self._context.resting.steps_taken(members, iterate.steps)
        iterate = iterate._replace(basis_steps=taken)
        gradient = iterate.space.gradient(*members.gradients())
        return iterate, gradient, self._context.rule(members)


class _Step(NamedTuple):
    """What a step has computed, to be put in place.

    Attributes:
        curvatures: Mean squares of the gradients of layers.
        cores: Layers whose bases rest, and their cores.
        results: Layers whose bases move.
    """

    curvatures: list[tuple[Members, Tensor]]
    cores: list[tuple[Members, Lifted]]
    results: list[Result]
