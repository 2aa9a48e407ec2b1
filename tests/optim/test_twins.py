"""Both integrators equal their float64 twins, step after step, the optimiser's state included."""

import itertools

import pytest
import torch

import tdlrt
from optim.problems import LAYERS, Regression
from reference import integrators, rules
from reference.algebra import tangent_projection, tucker_to_dense
from reference.cases import relative_error
from reference.integrators import CORE

EXACT = 1e-10
RANKS = {
    "linear": 0.4,
    "tensor": 0.5,
    "split rows": (2, 3, 2, 2, 2),
    "conv1d": 0.5,
    "conv2d": 0.5,
    "conv3d": (2, 2, 1, 2, 1),
}


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


RATES = {"SGD": 0.05, "Adam": 0.1, "AdamW": 0.1}
SLOWER = {"nesterov": 0.03}  # three core steps a step would diverge
OPTIMIZERS = {
    "plain": ("SGD", {"weight_decay": 0.05}),
    "heavy ball": ("SGD", {"momentum": 0.9, "weight_decay": 0.05}),
    "dampening": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "sgd maximize": ("SGD", {"momentum": 0.9, "maximize": True, "weight_decay": 0.05}),
    "adam": ("Adam", {"eps": 1e-3}),
    "adam decay": ("Adam", {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.05}),
    "amsgrad": ("Adam", {"betas": (0.8, 0.5), "eps": 1e-3, "amsgrad": True}),
    "adam maximize": ("Adam", {"eps": 1e-3, "weight_decay": 0.05, "maximize": True}),
    "adamw": ("AdamW", {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw amsgrad": (
        "AdamW",
        {"betas": (0.8, 0.5), "eps": 1e-3, "amsgrad": True, "maximize": True},
    ),
}
"""By torch's names. With torch's eps of 1e-8 the first direction of Adam is a matrix of signs up to
1e-8. In bases as small as these it is often of lower rank up to 1e-8, and then new directions are
only determined up to 1e-16 / 1e-8."""

SCENARIOS = {
    "fixed": ("conv2d", 0.5, tdlrt.FixedRank()),
    "grow": ("conv2d", 0.5, tdlrt.RelativeTolerance(0.1)),
    "cut": ("conv1d", "full", tdlrt.RelativeTolerance(0.5)),
    "grow linear": ("linear", 0.4, tdlrt.RelativeTolerance(0.02)),
    "grow tensor": ("tensor", 0.5, tdlrt.RelativeTolerance(0.1)),
    "grow split rows": ("split rows", (2, 3, 2, 2, 2), tdlrt.RelativeTolerance(0.1)),
    "cut linear": ("linear", "full", tdlrt.RelativeTolerance(0.3)),
    "fixed linear": ("linear", 0.4, tdlrt.FixedRank()),
    "exact linear": ("linear", 0.4, tdlrt.RelativeTolerance(0.0)),
    "exact conv1d": ("conv1d", 0.5, tdlrt.RelativeTolerance(0.0)),
    "exact conv2d": ("conv2d", 0.5, tdlrt.RelativeTolerance(0.0)),
    "grow conv3d": ("conv3d", (2, 2, 1, 2, 1), tdlrt.RelativeTolerance(0.1)),
    "channels": ("conv2d", 0.5, tdlrt.RelativeTolerance(0.1)),
}
"""Layer, first ranks, policy. Where ranks are full at first and cut, modes begin to move."""


class Twin:
    """A layer with its optimiser, and the float64 twin of both from the same core and bases."""

    def __init__(self, scenario, optimizer, integrator, core_steps=1, **options):
        kind, rank, policy = SCENARIOS[scenario]
        name, tuning = OPTIMIZERS[optimizer]
        rate = SLOWER.get(optimizer, RATES[name])
        modes = "channels" if scenario == "channels" else "all"
        self.problem = Regression(kind, rank=rank, modes=modes)
        self.problem.layer.bias.requires_grad_(False)  # the twin knows the weight alone
        self.layer, self.integrator = self.problem.layer, integrator
        self.optimizer = tdlrt.TDLRT(
            self.problem.model,
            getattr(torch.optim, name),
            lr=rate,
            rank_policy=policy,
            integrator=integrator,
            core_steps=core_steps,
            **tuning,
            **options,
        )
        self.core, self.factors = snapshot(self.layer)
        self.state = None
        self.tuning = {"rule": getattr(rules, name)(**tuning), "lr": rate}
        self.target = {"modes": self.layer.learned_modes}
        if isinstance(policy, tdlrt.RelativeTolerance):
            self.target["tau"] = policy.tau
        elif integrator == "bug":
            self.target["ranks"] = self.core.shape
        if integrator == "bug":
            self.tuning["core_steps"] = core_steps

    def step(self, *, bases_rest=False, **target):
        """One step of the twin."""
        gradient = self.problem.dense_gradient
        if bases_rest:
            self.core, self.factors, self.state = integrators.core_alone_step(
                *(self.core, self.factors),
                gradient(tucker_to_dense(self.core, self.factors)),
                self.state,
                **self.tuning,
            )
            return
        if self.integrator == "parallel":
            gradient = gradient(tucker_to_dense(self.core, self.factors))
        self.core, self.factors, self.state = getattr(integrators, f"{self.integrator}_step")(
            *(self.core, self.factors, gradient, self.state),
            **self.tuning,
            **(self.target | target),
        )

    def check(self, tolerance=EXACT):
        """Weight and first moments as tensors; second moments, which know no signs, as stored."""
        layer, state = self.layer, self.optimizer.state
        assert layer.ranks == tuple(self.core.shape)
        core, factors = snapshot(layer)
        weight = tucker_to_dense(self.core, self.factors)
        assert relative_error(tucker_to_dense(core, factors), weight) < tolerance

        names = {*self.state.first, *self.state.second}
        assert set(state.get(layer.core, {})) - {"step", "basis_core"} == names
        moving = integrators.moving_modes(factors, layer.learned_modes)
        for name in names:
            parts = {mode: state[layer.factors[mode]][name] for mode in layer.learned_modes}
            assert all(part.shape == factors[mode].shape for mode, part in parts.items())
            assert not any(part.any() for mode, part in parts.items() if mode not in moving)
            blocks = {CORE: state[layer.core][name]} | {mode: parts[mode] for mode in moving}
            if name in self.state.first:
                rows = state[layer.core].get("basis_core", core)  # those of the parts
                moment = integrators.tangent_tensor(rows, factors, blocks)
                assert relative_error(moment, self.state.first[name]) < 10 * tolerance
            else:
                expected = self.state.second[name]
                assert blocks.keys() == expected.keys()
                for block in blocks:
                    error = relative_error(blocks[block], expected[block])
                    assert error < 10 * tolerance, (name, block)
        if self.state.second:
            assert float(state[layer.core]["step"]) == self.state.count


CASES = [
    *itertools.product(OPTIMIZERS, ["fixed", "grow"], ["parallel", "bug3"]),
    *itertools.product(OPTIMIZERS, ["cut", "grow linear"], ["parallel", "bug"]),
    *itertools.product(
        ["heavy ball", "adamw"], ["cut linear", "fixed linear", "channels"], ["parallel", "bug"]
    ),
    *itertools.product(
        ["amsgrad"],
        [
            *("exact linear", "exact conv1d", "exact conv2d", "grow conv3d"),
            *("grow tensor", "grow split rows"),
        ],
        ["parallel", "bug"],
    ),
]


@pytest.mark.parametrize(("optimizer", "scenario", "integrator"), CASES)
def test_trajectory_equals_the_twin(optimizer, scenario, integrator):
    core_steps = 3 if integrator == "bug3" else 1
    twin = Twin(scenario, optimizer, integrator.rstrip("3"), core_steps)
    for _ in range(6):
        twin.optimizer.step(twin.problem.closure)
        twin.step()
        twin.check()


@pytest.mark.parametrize("scenario", ["fixed", "grow", "cut", "fixed linear", "channels"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bases_that_rest_equal_the_twin(optimizer, scenario):
    twin = Twin(scenario, optimizer, "parallel", basis_every=3)
    for number in range(8):
        twin.optimizer.step(twin.problem.closure)
        twin.step(bases_rest=number % 3 != 0)
        twin.check()


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_adam_with_the_eps_of_torch(integrator, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adam", ("Adam", {}))
    twin = Twin("grow", "adam", integrator)
    for _ in range(6):
        twin.optimizer.step(twin.problem.closure)
        twin.step()
        twin.check(tolerance=1e-6)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
@pytest.mark.parametrize("optimizer", ["heavy ball", "adamw"])
def test_ranks_grow_and_shrink_where_the_scenario_says_so(optimizer, integrator):
    for scenario in ("grow", "grow linear", "cut", "cut linear"):
        twin = Twin(scenario, optimizer, integrator)
        ranks = twin.layer.ranks
        twin.optimizer.step(twin.problem.closure)
        changes = [new - old for old, new in zip(ranks, twin.layer.ranks, strict=True)]
        assert max(changes) > 0 if "grow" in scenario else min(changes) < 0


@pytest.mark.parametrize("optimizer", ["nesterov", "amsgrad", "adamw"])
@pytest.mark.parametrize("scenario", ["grow", "cut"])
def test_ranks_examined_every_other_step(optimizer, scenario):
    twin = Twin(scenario, optimizer, "parallel", adapt_every=2)
    for step in range(1, 7):
        twin.optimizer.step(twin.problem.closure)
        twin.step(**({"tau": None} if step % 2 else {}))
        twin.check()


@pytest.mark.parametrize(
    "optimizer", ["plain", "dampening", "nesterov", "adam decay", "amsgrad", "adamw amsgrad"]
)
def test_between_the_calls_of_bug_the_state_is_that_of_the_augmented_core(optimizer):
    twin = Twin("grow", optimizer, "bug", core_steps=2)
    rule, lr = twin.tuning["rule"], twin.tuning["lr"]
    gradient_at = twin.problem.dense_gradient
    for _ in range(2):
        point = twin.core, twin.factors
        gradient = gradient_at(tucker_to_dense(*point))
        lifted = integrators.bug_basis_step(*point, gradient, twin.state, rule=rule)
        for call in range(3):
            twin.problem.closure()
            twin.optimizer.step()
            if call < 2:
                check_lifted(twin.layer, twin.optimizer.state, lifted)
                gradient = gradient_at(lifted.weight)
                lifted = integrators.bug_core_step(lifted, gradient, rule=rule, lr=lr)
        twin.step()
        twin.check()


def check_lifted(layer, state, lifted):
    core, factors = snapshot(layer)
    assert relative_error(tucker_to_dense(core, factors), lifted.weight) < EXACT
    moments = dict(state.get(layer.core, {}))
    assert float(moments.pop("step", lifted.count)) == lifted.count
    assert moments.keys() == {*lifted.first, *lifted.second}
    assert not any(state.get(layer.factors[mode]) for mode in layer.learned_modes)
    for name, moment in lifted.first.items():
        assert relative_error(tucker_to_dense(moments[name], factors), moment) < EXACT
    for name, moment in lifted.second.items():
        assert relative_error(moments[name], moment) < EXACT


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
