"""Steps of padded stacks: every member moves as it does alone; nothing waits, and it compiles."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from reference.cases import (
    TuckerCase,
    behind,
    gaussian,
    padded,
    relative_error,
    rounding,
    stack,
    stack_error,
)
from tdlrt.linalg import (
    Cutoff,
    Layout,
    TangentSpace,
    TangentVector,
    Truncation,
    multi_mode_product,
    possible_ranks,
    truncate_stack,
    unfold,
)
from tdlrt.optim.rules import Rule
from tdlrt.optim.rules.adam import AdamRule, AdamWRule
from tdlrt.optim.rules.sgd import SGDRule
from tdlrt.optim.steps import (
    Augmented,
    Iterate,
    Lifted,
    augmented_step,
    basis_step,
    core_step,
    fixed_rank_step,
    retract,
    retract_lifted,
)

RULES: dict[str, Rule] = {
    "plain": SGDRule(lr=0.1, weight_decay=0.05),
    "heavy ball": SGDRule(lr=0.05, momentum=0.9),
    "dampening": SGDRule(lr=0.05, momentum=0.9, dampening=0.3),
    "nesterov": SGDRule(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": AdamRule(lr=0.05, betas=(0.8, 0.9), eps=1e-2),
    "amsgrad": AdamRule(lr=0.05, betas=(0.8, 0.5), eps=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw": AdamWRule(lr=0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, decoupled=True),
}

Sizes = tuple[int, ...]


class Problem(NamedTuple):
    """Members by shape and first ranks, and the modes that are factorised; and later ranks."""

    shapes: tuple[Sizes, ...]
    ranks: tuple[Sizes, ...]
    later: tuple[Sizes, ...]
    modes: Sizes


PROBLEMS = {
    "matrices": Problem(
        ((8, 7), (9, 5), (6, 6)), ((3, 3), (5, 5), (2, 2)), ((4, 4), (3, 3), (2, 2)), (0, 1)
    ),
    "one mode": Problem(((8, 7), (9, 5)), ((3, 7), (2, 5)), ((4, 7), (1, 5)), (0,)),
    "conv1d": Problem(
        ((7, 6, 3), (5, 8, 3), (6, 4, 2)),
        ((3, 4, 3), (4, 4, 2), (2, 2, 1)),
        ((4, 3, 3), (5, 4, 3), (2, 1, 2)),
        (0, 1, 2),
    ),
    # A member that moves in a mode next to one whose basis is full there, in every mode.
    "conv2d": Problem(
        ((8, 7, 3, 3), (9, 5, 3, 3), (6, 7, 3, 2)),
        ((4, 5, 3, 3), (3, 5, 2, 3), (6, 6, 3, 1)),
        ((3, 7, 3, 2), (4, 4, 3, 3), (5, 5, 2, 2)),
        (0, 1, 2, 3),
    ),
    "channels": Problem(
        ((8, 7, 3, 3), (9, 5, 1, 1), (6, 7, 5, 2)),
        ((4, 5, 3, 3), (3, 3, 1, 1), (6, 6, 5, 2)),
        ((5, 4, 3, 3), (2, 2, 1, 1), (4, 7, 5, 2)),
        (0, 1),
    ),
    "conv3d": Problem(
        ((4, 3, 2, 3, 2), (3, 5, 2, 2, 3)),
        ((2, 3, 1, 2, 2), (3, 2, 2, 2, 2)),
        ((3, 2, 2, 2, 1), (2, 3, 2, 1, 3)),
        (0, 1, 2, 3, 4),
    ),
}


class Run:
    """Steps of some members of a problem, towards targets of their own.

    The loss is ||W - B||^2 / 2, with the gradients that autograd would give for core and bases.
    """

    def __init__(
        self, problem: Problem, numbers: Sequence[int], rule: Rule, dtype: torch.dtype
    ) -> None:
        self.problem, self.numbers, self.rule = problem, numbers, rule
        cases = [TuckerCase(problem.shapes[n], problem.ranks[n], dtype, 10 * n) for n in numbers]
        self.targets = padded([case.tensor(0) for case in cases])
        space = TangentSpace(*stack([case.tucker(modes=problem.modes) for case in cases]))
        self.iterate = Iterate(space, {}, torch.zeros(len(cases), dtype=torch.float64))
        self.passed: list[Lifted] = []

    @property
    def layout(self) -> Layout:
        return self.iterate.space.layout

    def outer_gradient(self, core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
        return multi_mode_product(core, factors) - self.targets

    def gradient(self) -> TangentVector:
        space = self.iterate.space
        outer = self.outer_gradient(space.core, space.factors)
        gradients = {}
        for mode in space.moving_modes:
            others = multi_mode_product(outer, space.factors, transpose=True, skip=mode)
            gradients[mode] = unfold(others, mode, 1) @ unfold(space.core, mode, 1).mT
        core = multi_mode_product(outer, space.factors, transpose=True)
        return space.gradient(core, gradients)

    def cutoffs(self, tau: float | None) -> list[Cutoff]:
        if tau is not None:
            return [Cutoff(self.problem.shapes[n], tau) for n in self.numbers]
        return [Cutoff(self.problem.later[n]) for n in self.numbers]

    def truncation(self, step: Augmented | Lifted, tau: float | None) -> tuple[Truncation, Layout]:
        """The truncation to later ranks, or by a tolerance, and the layout of what is left."""
        modes = self.layout.modes
        result = truncate_stack(step.core, step.ranks, self.cutoffs(tau), modes)
        kept = [possible_ranks(ranks, modes) for ranks in result.ranks.tolist()]
        if kept != [tuple(ranks) for ranks in result.ranks.tolist()]:
            result = truncate_stack(step.core, step.ranks, [Cutoff(of) for of in kept], modes)
        assert [tuple(ranks) for ranks in result.ranks.tolist()] == kept
        return result, Layout(self.layout.sizes, kept, modes)

    def step(self, integrator: str, tau: float | None = None) -> None:
        iterate, rule = self.iterate, self.rule
        if integrator == "fixed":
            self.iterate = fixed_rank_step(iterate, self.gradient(), rule)
        elif integrator == "parallel":
            augmented = augmented_step(iterate, self.gradient(), rule)
            truncation, layout = self.truncation(augmented, tau)
            self.iterate = retract(augmented, truncation, layout, rule)
        else:
            lifted = basis_step(iterate, self.gradient(), rule)
            before = Layout(self.layout.sizes, lifted.ranks.tolist(), self.layout.modes)
            lifted = cropped(lifted, before)
            self.passed.append(lifted)
            for _ in range(2):
                outer = self.outer_gradient(lifted.core, lifted.factors)
                core = multi_mode_product(outer, lifted.factors, transpose=True)
                lifted = core_step(lifted, core, rule)
                self.passed.append(lifted)
            truncation, layout = self.truncation(lifted, tau)
            self.iterate = retract_lifted(lifted, before, truncation, layout, rule)


def cropped(lifted: Lifted, layout: Layout) -> Lifted:
    """In stacks with room for the ranks alone."""
    where = (slice(None), *(slice(0, rank) for rank in layout.columns))
    factors = [
        None if basis is None else basis[:, :, :rank]
        for basis, rank in zip(lifted.factors, layout.columns, strict=True)
    ]
    moments = {name: moment[where] for name, moment in lifted.moments.items()}
    return lifted._replace(core=lifted.core[where], factors=factors, moments=moments)


def true(stacked: Tensor, *members: Tensor) -> list[Tensor]:
    """The parts of a stack that are as large as the members."""
    return [
        of[tuple(slice(0, size) for size in member.shape)]
        for of, member in zip(stacked, members, strict=True)
    ]


class Comparison:
    """What a stack and its members alone have in common, whatever the signs of their bases are."""

    def __init__(self, together: Run, alone: Sequence[Run]) -> None:
        self.together, self.alone = together, alone

    def iterates(self) -> float:
        """Largest error of weights and moments; zero where the members are not."""
        found, expected = self.together.iterate, [run.iterate for run in self.alone]
        space, spaces = found.space, [iterate.space for iterate in expected]
        assert space.layout.ranks == tuple(s.layout.ranks[0] for s in spaces)
        assert torch.equal(found.steps, torch.cat([iterate.steps for iterate in expected]))
        assert {tuple(found.moments)} == {tuple(iterate.moments) for iterate in expected}
        assert not behind(space.core, [s.core[0] for s in spaces]).any()
        errors = [
            stack_error(
                multi_mode_product(space.core, space.factors),
                [multi_mode_product(s.core, s.factors)[0] for s in spaces],
            )
        ]
        for mode in space.layout.modes:
            bases = [s.factor(mode)[0] for s in spaces]
            assert not behind(space.factor(mode), bases).any()
            for basis in true(space.factor(mode), *bases):
                errors.append(relative_error(basis.mT @ basis, torch.eye(basis.shape[1])))
        for name, moment in found.moments.items():
            others = [iterate.moments[name] for iterate in expected]
            if name in self.together.rule.first_moments:
                dense = [s.to_tensor(v)[0] for s, v in zip(spaces, others, strict=True)]
                errors.append(stack_error(space.to_tensor(moment), dense))
                errors.append(self.parts(moment, others, padding=True, sign=True))
            else:
                errors.append(stack_error(moment.core, [v.core[0] for v in others]))
                errors.append(self.parts(moment, others, padding=False, sign=False))
        return max(errors)

    def parts(
        self, found: TangentVector, expected: list[TangentVector], *, padding: bool, sign: bool
    ) -> float:
        """Largest error of the basis parts; those of members that do not move are zero."""
        errors = [0.0]
        layout = self.together.layout
        assert tuple(found.parts) == layout.moving
        for mode, part in found.parts.items():
            own = []
            for number, vector in enumerate(expected):
                size, rank = layout.sizes[number][mode], layout.ranks[number][mode]
                none = torch.zeros(size, rank, dtype=part.dtype)
                own.append(vector.parts[mode][0] if mode in vector.parts else none)
            for block, member in zip(true(part, *own), own, strict=True):
                if not member.any():
                    assert not block.any()
                elif not sign:
                    errors.append(relative_error(block, member))
            assert not padding or not behind(part, own).any()
        return max(errors)

    def lifted(self) -> float:
        """Largest error in augmented bases."""
        errors = [0.0]
        for found, *expected in zip(self.together.passed, *(r.passed for r in self.alone)):
            assert torch.equal(found.ranks, torch.cat([of.ranks for of in expected]))
            assert not behind(found.core, [of.core[0] for of in expected]).any()
            weights = [multi_mode_product(of.core, of.factors)[0] for of in expected]
            errors.append(stack_error(multi_mode_product(found.core, found.factors), weights))
            for name, moment in found.moments.items():
                if name in self.together.rule.first_moments:
                    moment = multi_mode_product(moment, found.factors)
                    others = [multi_mode_product(of.moments[name], of.factors) for of in expected]
                else:
                    others = [of.moments[name] for of in expected]
                errors.append(stack_error(moment, [other[0] for other in others]))
        return max(errors)


def compared(
    problem: Problem,
    rule: Rule,
    integrator: str,
    dtype: torch.dtype = torch.float64,
    taus: Sequence[float | None] = (None, None, None),
) -> float:
    numbers = range(len(problem.shapes))
    together = Run(problem, numbers, rule, dtype)
    alone = [Run(problem, [n], rule, dtype) for n in numbers]
    comparison, errors = Comparison(together, alone), []
    for tau in taus:
        for run in (together, *alone):
            run.step(integrator, tau)
        errors.append(comparison.iterates())
    return max(*errors, comparison.lifted())


INTEGRATORS = pytest.mark.parametrize("integrator", ["fixed", "parallel", "bug"])


@INTEGRATORS
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rule", ["heavy ball", "amsgrad"])
def test_members_of_every_order_move_as_they_do_alone(integrator, problem, rule):
    assert compared(PROBLEMS[problem], RULES[rule], integrator) <= 1e-10


@INTEGRATORS
@pytest.mark.parametrize("rule", RULES)
def test_members_move_as_they_do_alone_under_every_rule(integrator, rule):
    assert compared(PROBLEMS["conv2d"], RULES[rule], integrator) <= 1e-10


@INTEGRATORS
@pytest.mark.parametrize("problem", ["matrices", "conv2d", "channels"])
@pytest.mark.parametrize("rule", ["nesterov", "adam"])
def test_members_move_as_they_do_alone_in_float32(integrator, problem, rule):
    assert compared(PROBLEMS[problem], RULES[rule], integrator, torch.float32) <= 1e-3


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rule", ["dampening", "adamw"])
def test_members_keep_the_ranks_that_they_do_alone(integrator, problem, rule):
    taus = (0.4, 0.1, 0.0, 0.6)
    assert compared(PROBLEMS[problem], RULES[rule], integrator, taus=taus) <= 1e-10
