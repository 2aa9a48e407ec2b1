"""`rest=`: optimisers of the user's own for the parameters that are not in Tucker format."""

import copy
import math

import pytest
import torch
from torch import nn, optim

import tdlrt
from optim.problems import INTEGRATORS, Small, assert_same


class Eight(optim.Optimizer):
    """Momentum in 8 bits with a scale, numbers in the group and counts that are Python's."""

    def __init__(self, params, lr=0.01, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["codes"] = torch.zeros_like(parameter, dtype=torch.int8)
                    state["absmax"], state["count"] = torch.zeros(1), 0
                past = state["codes"].float() / 127 * state["absmax"]
                now = group["momentum"] * past + parameter.grad
                state["absmax"] = now.abs().max()[None]
                state["codes"].copy_((now / (state["absmax"] + 1e-30) * 127).round())
                state["count"] += 1
                parameter.sub_(now, alpha=group["lr"])


class Both(optim.Optimizer):
    """A wrapper of two optimisers, with their groups."""

    def __init__(self, parameters):
        wide = [p for p in parameters if p.ndim > 1]
        thin = [p for p in parameters if p.ndim < 2]
        self.parts = [optim.SGD(wide, lr=0.1, momentum=0.9), optim.Adam(thin, lr=0.01)]
        super().__init__(parameters, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        return {p: of for part in self.parts for p, of in part.state.items()}

    @state.setter
    def state(self, value):
        pass

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def muon_and_adam(parameters):
    wide = [p for p in parameters if p.ndim == 2]
    return [
        optim.Muon(wide, lr=0.02),
        optim.AdamW([p for p in parameters if p.ndim != 2], lr=0.01),
    ]


RESTS = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "groups": lambda p: optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
    "fused": lambda parameters: optim.AdamW(parameters, lr=0.01, fused=True),
    "several": lambda p: [optim.SGD(p[:2], lr=0.1), optim.Adam(p[2:], lr=0.01)],
    "eight": Eight,
    "muon": muon_and_adam,
}
EVERY_REST = pytest.mark.parametrize("name", RESTS)


def small(name, integrator="parallel", **options):
    if name == "muon" and not hasattr(optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    rest = RESTS[name] if isinstance(name, str) else name
    return Small("momentum", integrator=integrator, rest=rest, tau=0.3, **options)


def plain_of(problem):
    tucker = {id(p) for layer in problem.layers for p in (layer.core, *layer.factors)}
    return [p for p in problem.model.parameters() if id(p) not in tucker]


@EVERY_REST
def test_the_rest_moves_as_by_its_own_optimiser(name):
    problem = small(name)
    plain = plain_of(problem)
    twins = [nn.Parameter(p.detach().clone()) for p in plain]
    made = RESTS[name](twins)
    for _ in range(4):
        problem.backward()
        for twin, parameter in zip(twins, plain, strict=True):
            twin.grad = parameter.grad.clone()
        problem.optimizer.step()
        for optimizer in made if isinstance(made, list) else [made]:
            optimizer.step()
        assert_same([t.detach() for t in twins], [p.detach() for p in plain])


@INTEGRATORS
@EVERY_REST
def test_a_resumed_training_is_the_same_to_the_last_bit(name, integrator):
    problem = small(name, integrator)
    problem.step(3)
    stored = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.step(3)
    resumed = small(name, integrator)
    resumed.model.load_state_dict(stored[0])
    resumed.optimizer.load_state_dict(stored[1])
    resumed.step(3)
    assert_same(problem.model.state_dict(), resumed.model.state_dict())


def bits(value):
    """Everything, without identities."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: bits(of) for key, of in value.items()}
    return [bits(of) for of in value] if isinstance(value, list | tuple) else value


def everything(problem):
    return bits(copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict())))


@pytest.mark.parametrize("steps", [0, 3])
@INTEGRATORS
@EVERY_REST
def test_a_refused_step_changes_no_bit(name, integrator, steps):
    problem = small(name, integrator)
    problem.step(steps)
    if integrator == "bug":
        problem.call()
    problem.backward()
    problem.layers[1].core.grad[0, 0] = math.nan
    before = everything(problem)
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert everything(problem) == before
    problem.call(3)


@EVERY_REST
def test_a_rest_that_overflows_is_refused(name):
    problem = small(name)
    problem.step(2)
    problem.backward()
    plain_of(problem)[0].grad[0] = math.inf
    before = everything(problem)
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert everything(problem) == before


def test_an_error_in_a_step_of_the_rest_is_taken_back():
    class Fails(Eight):
        def step(self, closure=None):
            super().step()
            if self.param_groups[0]["steps"] > 2:
                raise OverflowError("too far")

    problem = small(Fails)
    problem.step(2)
    problem.backward()
    before = everything(problem)
    with pytest.raises(OverflowError):
        problem.optimizer.step()
    assert everything(problem) == before


def test_groups_follow_and_schedulers_reach_them():
    problem = small("groups")
    optimizer = problem.optimizer
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.01]
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    problem.step()
    scheduler.step()
    stored = optimizer.state_dict()
    assert len(stored["param_groups"]) == 1
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05, 0.005]
    other = small("groups")
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(stored))
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.025, 0.05, 0.005]
    other.optimizer.param_groups[1]["lr"] = 0.0  # a group that was loaded is the one in use
    before = plain_of(other)[0].detach().clone()
    other.step()
    assert torch.equal(plain_of(other)[0].detach(), before)


def test_a_wrapper_with_groups_of_its_parts():
    problem = small(Both)
    scheduler = optim.lr_scheduler.StepLR(problem.optimizer, 1, gamma=0.5)
    problem.step()
    scheduler.step()
    groups = [g for part in problem.optimizer._engine.plain._optimizers for g in part.param_groups]
    assert [group["lr"] for group in groups] == [0.05, 0.005]


def test_a_layer_in_a_group_of_its_own_stands_behind_the_rest():
    problem = Small("momentum")
    layer = problem.layers[1]
    own = [{"params": [layer.core, *layer.factors], "lr": 0.02}]
    optimizer = tdlrt.TDLRT(
        problem.model, optim.SGD, lr=0.1, param_groups=own, rest=RESTS["groups"]
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.01, 0.02]
    problem.optimizer = optimizer
    problem.step(2)


def test_copies_belong_to_the_copied_model():
    problem = small("groups")
    problem.step()
    model, optimizer = copy.deepcopy((problem.model, problem.optimizer))
    before = copy.deepcopy(problem.model.state_dict())
    optimizer.param_groups[1]["lr"] = 1.0
    assert problem.optimizer.param_groups[1]["lr"] == 0.1
    twin = copy.copy(problem)
    twin.model, twin.optimizer = model, optimizer
    twin.step()
    assert_same(before, problem.model.state_dict())
    assert not torch.equal(plain_of(twin)[0], plain_of(problem)[0])


def test_gradient_scaling_skips_the_rest_too():
    problem = small("fused")
    problem.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for spoiled in (True, False):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        if spoiled:
            plain_of(problem)[0].grad[0] = math.inf
        before = everything(problem)
        scaler.unscale_(problem.optimizer)
        scaler.step(problem.optimizer)
        scaler.update()
        assert (everything(problem) == before) == spoiled


@pytest.mark.parametrize(
    ("rest", "error", "message"),
    [
        (3, tdlrt.UnsupportedOptimizerError, "rest: got 3, expected a function"),
        (lambda p: None, tdlrt.UnsupportedOptimizerError, "returns None"),
        (optim.LBFGS, tdlrt.UnsupportedOptimizerError, "LBFGS, whose step asks for a closure"),
        (lambda p: optim.SGD(p[1:]), ValueError, "in none of its optimisers .0.bias"),
        (lambda p: [optim.SGD(p), optim.Adam(p[:1])], ValueError, "twice"),
        (lambda p: optim.SGD([*p, nn.Parameter(torch.ones(2))]), ValueError, "not given to it"),
    ],
)
def test_what_rest_cannot_be(rest, error, message):
    problem = Small("momentum")
    with pytest.raises(error, match=message):
        tdlrt.TDLRT(problem.model, optim.SGD, lr=0.1, rest=rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": True}, "rest: got one with capturable=True"),
        ({"own": True}, "param_groups: got 5.bias with rest"),
    ],
)
def test_options_that_rest_excludes(options, message):
    problem = Small("momentum")
    if options.pop("own", False):
        options["param_groups"] = [{"params": [problem.model[5].bias]}]
    with pytest.raises(ValueError, match=message):
        tdlrt.TDLRT(problem.model, optim.SGD, lr=0.1, rest=RESTS["sgd"], **options)


@pytest.mark.parametrize(
    ("other", "spoil", "message"),
    [
        ("sgd", lambda extra: extra.pop("rest"), "got rest=None, expected 1"),
        ("sgd", lambda extra: extra.update(rest=[]), "got rest=0 states"),
        ("sgd", lambda extra: extra["rest"][0].pop("state"), "SGD cannot load"),
        ("several", lambda extra: None, "expected 2"),
        (None, lambda extra: None, "got groups of .* parameters"),
    ],
)
def test_a_state_of_another_rest_changes_nothing(other, spoil, message):
    problem = small("sgd")
    problem.step(2)
    stored = copy.deepcopy(problem.optimizer.state_dict())
    spoil(stored["tdlrt"])
    target = Small("momentum", tau=0.3) if other is None else small(other)
    target.step()
    target.model.load_state_dict(problem.model.state_dict())
    before = everything(target)
    with pytest.raises(tdlrt.IntegratorStateError, match=message):
        target.optimizer.load_state_dict(stored)
    assert everything(target) == before


@pytest.mark.parametrize("optimizer_cls", [optim.RMSprop, optim.NAdam, optim.Adam])
def test_a_copy_of_model_and_optimiser_goes_on_alone(optimizer_cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 6))
    tdlrt.factorize_(model, rank=0.5)

    def rest(parameters):
        return optim.SGD(parameters, lr=0.1, momentum=0.9)

    def call(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(3, 12)).square().mean().backward()
        optimizer.step()

    optimizer = tdlrt.TDLRT(model, optimizer_cls, lr=0.01, tau=0.1, rest=rest)
    call(model, optimizer)
    other, its = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    call(other, its)
    assert_same(model.state_dict(), before)
    call(model, optimizer)
    assert_same(model.state_dict(), other.state_dict())
