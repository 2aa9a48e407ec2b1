"""The twins of the optimisers against torch.optim, and laws of their moments."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reference import (
    SGD,
    bug_step,
    multi_product,
    parallel_step,
    rules,
    tangent_projection,
    truncate,
    tucker_to_dense,
)
from reference.cases import gaussian, orthonormal
from reference.integrators import (
    CORE,
    Blocks,
    State,
    advance,
    bug_basis_step,
    coordinates,
    lift_second,
    mixing_weights,
    moving_modes,
    retract_second,
    tangent_tensor,
    transport_second,
)
from reference.rules import Rule

OPTIMIZERS = {
    "plain": ("SGD", {"weight_decay": 0.1}),
    "heavy ball": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "dampening": ("SGD", {"momentum": 0.9, "dampening": 0.4}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd maximize": ("SGD", {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "adam": ("Adam", {}),
    "adam decay": ("Adam", {"betas": (0.8, 0.9), "weight_decay": 0.1}),
    "amsgrad": ("Adam", {"betas": (0.8, 0.5), "amsgrad": True}),
    "adam maximize": ("Adam", {"maximize": True, "weight_decay": 0.1, "eps": 1e-2}),
    "adamw": ("AdamW", {}),
    "adamw amsgrad": ("AdamW", {"betas": (0.8, 0.5), "amsgrad": True, "weight_decay": 0.1}),
    "adamw maximize": ("AdamW", {"maximize": True, "weight_decay": 0.1}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def rule_of(name: str) -> Rule:
    kind, options = OPTIMIZERS[name]
    return getattr(rules, kind)(**options)


def torch_optimizer(name: str, weight: Tensor) -> torch.optim.Optimizer:
    kind, options = OPTIMIZERS[name]
    return getattr(torch.optim, kind)([weight], lr=0.1, **options)


def tucker(
    shape: tuple[int, ...], ranks: tuple[int, ...], seed: int
) -> tuple[Tensor, list[Tensor]]:
    bases = [
        orthonormal(n, r, seed + 1 + i) for i, (n, r) in enumerate(zip(shape, ranks, strict=True))
    ]
    return gaussian(ranks, seed), bases


def gradient_of(shape: tuple[int, ...]):
    """A gradient that grows and shrinks from call to call, in every entry otherwise."""
    scale = gaussian(shape, 3).abs()
    calls = itertools.count()

    def gradient_at(weight: Tensor) -> Tensor:
        return (scale * weight - 1) * (1.5 + math.sin(3 * next(calls)))

    return gradient_at


# --- torch.optim --------------------------------------------------------------------------------


@every_optimizer
def test_a_rule_is_the_optimizer_of_torch(name: str) -> None:
    weight = torch.nn.Parameter(gaussian((3, 4), 0))
    optimizer, rule = torch_optimizer(name, weight), rule_of(name)
    twin, moments = weight.detach().clone(), {}
    gradient_at = gradient_of((3, 4))
    for step in range(1, 7):
        weight.grad = gradient_at(weight.detach())
        direction, moments = rule.advance(weight.grad.clone(), twin, moments, step)
        twin = twin - 0.1 * direction
        optimizer.step()
        assert_close(twin, weight.detach(), rtol=0, atol=1e-13)
        kept = optimizer.state[weight]
        assert moments.keys() == {
            key for key, value in kept.items() if key != "step" and value is not None
        }
        for key, moment in moments.items():
            assert_close(moment, kept[key], rtol=0, atol=1e-13)


@every_optimizer
@pytest.mark.parametrize("retraction", [{"tau": 0}, {}])
def test_parallel_with_full_ranks_is_the_optimizer_of_torch_on_the_core(
    name: str, retraction: dict
) -> None:
    shape = (3, 2, 4)
    core, factors = tucker(shape, shape, 5)
    weight = torch.nn.Parameter(core.clone())
    optimizer, gradient_at, state = torch_optimizer(name, weight), gradient_of(shape), None
    inward = [u.T for u in factors]
    for _ in range(5):
        gradient = gradient_at(tucker_to_dense(core, factors))
        weight.grad = multi_product(gradient, inward)
        optimizer.step()
        core, factors, state = parallel_step(
            core, factors, gradient, state, rule=rule_of(name), lr=0.1, **retraction
        )
        assert_close(core, weight.detach(), rtol=0, atol=1e-11)
        check_core_moments(state, factors, optimizer.state[weight])


@every_optimizer
@pytest.mark.parametrize("core_steps", [1, 3])
def test_bug_with_full_ranks_is_the_optimizer_of_torch_on_the_core(
    name: str, core_steps: int
) -> None:
    shape = (3, 2, 4)
    core, factors = tucker(shape, shape, 5)
    weight = torch.nn.Parameter(core.clone())
    optimizer, gradient_at, state = torch_optimizer(name, weight), gradient_of(shape), None
    inward = [u.T for u in factors]
    seen: list[Tensor] = []

    def recorded(at: Tensor) -> Tensor:
        seen.append(gradient_at(at))
        return seen[-1]

    for _ in range(3):
        seen.clear()
        core, factors, state = bug_step(
            *(core, factors, recorded, state),
            rule=rule_of(name),
            lr=0.1,
            core_steps=core_steps,
            tau=0,
        )
        for gradient in seen[1:]:  # the first chose the bases
            weight.grad = multi_product(gradient, inward)
            optimizer.step()
        assert_close(core, weight.detach(), rtol=0, atol=1e-11)
        check_core_moments(state, factors, optimizer.state[weight])


def check_core_moments(state: State, factors: list[Tensor], kept: dict) -> None:
    for name, moment in state.first.items():
        expected = tucker_to_dense(kept[name], factors)
        assert_close(moment, expected, rtol=0, atol=1e-11)
    for name, blocks in state.second.items():
        assert blocks.keys() == {CORE}
        assert_close(blocks[CORE], kept[name], rtol=0, atol=1e-11)


# --- tangent coordinates ------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [None, (0, 2)])
def test_coordinates_give_the_projection(modes: tuple[int, ...] | None) -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    if modes:
        core, factors[1] = gaussian((3, 5, 2), 0), torch.eye(5, dtype=torch.float64)
    z = gaussian((6, 5, 4), 50)
    blocks = coordinates(core, factors, z, modes)
    assert list(blocks) == [CORE, *(modes or range(3))]
    projected = tangent_projection(core, factors, z)
    assert_close(tangent_tensor(core, factors, blocks), projected, rtol=0, atol=1e-12)
    norm = sum(block.square().sum() for block in blocks.values())
    assert_close(norm, projected.square().sum())


@pytest.mark.parametrize("name", ["nesterov", "amsgrad", "adamw"])
@pytest.mark.parametrize("integrator", ["parallel", "bug"])
@pytest.mark.parametrize("retraction", [{"tau": 0.2}, {"ranks": (3, 2, 2)}, {}])
def test_signs_of_columns_do_not_matter(name: str, integrator: str, retraction: dict) -> None:
    if integrator == "bug" and not retraction:
        retraction = {"tau": 0}
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    flips = [torch.tensor([1.0, -1, -1]).double()[:r] for r in core.shape]
    start = (
        multi_product(core, [f.diag() for f in flips]),
        [u * f for u, f in zip(factors, flips, strict=True)],
    )
    ends = []
    for point in ((core, factors), start):
        gradient_at, state = gradient_of((6, 5, 4)), None
        for _ in range(4):
            if integrator == "parallel":
                *point, state = parallel_step(
                    *point,
                    gradient_at(tucker_to_dense(*point)),
                    state,
                    rule=rule_of(name),
                    lr=0.05,
                    **retraction,
                )
            else:
                *point, state = bug_step(
                    *point, gradient_at, state, rule=rule_of(name), lr=0.05, **retraction
                )
        ends.append((tucker_to_dense(*point), state))
    (weight, state), (other_weight, other_state) = ends
    assert_close(other_weight, weight, rtol=0, atol=1e-9)
    for key, moment in state.first.items():
        assert_close(other_state.first[key], moment, rtol=0, atol=1e-9)
    for key, blocks in state.second.items():
        for block, moment in blocks.items():
            assert_close(other_state.second[key][block], moment, rtol=0, atol=1e-8)


def test_the_direction_of_adam_is_tangent() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    direction, _ = advance(core, factors, gaussian((6, 5, 4), 7), None, rules.Adam())
    projected = tangent_projection(core, factors, direction)
    assert_close(projected, direction, rtol=0, atol=1e-12)


def test_the_basis_step_of_bug_advances_no_moment() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    rule = rules.Adam()
    _, state = advance(core, factors, gaussian((6, 5, 4), 7), None, rule)
    lifted = bug_basis_step(core, factors, gaussian((6, 5, 4), 8), state, rule=rule)
    assert lifted.count == state.count == 1
    old = tuple(slice(r) for r in core.shape)
    moment = state.second["exp_avg_sq"][CORE]
    assert torch.equal(lifted.second["exp_avg_sq"][old], moment)
    assert_close(lifted.weight, tucker_to_dense(core, factors), rtol=0, atol=1e-13)


# --- second moments -----------------------------------------------------------------------------

SHAPE = (6, 5, 4)
RANKS = [(3, 2, 2), (4, 3, 2), (2, 2, 1), (6, 3, 2), (2, 5, 4), (6, 5, 4)]
every_move = pytest.mark.parametrize(("ranks", "new_ranks"), list(itertools.product(RANKS, RANKS)))


def second_moments(factors: list[Tensor], seed: int, core_shape: tuple[int, ...]) -> Blocks:
    moments: Blocks = {CORE: gaussian(core_shape, seed).square()}
    for mode in moving_modes(factors):
        moments[mode] = gaussian(factors[mode].shape, seed + 1 + mode).square()
    return moments


def near(factors: list[Tensor], ranks: tuple[int, ...]) -> list[Tensor]:
    """Bases of other ranks that share most of their span with the old ones."""
    bases = []
    for mode, (u, r) in enumerate(zip(factors, ranks, strict=True)):
        other = torch.cat([u, orthonormal(len(u), len(u), 30 + mode)], dim=1)[:, :r]
        bases.append(torch.linalg.qr(other + 0.1 * gaussian(other.shape, 40 + mode))[0])
    return bases


def test_mixing_weights_by_hand() -> None:
    matrix = torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.0, 0.0]]).double()
    expected = torch.tensor([[0.68, 0.32], [0.18, 0.82], [0.5, 0.5]]).double()
    assert_close(mixing_weights(matrix), expected)
    rotation = orthonormal(4, 4, 0)
    assert_close(mixing_weights(rotation), rotation.square())


@every_move
def test_transport_keeps_constants_and_bounds(
    ranks: tuple[int, ...], new_ranks: tuple[int, ...]
) -> None:
    core, factors = tucker(SHAPE, ranks, 0)
    old, new = (core, factors), (gaussian(new_ranks, 9), near(factors, new_ranks))
    moments = second_moments(factors, 60, ranks)
    moved = transport_second(moments, old, new)
    assert list(moved) == [CORE, *moving_modes(new[1])]
    assert_within(moved[CORE], moments[CORE])
    for mode in moving_modes(new[1]):
        assert moved[mode].shape == new[1][mode].shape
        if mode in moments:  # row by row: a row of a part stays the row of an index of the weight
            for row, old_row in zip(moved[mode], moments[mode], strict=True):
                assert_within(row, old_row)
        else:
            mean = float(moved[CORE].mean())
            assert_close(moved[mode], torch.full_like(moved[mode], mean))
    constant = {block: torch.full_like(moment, 0.7) for block, moment in moments.items()}
    for moment in transport_second(constant, old, new).values():
        assert_close(moment, torch.full_like(moment, 0.7))


@every_move
def test_lift_and_retraction_keep_constants_and_bounds(
    ranks: tuple[int, ...], new_ranks: tuple[int, ...]
) -> None:
    core, factors = tucker(SHAPE, ranks, 0)
    bases = [
        orthonormal(len(u), min(2 * r, len(u)), 20)
        for u, r in zip(factors, core.shape, strict=True)
    ]
    moment = gaussian(ranks, 60).square()
    lifted = lift_second(moment, bases)
    assert torch.equal(lifted[tuple(slice(r) for r in ranks)], moment)
    assert_within(lifted, moment)

    new_ranks = tuple(min(r, b.shape[1]) for r, b in zip(new_ranks, bases, strict=True))
    new_core, rotations = truncate(gaussian(lifted.shape, 61), ranks=new_ranks)
    moved = retract_second(lifted, bases, rotations, new_core)
    for block, part in moved.items():
        assert_within(part, lifted)
        assert part.shape == (
            new_core.shape if block == CORE else (SHAPE[block], new_core.shape[block])
        )
    constant = retract_second(torch.full_like(lifted, 0.7), bases, rotations, new_core)
    for part in constant.values():
        assert_close(part, torch.full_like(part, 0.7))


def assert_within(moved: Tensor, old: Tensor) -> None:
    assert moved.min() >= old.min() - 1e-13 >= -1e-13
    assert moved.max() <= old.max() + 1e-13


def test_a_weight_that_stays_keeps_its_moments() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    moments = second_moments(factors, 60, tuple(core.shape))
    for block, moment in transport_second(moments, (core, factors), (core, factors)).items():
        assert_close(moment, moments[block], rtol=0, atol=1e-13)


def test_permuted_columns_permute_the_moments() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    order = [torch.tensor([2, 0, 1]), torch.tensor([1, 0]), torch.tensor([0, 1])]
    new_core = core[order[0]][:, order[1]][:, :, order[2]]
    new = new_core, [u[:, o] for u, o in zip(factors, order, strict=True)]
    moments = second_moments(factors, 60, tuple(core.shape))
    moved = transport_second(moments, (core, factors), new)
    expected = moments[CORE][order[0]][:, order[1]][:, :, order[2]]
    assert_close(moved[CORE], expected, rtol=0, atol=1e-13)


def test_a_lift_that_is_undone_keeps_the_moments_of_the_core() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    bases = [torch.linalg.qr(torch.cat([u, gaussian(u.shape, 70)], dim=1))[0] for u in factors]
    moment = gaussian(core.shape, 60).square()
    rotations = [torch.eye(b.shape[1], r).double() for b, r in zip(bases, core.shape, strict=True)]
    undone = retract_second(lift_second(moment, bases), bases, rotations, core)
    assert_close(undone[CORE], moment, rtol=0, atol=1e-13)


def test_sgd_keeps_no_moments_without_momentum() -> None:
    core, factors = tucker((6, 5, 4), (3, 2, 2), 0)
    gradient = gaussian((6, 5, 4), 7)
    *_, state = parallel_step(core, factors, gradient, rule=SGD(), lr=0.1, tau=0.1)
    assert state == State(1, {}, {})
