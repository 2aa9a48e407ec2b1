"""What both integrators share: the objects they work with, and the truncation after a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from tdlrt.linalg import TangentVector
from tdlrt.optim.adaptation import Adaptation
from tdlrt.optim.batches import Batches
from tdlrt.optim.examination import Moved
from tdlrt.optim.finite import Finite, Given, WrittenElsewhereError
from tdlrt.optim.members import Members
from tdlrt.optim.resting import RestingBases
from tdlrt.optim.rules import Rule
from tdlrt.optim.shards import norms
from tdlrt.optim.slot import OptimizerState
from tdlrt.optim.steps import Augmented, Iterate, Lifted, retract, retract_lifted

__all__ = [
    "Context",
    "Pass",
    "Result",
    "active_layers",
    "gradient_norm",
    "on_current_weights",
    "truncate_together",
    "truncate_unmoved",
    "unmoved",
]

Ranks: TypeAlias = Sequence[Sequence[int]]

Result: TypeAlias = tuple[Members, Iterate | Lifted, Ranks]
"""Layers with their weights, their state and their ranks after a step."""


Computed = TypeVar("Computed")


class Context(NamedTuple):
    """The objects that an integrator works with.

    Attributes:
        batches: The layers.
        adaptation: When ranks are examined.
        finite: The checks.
        state: The optimiser's state.
        rule_of: The rule of a param_group, by its index.
        resting: Which bases rest in a step of `parallel`.
        capturable: Whether steps at fixed ranks read nothing on the host.
    """

    batches: Batches
    adaptation: Adaptation
    finite: Finite
    state: OptimizerState
    rule_of: Callable[[int], Rule]
    resting: RestingBases
    capturable: bool = False

    def rule(self, members: Members) -> Rule:
        """The rule that layers move by."""
        return self.rule_of(members.batch.group)


class Pass(NamedTuple):
    """The effect of the gradients of one backward pass.

    Attributes:
        ends_step: Whether it was the last of a whole step.
        examined: Layers whose ranks were examined.
        postponed: Whether an examination waits for a step in which no bases rest.
        accepted: A boolean on the device that is false where the step must change nothing, since
            something is not finite; None where that was read and raised.
    """

    ends_step: bool
    examined: Collection[str] = ()
    postponed: bool = False
    accepted: Tensor | None = None


def on_current_weights(context: Context, compute: Callable[[bool], Computed]) -> Computed:
    """The result of a step. It is computed again if the stacks held outdated weights.

    Args:
        context: What the integrator works with.
        compute: Computes it, told whether it has to compare the stacks with the weights.

    Raises:
        NonFiniteError: As `compute` does.
    """
    try:
        return compute(True)
    except WrittenElsewhereError:
        context.batches.reread()
        return compute(False)


def active_layers(batches: Batches) -> list[str]:
    """Layers that have a gradient."""
    return [name for name, slot in batches.slots.items() if slot.has_gradient()]


def unmoved(context: Context, names: Collection[str]) -> list[tuple[Members, Augmented]]:
    """Layers at their present weights, to be truncated without a step."""
    chosen = context.batches.select(names)
    steps = []
    for members in chosen:
        iterate, ranks = members.iterate(), members.layout.rank_tensor()
        steps.append(
            (members, Augmented(iterate.space.core, iterate.space.factors, ranks, iterate))
        )
    return steps


def truncate_together(
    context: Context,
    steps: Moved,
    curvatures: Sequence[Tensor],
    given: Given,
    ranks_before: Mapping[str, Sequence[int]] | None = None,
) -> list[Result]:
    """Truncate all layers to the ranks that the policy chooses for all of them together.

    Args:
        context: What the integrator works with.
        steps: Layers with their weights in augmented bases.
        curvatures: Mean squares of their gradients, see `Members.curvature`.
        given: See `Finite.given`.
        ranks_before: Ranks before the step, where the layers have others now.

    Raises:
        NonFiniteError: Something is not finite; nothing was changed.
    """
    results: list[Result] = []
    examined = context.adaptation.examine(
        steps, curvatures, context.finite, given, ranks_before or {}
    )
    for members, step, truncation, layout in examined:
        rule = context.rule(members)
        if isinstance(step, Augmented):
            result = retract(step, truncation, layout, rule)
        else:
            result = retract_lifted(step, members.layout, truncation, layout, rule)
        results.append((members, result, layout.ranks))
    return results


def truncate_unmoved(context: Context) -> None:
    """Truncate all trained layers, without a step, to the ranks that the policy chooses."""
    batches = context.batches

    def truncated(compares: bool) -> list[Result]:
        steps = unmoved(context, context.adaptation.trained)
        curvatures = [members.curvature(observed=False) for members, _ in steps]
        given = Given.nothing(batches.device)
        if compares:
            given = given._replace(changes=batches.changes())
        return truncate_together(context, steps, curvatures, given)

    for result in on_current_weights(context, truncated):
        batches.assign(*result)


def gradient_norm(
    context: Context, plain: Iterable[Tensor], cores: Collection[str], whole: Collection[str]
) -> Tensor:
    """Norm of all gradients, a scalar on the device in float64.

    Args:
        context: What the integrator works with.
        plain: Parameters that are not in Tucker format.
        cores: Layers that count with the gradient of their core.
        whole: Layers that count with their projected gradient.
    """
    device = context.batches.device
    gradients = [parameter.grad for parameter in plain if parameter.grad is not None]
    parts = [norms(gradients, device, torch.float64)]
    for members in context.batches.select(cores):
        gradient = TangentVector(members.core_gradient(), {})
        parts.append(gradient.squared_norms().sqrt().to(device))
    for members in context.batches.select(whole):
        gradient = members.iterate().space.gradient(*members.gradients())
        parts.append(gradient.squared_norms().sqrt().to(device))
    total: Tensor = torch.linalg.vector_norm(torch.cat(parts))
    return total
