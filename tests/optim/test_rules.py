"""Any optimiser: torch's own classes on tangent coordinates, the registry, and what is refused."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn, optim

import tdlrt
from optim.problems import INTEGRATORS, Small, assert_same
from reference.cases import TuckerCase, gaussian, relative_error, stack
from tdlrt.linalg import TangentSpace, TangentVector, reject
from tdlrt.optim import Rule, adapted_rule, register_rule
from tdlrt.optim.rules import registry, resolve_rule

# With the options of each class: every one of them is in one of the cases.
CASES = {
    "nadam": (optim.NAdam, {}),
    "nadam decay": (optim.NAdam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "nadam decoupled": (
        optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "nadam plain": (optim.NAdam, {"momentum_decay": 0.0, "foreach": True}),
    "nadam no mean": (optim.NAdam, {"betas": (0.0, 0.9), "eps": 1e-6}),
    "radam": (optim.RAdam, {"weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "radam decoupled": (
        optim.RAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "adamax": (optim.Adamax, {}),
    "adamax decay": (optim.Adamax, {"weight_decay": 0.1, "maximize": True, "betas": (0.7, 0.9)}),
    "rmsprop": (optim.RMSprop, {}),
    "rmsprop centered": (optim.RMSprop, {"centered": True, "weight_decay": 0.1, "maximize": True}),
    "rmsprop momentum": (optim.RMSprop, {"momentum": 0.9, "alpha": 0.9}),
    "rmsprop both": (optim.RMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-4}),
    "adagrad": (optim.Adagrad, {}),
    "adagrad decay": (
        optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1, "maximize": True},
    ),
    "adadelta": (optim.Adadelta, {"rho": 0.8, "weight_decay": 0.1, "maximize": True}),
    "rprop": (optim.Rprop, {"etas": (0.4, 1.3), "step_sizes": (1e-5, 0.1)}),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def float64():
    """Torch counts in the default type, and NAdam's product of momenta is such a count."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


@INTEGRATORS
@EVERY_CASE
def test_at_full_rank_a_square_layer_moves_as_in_torch(case, integrator, float64):
    optimizer_cls, options = CASES[case]
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model = copy.deepcopy(dense)
    tdlrt.factorize_(model, rank="full")
    own = optimizer_cls(dense.parameters(), lr=0.01, **options)
    optimizer = tdlrt.TDLRT(
        model,
        optimizer_cls,
        lr=0.01,
        rank_policy=tdlrt.FixedRank(),
        integrator=integrator,
        **options,
    )
    inputs, labels = gaussian((8, 5), 1), torch.arange(8) % 3
    sign = -1 if options.get("maximize") else 1

    def closure(model=model, optimizer=optimizer):
        optimizer.zero_grad()
        loss = sign * nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    start = dense[0].weight.detach().clone()
    for number in range(50):
        for group in (*own.param_groups, *optimizer.param_groups):
            group["lr"] = 0.01 * (1 - number / 100)
        own.step(lambda: closure(dense, own))
        optimizer.step(closure)
    assert relative_error(model[0].dense_weight(), dense[0].weight) < 1e-10
    assert relative_error(model[2].weight, dense[2].weight) < 1e-10
    assert relative_error(dense[0].weight, start) > 1e-3


def small(case, integrator, **options):
    optimizer_cls, own = CASES[case]
    problem = Small("sgd", seed=1)
    policy = {"tau": 0.3, "integrator": integrator} | options
    problem.optimizer = tdlrt.TDLRT(problem.model, optimizer_cls, lr=0.01, **own, **policy)
    problem.sign = -1 if own.get("maximize") else 1
    return problem


@INTEGRATORS
@EVERY_CASE
def test_fifty_steps_with_changes_of_rank_and_a_resumed_training(case, integrator):
    problem, seen = small(case, integrator), set()
    for number in range(50):
        problem.step()
        seen.add(tuple(problem.ranks))
        if number == 4:
            stored = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    assert len(seen) > 2
    for layer in problem.layers:
        layer.check_invariants()
    assert all(p.isfinite().all() for p in problem.model.parameters())

    resumed = small(case, integrator)
    resumed.model.load_state_dict(stored[0])
    resumed.optimizer.load_state_dict(stored[1])
    resumed.step(45)
    assert_same(problem.model.state_dict(), resumed.model.state_dict())
    assert_same(problem.optimizer.state_dict(), resumed.optimizer.state_dict())


