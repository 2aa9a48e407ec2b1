"""Steps that would make a number that is not finite: they are refused, and change no bit."""

import copy
import math

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import INTEGRATORS, OPTIMIZERS, Small

POLICIES = {
    "fixed": tdlrt.FixedRank(),
    "tolerance": tdlrt.RelativeTolerance(0.2),
    "budget": tdlrt.ParameterBudget(0.5),
}
RULES = ["nesterov", "adam", "adamw", "amsgrad"]


def core_gradient(problem):
    problem.layers[1].core.grad[0, 0] = math.inf


def basis_gradient(problem):
    basis = problem.layers[0].factors[0]
    if basis.grad is None:  # `bug` between its passes
        core_gradient(problem)
    else:
        basis.grad[0, 0] = math.nan


def plain_gradient(problem):
    problem.model[-1].bias.grad[0] = -math.inf


def state_of_a_layer(problem):
    """Finite gradients: their squares are not, nor is their norm."""
    set_rate(problem, 1e-38)
    problem.layers[1].core.grad.fill_(3e38)


def plain_state(problem):
    """Finite gradients: their squares are not, nor is their sum with `almost_infinite`."""
    set_rate(problem, 1e-38)
    problem.model[-1].bias.grad.fill_(3e38)


def almost_infinite(problem):
    state = problem.optimizer.state[problem.model[-1].bias]
    if "momentum_buffer" in state:
        state["momentum_buffer"].fill_(3e38)


def plain_value(problem):
    """The rate of the plain parameters alone; Adam divides by the gradient, but not by the rate."""
    problem.optimizer.param_groups[1]["lr"] = 3e38
    problem.model[-1].bias.grad.fill_(1e3)


def rate(problem):
    set_rate(problem, 3e38)
    for parameter in problem.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1e3)


def set_rate(problem, lr):
    for group in problem.optimizer.param_groups:
        group["lr"] = lr


WAYS = pytest.mark.parametrize(
    "spoil",
    [
        core_gradient,
        basis_gradient,
        plain_gradient,
        state_of_a_layer,
        plain_state,
        plain_value,
        rate,
    ],
    ids=lambda way: way.__name__,
)


# Where the rate overflows in torch's own arithmetic, its optimisers raise a RuntimeError.
REFUSALS = (tdlrt.NonFiniteError, RuntimeError)


def everything(problem):
    """All that a step may change, with the bits of all tensors."""
    gradients = {n: p.grad for n, p in problem.model.named_parameters()}
    found = (
        problem.model.state_dict(),
        problem.optimizer.state_dict(),
        problem.optimizer._engine.adaptation.curvatures,
        gradients,
        problem.ranks,
        problem.optimizer.examines_next,
    )
    return copy.deepcopy(found)


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [bits(of) for of in value]
    return value


@WAYS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer_name", RULES)
@pytest.mark.parametrize(("integrator", "calls"), [("parallel", 3), ("bug", 2), ("bug", 3)])
def test_a_refused_step_changes_no_bit(integrator, calls, optimizer_name, policy, spoil):
    options = {"tau": None, "rank_policy": POLICIES[policy], "integrator": integrator}
    problem, twin = (Small(optimizer_name, **options) for _ in range(2))
    for one in (problem, twin):
        one.call(calls)
        if spoil is plain_state:
            almost_infinite(one)
    problem.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in problem.model.parameters()]
    spoil(problem)
    before = everything(problem)
    # The basis step takes no step of the optimiser, and the core step no gradients of bases.
    harmless = {2: (plain_state, plain_value, rate), 3: (basis_gradient,)}
    if integrator == "bug" and spoil in harmless[calls]:
        problem.optimizer.step()
        assert all(p.isfinite().all() for p in problem.model.parameters())
        return
    with pytest.raises(REFUSALS, match=r"nothing was changed|converted to type float without"):
        problem.optimizer.step()
    assert bits(everything(problem)) == bits(before)
    set_rate(problem, OPTIMIZERS[optimizer_name][1]["lr"])
    for parameter, gradient in zip(problem.model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    twin.backward()
    for one in (problem, twin):  # and leaves nothing behind that shows later
        if spoil is plain_state:
            for value in one.optimizer.state[one.model[-1].bias].values():
                value.zero_()
        one.optimizer.step()
        one.call(3)
    assert bits(everything(problem)) == bits(everything(twin))


@WAYS
@pytest.mark.parametrize("optimizer_name", ["sgd", "momentum", "adam"])
@INTEGRATORS
def test_the_first_step_can_be_refused(integrator, optimizer_name, spoil):
    """There is no state yet, and there is none afterwards."""
    problem = Small(optimizer_name, integrator=integrator)
    if integrator == "bug":
        problem.call()
    problem.backward()
    spoil(problem)
    before = everything(problem)
    try:
        problem.optimizer.step()
    except REFUSALS:
        assert bits(everything(problem)) == bits(before)
    else:
        assert all(p.isfinite().all() for p in problem.model.parameters())
        states = [v for of in problem.optimizer.state.values() for v in of.values()]
        assert all(value.isfinite().all() for value in states)


@WAYS
@pytest.mark.parametrize("optimizer_name", RULES)
def test_a_refused_step_changes_no_bit_on_the_device(optimizer_name, spoil):
    problem = Small(
        optimizer_name,
        tau=None,
        rank_policy=POLICIES["fixed"],
        capturable=True,
        skip_nonfinite=1,
    )
    problem.call(3)
    almost_infinite(problem)
    problem.backward()
    spoil_rates(problem, spoil)
    before = everything(problem)
    problem.optimizer.step()
    after = everything(problem)
    assert after[1]["tdlrt"]["skipped_steps"] == 1
    for found, expected in ((after, before),):
        found[1]["tdlrt"].update(skipped_steps=0, steps=expected[1]["tdlrt"]["steps"])
    assert bits(after) == bits(before)


def spoil_rates(problem, spoil):
    """The same with rates that are tensors."""
    spoil(problem)
    for group in problem.optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["adam", "amsgrad"])
