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
from tdlrt.optim.rules import Rule, resolve_rule
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


def adapted(name: str, **options: object) -> Rule:
    """The rule of a torch optimiser that moves blocks by its own class."""
    optimizer_cls = getattr(torch.optim, name)
    group = optimizer_cls([torch.zeros(1)], lr=0.05, **options).param_groups[0]
    return resolve_rule(optimizer_cls).from_group(group)


RULES: dict[str, Rule] = {
    "plain": SGDRule(lr=0.1, weight_decay=0.05),
    "heavy ball": SGDRule(lr=0.05, momentum=0.9),
    "dampening": SGDRule(lr=0.05, momentum=0.9, dampening=0.3),
    "nesterov": SGDRule(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": AdamRule(lr=0.05, betas=(0.8, 0.9), eps=1e-2),
    "amsgrad": AdamRule(lr=0.05, betas=(0.8, 0.5), eps=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw": AdamWRule(lr=0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, decoupled=True),
    "adagrad": adapted("Adagrad", initial_accumulator_value=0.3, lr_decay=0.1, weight_decay=0.1),
    "rmsprop": adapted("RMSprop", centered=True, momentum=0.5, eps=1e-2),
    "nadam": adapted("NAdam", eps=1e-2, decoupled_weight_decay=True, weight_decay=0.1),
    "adamax": adapted("Adamax", eps=1e-2),
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
    "narrow": Problem(
        ((3, 7, 6), (2, 8, 5)), ((3, 4, 3), (2, 3, 4)), ((2, 4, 4), (2, 4, 2)), (0, 1, 2)
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
                errors.append(self.parts(moment, others, first=True))
            else:
                errors.append(stack_error(moment.core, [v.core[0] for v in others]))
                errors.append(self.parts(moment, others, first=False))
        return max(errors)

    def parts(self, found: TangentVector, expected: list[TangentVector], *, first: bool) -> float:
        """Largest error of basis parts; the entries of first moments have signs, so not of these.

        The parts of members that do not move are zero, and so is the padding of first moments.
        """
        errors = [0.0]
        layout = self.together.layout
        assert tuple(found.parts) == layout.moving
        for mode, part in found.parts.items():
            own = []
            for number, vector in enumerate(expected):
                size, rank = layout.sizes[number][mode], layout.ranks[number][mode]
                none = torch.zeros(size, rank, dtype=part.dtype)
                own.append(vector.parts[mode][0] if mode in vector.parts else none)
            assert not first or not behind(part, own).any()
            for block, member in zip(true(part, *own), own, strict=True):
                if not member.any():
                    assert not block.any()
                elif not first:
                    errors.append(relative_error(block, member))
        return max(errors)

    def lifted(self) -> float:
        """Largest error in augmented bases."""
        errors = [0.0]
        passes = [run.passed for run in (self.together, *self.alone)]
        for found, *expected in zip(*passes, strict=True):
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


def condition(run: Run) -> float:
    """Largest condition number of an unfolding of the core of a run of one member."""
    core = run.iterate.space.core[0].double()
    unfoldings = [unfold(core, mode) for mode in run.layout.moving]
    return max((float(torch.linalg.cond(matrix)) for matrix in unfoldings), default=1.0)


def check(
    problem: str,
    rule: str,
    integrator: str,
    dtype: torch.dtype = torch.float64,
    taus: Sequence[float | None] = (None, None, None),
) -> None:
    """Step after step, a stack is where its members are alone."""
    numbers = range(len(PROBLEMS[problem].shapes))
    together, *alone = (
        Run(PROBLEMS[problem], of, RULES[rule], dtype) for of in (numbers, *([n] for n in numbers))
    )
    comparison, worst = Comparison(together, alone), 1.0
    for tau in taus:
        for run in (together, *alone):
            run.step(integrator, tau)
        worst = max(worst, *map(condition, alone))
        # Directions that a rank has just been raised by are weak.
        allowed = rounding(dtype, 1e3) * worst if dtype == torch.float64 else 1e-4
        assert comparison.iterates() <= allowed
        assert comparison.lifted() <= allowed


INTEGRATORS = pytest.mark.parametrize("integrator", ["fixed", "parallel", "bug"])


@INTEGRATORS
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rule", ["heavy ball", "amsgrad"])
def test_members_of_every_order_move_as_they_do_alone(integrator, problem, rule):
    check(problem, rule, integrator)


@INTEGRATORS
@pytest.mark.parametrize("rule", RULES)
def test_members_move_as_they_do_alone_under_every_rule(integrator, rule):
    check("conv2d", rule, integrator, taus=(None, None))


@INTEGRATORS
@pytest.mark.parametrize("problem", ["matrices", "channels"])
@pytest.mark.parametrize("rule", ["nesterov", "adam"])
def test_members_move_as_they_do_alone_in_float32(integrator, problem, rule):
    check(problem, rule, integrator, torch.float32)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rule", ["dampening", "adamw"])
def test_members_keep_the_ranks_that_they_do_alone(integrator, problem, rule):
    check(problem, rule, integrator, taus=(0.4, 0.1, 0.0, 0.6))


def taken(iterate: Iterate, members: list[int]) -> Iterate:
    """Some members, in stacks with room for all."""
    space = iterate.space
    factors = [u if u is None else u[members] for u in space.factors]
    layout = space.layout.take(members)
    moments = {
        name: TangentVector(
            vector.core[members], {m: vector.parts[m][members] for m in layout.moving}
        )
        for name, vector in iterate.moments.items()
    }
    return Iterate(
        TangentSpace(space.core[members], factors, layout), moments, iterate.steps[members]
    )


@pytest.mark.parametrize("members", [[2, 0], [1], [0, 1, 2]])
@pytest.mark.parametrize("rule", ["nesterov", "amsgrad"])
def test_more_room_than_needed_changes_nothing(members, rule):
    run = Run(PROBLEMS["conv2d"], range(3), RULES[rule], torch.float64)
    run.step("fixed")
    gradient, step = run.gradient(), fixed_rank_step(run.iterate, run.gradient(), run.rule)
    some = taken(run.iterate, members)
    parts = {mode: gradient.parts[mode][members] for mode in some.space.moving_modes}
    own = TangentVector(gradient.core[members], parts)
    found, expected = fixed_rank_step(some, own, run.rule), taken(step, members)
    dense = multi_mode_product(expected.space.core, expected.space.factors)
    assert relative_error(multi_mode_product(found.space.core, found.space.factors), dense) < 1e-12
    for name, moment in found.moments.items():
        moved = expected.moments[name]
        assert relative_error(moment.core, moved.core) < 1e-12
        for mode, part in moment.parts.items():
            assert relative_error(part, moved.parts[mode]) < 1e-12
    augmented = augmented_step(some, own, run.rule)
    whole = multi_mode_product(augmented.core, augmented.factors)
    expected = augmented_step(run.iterate, gradient, run.rule)
    dense = multi_mode_product(expected.core, expected.factors)[members]
    assert relative_error(whole, dense) < 1e-12
    assert torch.equal(augmented.ranks, expected.ranks[members])


@INTEGRATORS
@pytest.mark.parametrize("problem", ["conv2d", "channels", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_space_made_anew_from_its_values_is_the_same_to_the_last_bit(integrator, problem, dtype):
    """Sums depend on strides: a training goes on from a file as it would have without."""
    members = range(len(PROBLEMS[problem].shapes))
    run = Run(PROBLEMS[problem], members, RULES["heavy ball"], dtype)
    for _ in range(2):
        run.step(integrator)
        space = run.iterate.space
        copies = [u if u is None else torch.zeros(u.shape).to(u).copy_(u) for u in space.factors]
        core = torch.zeros(space.core.shape).to(space.core).copy_(space.core)
        again = TangentSpace(core, copies, space.layout)
        assert space.core.is_contiguous()
        for mode in space.moving_modes:
            assert space.rows(mode).is_contiguous()
            pairs = zip(space.factorizations[mode], again.factorizations[mode], strict=True)
            assert all(torch.equal(kept, made) for kept, made in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["plain", "heavy ball", "adam"])
def test_from_a_core_of_zeros_the_core_moves_alone(rule, dtype):
    run = Run(PROBLEMS["conv2d"], range(3), RULES[rule], dtype)
    space = run.iterate.space
    core = space.core.clone()
    core[1] = 0
    run.iterate = run.iterate._replace(space=TangentSpace(core, space.factors, space.layout))
    gradient = run.gradient()
    assert not any(part[1].any() for part in gradient.parts.values())
    direction, _ = run.rule.direction(gradient, {}, run.iterate.space, torch.ones(3))
    run.step("fixed")
    for mode in space.moving_modes:
        moved, basis = run.iterate.space.factor(mode), space.factor(mode)
        assert relative_error(moved[1], basis[1]) <= rounding(dtype)
        assert mode not in (0, 1) or relative_error(moved[0], basis[0]) > 1e-4
    expected = -run.rule.lr * direction.core[1]
    assert relative_error(run.iterate.space.core[1], expected) <= rounding(dtype)


@pytest.mark.parametrize("problem", ["conv1d", "conv2d", "channels"])
def test_second_moments_where_a_core_is_zero(problem):
    """Then nothing is known of the rows of Mat_i(C): every row of a basis part is constant."""
    found = []
    for members in (range(len(PROBLEMS[problem].shapes)), [1]):
        run = Run(PROBLEMS[problem], members, RULES["adam"], torch.float64)
        run.step("bug")
        lifted = basis_step(run.iterate, run.gradient(), run.rule)
        before = Layout(run.layout.sizes, lifted.ranks.tolist(), run.layout.modes)
        lifted = cropped(lifted, before)
        core = lifted.core.clone()
        core[-1 if len(members) == 1 else 1] = 0
        lifted = lifted._replace(core=core)
        kept = [Cutoff(possible_ranks(ranks, before.modes)) for ranks in before.ranks]
        truncation = truncate_stack(lifted.core, lifted.ranks, kept, before.modes)
        layout = Layout(before.sizes, truncation.ranks.tolist(), before.modes)
        found.append(retract_lifted(lifted, before, truncation, layout, run.rule))
    together, alone = found
    assert not together.space.core[1].any()
    assert together.moments.keys() == alone.moments.keys()
    for mode, part in alone.moments["exp_avg_sq"].parts.items():
        (own,) = true(together.moments["exp_avg_sq"].parts[mode][1:2], part[0])
        assert (part > 0).all()
        assert relative_error(part[0], part[0, :, :1].expand_as(part[0])) <= 1e-12
        assert relative_error(own, part[0]) <= 1e-12


@pytest.mark.parametrize(
    ("rule", "backend"),
    [("heavy ball", "eager"), ("amsgrad", "eager"), ("heavy ball", "aot_eager")],
)
def test_a_step_at_fixed_ranks_is_one_graph(rule, backend):
    torch.compiler.reset()
    compiled = torch.compile(fixed_rank_step, fullgraph=True, backend=backend)
    run, twin = (Run(PROBLEMS["channels"], range(2), RULES[rule], torch.float64) for _ in "ab")
    for step in range(1 if backend == "aot_eager" else 4):
        # Once without moments and once with them; then nothing is new.
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            run.iterate = compiled(run.iterate, run.gradient(), run.rule)
        twin.step("fixed")
        found, expected = run.iterate, twin.iterate
        assert relative_error(found.space.core, expected.space.core) <= 1e-14
        for mode in found.space.moving_modes:
            error = relative_error(found.space.factor(mode), expected.space.factor(mode))
            assert error <= 1e-14
        for name, moment in found.moments.items():
            assert relative_error(moment.core, expected.moments[name].core) <= 1e-14
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("rule", "dtype"), [("nesterov", torch.float32), ("amsgrad", torch.float64)]
)
def test_no_step_needs_to_know_a_number(rule, dtype):
    """A fake tensor has a shape and no values: whatever would wait for one raises an error."""
    problem = PROBLEMS["conv2d"]
    with FakeTensorMode():
        run = Run(problem, range(3), RULES[rule], dtype)
        later = Layout(run.layout.sizes, problem.later, run.layout.modes)
        run.step("fixed")
        iterate, gradient, modes = run.iterate, run.gradient(), run.layout.modes
        shapes = [tuple(u.shape) for u in iterate.space.factors]

        augmented = augmented_step(iterate, gradient, run.rule)
        cut = truncate_stack(augmented.core, augmented.ranks, run.cutoffs(0.1), modes)
        retracted = retract(augmented, cut, later, run.rule)
        lifted = core_step(basis_step(iterate, gradient, run.rule), augmented.core, run.rule)
        sizes = [
            [min(n, 2 * r) for n, r in zip(*of, strict=True)]
            for of in zip(problem.shapes, problem.ranks, strict=True)
        ]
        before = Layout(run.layout.sizes, sizes, modes)
        lifted = cropped(lifted, before)
        cut = truncate_stack(lifted.core, lifted.ranks, run.cutoffs(None), modes)
        settled = retract_lifted(lifted, before, cut, later, run.rule)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            lifted.ranks.tolist()
    assert shapes == [(3, 9, 6), (3, 7, 6), (3, 3, 3), (3, 3, 3)]
    for found in (retracted, settled):
        assert tuple(found.space.core.shape) == (3, 5, 7, 3, 3)
        assert {tuple(m.core.shape) for m in found.moments.values()} == {(3, 5, 7, 3, 3)}