@pytest.mark.parametrize("case", ["nadam decay", "adagrad decay", "rmsprop both"])
def test_a_bug_step_resumed_between_its_calls(case):
    problem = small(case, "bug", core_steps=2)
    problem.call(10)
    stored = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.call(6)
    resumed = small(case, "bug", core_steps=2)
    resumed.model.load_state_dict(stored[0])
    resumed.optimizer.load_state_dict(stored[1])
    resumed.call(6)
    assert_same(problem.model.state_dict(), resumed.model.state_dict())


@pytest.mark.parametrize("case", ["nadam", "radam", "adagrad decay"])
def test_layers_of_a_batch_count_by_themselves(case, float64):
    """One that has rested for three steps moves as if it were alone."""
    optimizer_cls, options = CASES[case]
    sign = -1 if options.get("maximize") else 1

    def train(rests):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)])
        tdlrt.factorize_(model, rank="full")
        optimizer = tdlrt.TDLRT(
            model, optimizer_cls, lr=0.01, rank_policy=tdlrt.FixedRank(), **options
        )
        for number in range(8):
            optimizer.zero_grad()
            used = [model[1]] if number < 3 and rests else [model[0], model[1]]
            sum(sign * layer(gaussian((4, 5), 1)).square().sum() for layer in used).backward()
            optimizer.step()
        return model

    late, early = train(True), train(False)
    assert relative_error(late[1].dense_weight(), early[1].dense_weight()) < 1e-13
    torch.manual_seed(0)  # the layer that has rested: torch's own, five steps
    dense = nn.Linear(5, 5)
    own = optimizer_cls(dense.parameters(), lr=0.01, **options)
    for _ in range(5):
        own.zero_grad()
        (sign * dense(gaussian((4, 5), 1)).square().sum()).backward()
        own.step()
    assert relative_error(late[0].dense_weight(), dense.weight) < 1e-12


def test_a_variance_stays_one_where_bases_turn():
    """Equal gradients have a variance of zero in all bases: their mean moves with signs."""
    rule = resolve_rule(optim.RMSprop).from_group(
        optim.RMSprop([torch.zeros(1)], centered=True).defaults
    )
    gradient = [torch.full((1, 2, 2), 2.0)]
    state = {}
    for number in range(1, 200):
        _, state = rule.advance(gradient, gradient[0], state, [torch.tensor([float(number)])])
    assert set(state) == {"grad_avg", "square_avg_centered"}
    turned = {"grad_avg": [torch.full((1, 2, 2), 4.0)]}  # both rows and columns by 45 degrees
    turned["square_avg_centered"] = state["square_avg_centered"]
    direction, _ = rule.advance([torch.full((1, 2, 2), 4.0)], gradient[0], turned, [torch.ones(1)])
    assert direction[0].isfinite().all()


def test_a_size_is_stored_as_its_square():
    rule = resolve_rule(optim.Adamax).from_group(optim.Adamax([torch.zeros(1)]).defaults)
    _, state = rule.advance([torch.full((1, 1), -3.0)], torch.zeros(1, 1), {}, [torch.ones(1)])
    assert state["exp_inf_squared"][0].item() == pytest.approx(9.0)


@pytest.mark.parametrize("case", ["nadam", "rmsprop both", "rprop", "lion"])
def test_directions_and_momenta_are_tangent_vectors(case):
    optimizer_cls, options = CASES.get(case, (Lion, {}))
    rule_type = adapted_rule(Lion, linear=["exp_avg"])
    rule_type = rule_type if case == "lion" else resolve_rule(optimizer_cls)
    rule = rule_type.from_group(optimizer_cls([torch.zeros(1)], **options).defaults)
    space = TangentSpace(*stack([TuckerCase((6, 5), (3, 3), torch.float64, 0).tucker()]))
    moments = {}
    for number in range(1, 4):
        parts = {mode: gaussian((1, n, 3), number + mode) for mode, n in ((0, 6), (1, 5))}
        gradient = TangentVector(
            gaussian((1, 3, 3), 9), {m: reject(space.factor(m), part) for m, part in parts.items()}
        )
        count = torch.tensor([float(number)])
        direction, moments = rule.direction(gradient, moments, space, count)
    assert rule.first_moments[0] in moments
    for vector in (direction, *(moments[n] for n in rule.first_moments if n in moments)):
        for mode, part in vector.parts.items():
            assert part.any()
            assert (space.factor(mode).mT @ part).abs().max() < 1e-12


# --- the registry -------------------------------------------------------------------------------