def test_squares_that_overflow_reach_no_basis(integrator, optimizer_name):
    """Finite gradients of 1e21, whose squares are infinite in float32."""
    problem = Small(optimizer_name, integrator=integrator, tau=0.1, skip_nonfinite=9)
    for call in range(8):
        problem.backward()
        if call in (3, 4):
            for parameter in problem.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(1e21)
        problem.optimizer.step()
        states = [v for of in problem.optimizer.state.values() for v in of.values()]
        assert all(v.isfinite().all() for v in [*problem.model.parameters(), *states])
    assert problem.optimizer.skipped_steps == 2


def test_adam_in_float16_divides_by_zero():
    """The eps of 1e-8 is zero in float16: a gradient of zero makes torch's Adam NaN."""
    problem = Small("adam", dtype=torch.float16)
    problem.backward()
    problem.optimizer.clip_grad_norm_(1e9)  # makes the masters
    problem.backward()
    problem.model[-1].bias.grad.zero_()
    before = everything(problem)
    with pytest.raises(tdlrt.NonFiniteError, match=r"\d\.bias: its value .* after the step"):
        problem.optimizer.step()
    assert bits(everything(problem)) == bits(before)


def test_a_master_that_float16_cannot_hold():
    options = {"tau": None, "rank_policy": POLICIES["fixed"], "dtype": torch.float16}
    problem = Small("sgd", lr=1.0, **options)
    problem.call()
    problem.backward()
    problem.layers[1].core.grad.fill_(6e4)
    before = everything(problem)
    problem.optimizer.param_groups[0]["lr"] = 10.0
    with pytest.raises(tdlrt.NonFiniteError, match="weight: the step would make it"):
        problem.optimizer.step()
    set_rate(problem, 1.0)
    assert bits(everything(problem)) == bits(before)


def test_a_gradient_that_the_plain_optimiser_refuses_changes_nothing():
    problem = Small("adam")
    problem.call(2)
    problem.backward()
    before = everything(problem)
    bias = problem.model[-1].bias
    gradient, bias.grad = bias.grad, bias.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        problem.optimizer.step()
    bias.grad = gradient
    assert bits(everything(problem)) == bits(before)


@INTEGRATORS
def test_nesterov_momentum_leaves_gradients_alone(integrator):
    """Torch adds it to the gradients of plain parameters, in the version for many tensors."""
    problem = Small("nesterov", integrator=integrator, tau=None, rank_policy=POLICIES["fixed"])
    problem.call(3)
    problem.backward()
    plain = [problem.model[-1].weight, problem.model[-1].bias]
    before = [p.grad.clone() for p in plain]
    problem.optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(plain, before, strict=True))


def test_a_sparse_gradient_that_overflows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8))
    tdlrt.factorize_(model, rank=0.5, include="*")
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1)
    model(torch.tensor([1, 3])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.tensor([1, 3])).square().sum().backward()
    model[0].weight.grad.mul_(1e37)
    optimizer.param_groups[1]["lr"] = 1e3
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tdlrt.NonFiniteError, match=r"0\.weight: its value"):
        optimizer.step()
    assert bits(before) == bits(model.state_dict())
