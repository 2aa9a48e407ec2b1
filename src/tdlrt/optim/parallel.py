"""The integrator that takes one gradient a step."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tdlrt.linalg import TangentVector
from tdlrt.optim.batches import Members
from tdlrt.optim.finite import core_norms
from tdlrt.optim.integrator import (
    Context,
    Pass,
    Result,
    active_layers,
    on_current_weights,
    settle,
)
from tdlrt.optim.rules import Rule
from tdlrt.optim.steps import Iterate, augmented_step, fixed_rank_step
from tdlrt.optim.team import Team

__all__ = ["Parallel"]


class Parallel:
    """W_1 = R(W_0 - lr P(grad L(W_0))), R the truncation or the projection onto new bases.

    Args:
        context: What it works with.

    Source: arXiv:2412.00858.
    """

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
        examined = active if adaptation.examines else ()
        if adaptation.is_joint:  # every process compares the spectra of all layers
            team = Team()
        with team.agreement():
            chosen, curvatures, results = on_current_weights(
                context, lambda: self._computed(team, active)
            )
        if adaptation.observes:
            for members, curvature in zip(chosen, curvatures, strict=True):
                members.set_curvature(curvature)
        for result in results:
            batches.assign(*result)
        slots = [batches.slots[name] for name in active]
        team.exchange(slots, context.state, adaptation.curvatures)
        return Pass(moves_rest=True, ends_step=True, examined=examined)

    def _without_a_wait(self, active: Collection[str]) -> Pass:
        """A step at fixed ranks that changes nothing, on the device, where it is not finite."""
        batches, adaptation, finite, *_ = self._context
        chosen = batches.select(active)
        found = [fixed_rank_step(*self._read(members)) for members in chosen]
        norms = [core_norms(iterate.space.core) for iterate in found]
        accepted = finite.accepted(finite.given(batches.device), norms)
        for members, iterate in zip(chosen, found, strict=True):
            if adaptation.observes:
                curvature = members.curvature(observed=True)
                past = members.curvature(observed=False)
                members.set_curvature(torch.where(accepted, curvature, past))
            members.batch.store(iterate, members.places, members.index, accepted)
        return Pass(moves_rest=True, ends_step=True, accepted=accepted)

    def _computed(
        self, team: Team, active: Collection[str]
    ) -> tuple[list[Members], list[Tensor], list[Result]]:
        """The layers of this process, mean squares of their gradients, and their steps."""
        batches, adaptation, finite, *_ = self._context
        chosen = batches.select(team.share(active), team.share(batches.slots))
        given = finite.given(batches.device, batches.changes(chosen))
        steps = [self._read(members) for members in chosen]
        observes = adaptation.observes
        curvatures = [members.curvature(observed=observes) for members in chosen]
        if adaptation.examines:
            augmented = [(m, augmented_step(*of)) for m, of in zip(chosen, steps, strict=True)]
            return chosen, curvatures, settle(self._context, augmented, curvatures, given)
        found = [fixed_rank_step(*of) for of in steps]
        finite.check(given, [core_norms(iterate.space.core) for iterate in found])
        pairs = zip(chosen, found, strict=True)
        return chosen, curvatures, [(m, iterate, m.layout.ranks) for m, iterate in pairs]

    def _read(self, members: Members) -> tuple[Iterate, TangentVector, Rule]:
        """Weights, projected gradients and the rule that layers move by."""
        iterate = members.iterate()
        gradient = iterate.space.gradient(*members.gradients())
        return iterate, gradient, self._context.rule_of(members.batch.group)