class Lion(optim.Optimizer):
    """W (1 - lr weight_decay) - lr sign(b1 m + (1 - b1) g), m = b2 m + (1 - b2) g."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(mean.lerp(parameter.grad, 1 - first).sign(), alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - second)
        return loss


def test_a_class_of_ones_own_equals_itself_at_full_rank(own_registry, float64):
    register_rule(Lion, adapted_rule(Lion, linear=["exp_avg"], decoupled=True))
    CASES["lion"] = (Lion, {"weight_decay": 0.1})
    try:
        test_at_full_rank_a_square_layer_moves_as_in_torch("lion", "parallel", None)
    finally:
        del CASES["lion"]


def test_a_rule_reads_the_options_that_are_its_fields(own_registry):
    class Own(optim.SGD):
        pass

    @dataclass(frozen=True, kw_only=True)
    class OwnRule(Rule):
        first_moments: ClassVar[tuple[str, ...]] = ()
        dampening: float = 0.0

        def advance(self, gradients, weight, moments, steps):
            return [(1 - self.dampening) * of for of in gradients], {}

    register_rule(Own, OwnRule)
    problem = Small("sgd")
    optimizer = tdlrt.TDLRT(
        problem.model, Own, lr=0.1, dampening=1.0, rank_policy=tdlrt.FixedRank()
    )
    before = problem.layers[0].dense_weight().detach()
    problem.loss().backward()
    optimizer.step()
    assert relative_error(problem.layers[0].dense_weight(), before) < 1e-6


@pytest.mark.parametrize(
    ("optimizer_cls", "rule", "message"),
    [
        ("Adam", Rule, "optimizer_cls: got 'Adam'"),
        (nn.Linear, Rule, "optimizer_cls: got .*Linear"),
        (optim.ASGD, optim.ASGD, "rule: got .*ASGD"),
        (optim.ASGD, Rule, "rule: got Rule without advance and first_moments"),
    ],
)
def test_what_cannot_be_registered(optimizer_cls, rule, message):
    with pytest.raises(tdlrt.UnsupportedOptimizerError, match=message):
        register_rule(optimizer_cls, rule)
    assert optim.ASGD not in registry._RULES


class Normalised(Lion):
    """Divides by the norm of the gradient, which other entries have a part in."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad / parameter.grad.norm())


class Relative(Lion):
    """Moves by a share of the weight."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad * (1e-3 + parameter.abs()))


@pytest.mark.parametrize(
    ("optimizer_cls", "message"),
    [
        (Normalised, "depends on other entries"),
        (Relative, "depends on the weight"),
        (Lion, "its state has exp_avg, which its rule does not declare"),
        (optim.LBFGS, "failed on three numbers"),
        (optim.ASGD, "depends on the weight"),
    ],
)
def test_a_class_that_no_coordinates_can_have(optimizer_cls, message, own_registry):
    register_rule(optimizer_cls, adapted_rule(optimizer_cls))
    problem = Small("sgd")
    before = copy.deepcopy(problem.model.state_dict())
    with pytest.raises(tdlrt.UnsupportedOptimizerError, match=message):
        tdlrt.TDLRT(problem.model, optimizer_cls, lr=0.1)
    assert_same(before, problem.model.state_dict())


@pytest.mark.parametrize("kind", ["linear", "squares", "sizes"])
def test_a_string_is_no_list_of_names(kind):
    with pytest.raises(tdlrt.UnsupportedOptimizerError, match=rf"{kind}: .*pass \['exp_avg'\]"):
        adapted_rule(Lion, **{kind: "exp_avg"})


def test_a_captured_step_is_refused_with_the_reason():
    problem = Small("sgd")
    with pytest.raises(tdlrt.UnsupportedOptimizerError, match="capturable: got True with NAdam"):
        tdlrt.TDLRT(problem.model, optim.NAdam, capturable=True)


def test_momentum_that_begins_in_the_middle_changes_nothing():
    problem = small("rmsprop", "parallel")
    problem.step(2)
    for group in problem.optimizer.param_groups:
        group["momentum"] = 0.9
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    with pytest.raises((tdlrt.IntegratorStateError, KeyError), match="momentum_buffer"):
        problem.step()
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))


@pytest.mark.parametrize("case", ["nadam", "adamax", "rprop"])
def test_a_refused_step_changes_no_bit(case):
    problem = small(case, "parallel")
    problem.step(3)
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.backward()
    problem.model[-1].bias.grad[0] = float("inf")
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))
