"""Both integrators equal their float64 twins, step after step, momentum included."""

import pytest
import torch

import tdlrt
from optim.problems import LAYERS, Regression, dense_momentum
from reference import integrators
from reference.algebra import tangent_projection
from reference.cases import relative_error

EXACT = 1e-10
RANKS = {"linear": 0.4, "conv1d": 0.5, "conv2d": 0.5, "conv3d": (2, 2, 1, 2, 1)}


def snapshot(layer):
    return layer.core.detach().clone(), [factor.detach().clone() for factor in layer.factors]


@pytest.mark.parametrize("kind", LAYERS)
def test_parallel_step_is_riemannian_gradient_descent(kind):
    problem = Regression(kind, rank=RANKS[kind])
    before = problem.layer.dense_weight().detach()
    gradient = tangent_projection(*snapshot(problem.layer), problem.dense_gradient(before))
    optimizer = tdlrt.TDLRT(problem.model, torch.optim.SGD, lr=0.1, tau=0.0)

    optimizer.step(problem.closure)

    assert relative_error(problem.layer.dense_weight(), before - 0.1 * gradient) < EXACT
    problem.layer.check_invariants()


@pytest.mark.parametrize("kind", LAYERS)
def test_bug_step_is_projected_gradient_descent(kind):
    problem = Regression(kind, rank=RANKS[kind])
    before = problem.layer.dense_weight().detach()
    expected = before - 0.1 * problem.dense_gradient(before)
    optimizer = tdlrt.TDLRT(problem.model, torch.optim.SGD, lr=0.1, tau=0.0, integrator="bug")

    optimizer.step(problem.closure)

    for mode, basis in enumerate(problem.layer.factors):
        projector = basis.detach() @ basis.detach().T
        expected = torch.tensordot(projector, expected, ([1], [mode])).movedim(0, mode)
    assert relative_error(problem.layer.dense_weight(), expected) < EXACT
    problem.layer.check_invariants()


SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "decay": {"momentum": 0.9, "weight_decay": 0.05},
}
POLICIES = {
    "fixed": tdlrt.FixedRank(),
    "tau": tdlrt.RelativeTolerance(0.1),
    "exact": tdlrt.RelativeTolerance(0.0),
}


CASES = [
    (integrator, setting)
    for integrator in ("parallel", "bug", "bug3")
    for setting in SETTINGS
    if integrator == "parallel" or setting != "dampening"  # the twin of `bug` has none
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("integrator", "setting"), CASES)
def test_trajectory_equals_the_twin(kind, policy, setting, integrator):
    options = SETTINGS[setting]
    problem = Regression(kind, rank=RANKS[kind])
    core_steps = 3 if integrator == "bug3" else 1
    optimizer = tdlrt.TDLRT(
        problem.model,
        torch.optim.SGD,
        lr=0.02,
        rank_policy=POLICIES[policy],
        integrator=integrator[:3] if core_steps > 1 else integrator,
        core_steps=core_steps,
        **options,
    )
    problem.layer.bias.requires_grad_(False)  # the twin knows the weight alone
    core, factors = snapshot(problem.layer)
    momentum = None
    tuning = {"lr": 0.02, "mu": options.get("momentum", 0.0)}
    tuning["weight_decay"] = options.get("weight_decay", 0.0)
    target = {"tau": getattr(POLICIES[policy], "tau", None)}
    if policy == "fixed" and integrator != "parallel":
        target = {"ranks": core.shape}
    for _ in range(6):
        if integrator == "parallel":
            gradient = problem.dense_gradient(
                integrators.tucker_to_dense(core, factors),
            )
            core, factors, momentum = integrators.parallel_step(
                *(core, factors, gradient, momentum),
                dampening=options.get("dampening", 0.0),
                **tuning,
                **target,
            )
        else:
            core, factors, momentum = integrators.bug_step(
                *(core, factors, problem.dense_gradient, momentum),
                core_steps=core_steps,
                **tuning,
                **target,
            )
        momentum = momentum if tuning["mu"] else None

        optimizer.step(problem.closure)

        assert problem.layer.ranks == tuple(core.shape)
        weight = integrators.tucker_to_dense(core, factors)
        assert relative_error(problem.layer.dense_weight(), weight) < EXACT
        if momentum is not None:
            assert relative_error(dense_momentum(optimizer, problem.layer), momentum) < 1e-8


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_unfactorised_kernel_modes_follow_the_twin(integrator):
    problem = Regression("conv2d", modes="channels")
    problem.layer.bias.requires_grad_(False)
    optimizer = tdlrt.TDLRT(
        problem.model, torch.optim.SGD, lr=0.02, momentum=0.9, tau=0.1, integrator=integrator
    )
    core, factors = snapshot(problem.layer)
    momentum = None
    for _ in range(4):
        gradient = problem.dense_gradient
        if integrator == "parallel":
            gradient = gradient(integrators.tucker_to_dense(core, factors))
        step = getattr(integrators, f"{integrator}_step")
        core, factors, momentum = step(
            core, factors, gradient, momentum, lr=0.02, mu=0.9, tau=0.1, modes=(0, 1)
        )
        optimizer.step(problem.closure)
        assert problem.layer.ranks == tuple(core.shape)
        weight = integrators.tucker_to_dense(core, factors)
        assert relative_error(problem.layer.dense_weight(), weight) < EXACT


def test_alternating_calls_equal_the_closure():
    weights = []
    for closure in (True, False):
        problem = Regression("conv2d")
        optimizer = tdlrt.TDLRT(
            problem.model,
            torch.optim.SGD,
            lr=0.02,
            momentum=0.9,
            tau=0.1,
            integrator="bug",
            core_steps=2,
        )
        for _ in range(4):
            if closure:
                optimizer.step(problem.closure)
            else:
                for _ in range(3):
                    problem.closure()
                    optimizer.step()
        weights.append(problem.layer.dense_weight())
    assert torch.equal(*weights)
