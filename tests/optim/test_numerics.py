"""Numbers at their limits: skipped and counted, or gone through; no weight becomes NaN.

Elsewhere: errors that change nothing, half precision and layers without a gradient
(test_optimizer.py), full rank and gradient scalers (test_loops.py), small singular values against
the theory (tests/test_theory.py, tests/linalg/test_tangent.py).
"""

import copy
import math

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import (
    INTEGRATORS,
    LAYERS,
    Regression,
    Small,
    assert_same,
)


def poison(problem):
    """A backward pass whose gradients are not finite."""
    problem.backward()
    problem.layers[1].core.grad[0, 0] = math.nan


@INTEGRATORS
@pytest.mark.parametrize("calls", [2, 3])
def test_a_skipped_step_leaves_no_trace(integrator, calls):
    """Between the calls of `bug`, too: it waits for another gradient."""
    problem, twin = (Small(integrator=integrator, skip_nonfinite=1) for _ in range(2))
    for one in (problem, twin):
        one.call(calls)
    poison(problem)
    problem.optimizer.step()
    assert problem.optimizer.skipped_steps == 1
    for one in (problem, twin):
        one.call(3)
    assert_same(problem.model.state_dict(), twin.model.state_dict())
    twin.optimizer.skipped_steps = 1
    assert_same(problem.optimizer.state_dict(), twin.optimizer.state_dict())


@INTEGRATORS
@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_closure_is_skipped_too(integrator, failing_call):
    problem = Small(integrator=integrator, skip_nonfinite=1)
    problem.step(2)
    before = copy.deepcopy(problem.model.state_dict())
    calls = []

    def closure():
        calls.append(problem.backward())
        if len(calls) == failing_call:
            problem.layers[0].core.grad.fill_(math.inf)
        return calls[-1]

    loss = problem.optimizer.step(closure)
    assert loss == calls[0]
    skips = failing_call == 1 or integrator == "bug"
    assert problem.optimizer.skipped_steps == skips
    same = torch.equal(before["0.core"], problem.layers[0].core)
    assert same == skips
    problem.step()


def test_skips_in_a_row_have_a_limit():
    problem = Small(skip_nonfinite=2)
    for _ in range(2):  # a good step starts the count anew
        for _ in range(2):
            poison(problem)
            problem.optimizer.step()
        problem.call()
    for _ in range(2):
        poison(problem)
        problem.optimizer.step()
    before = copy.deepcopy(problem.model.state_dict())
    poison(problem)
    with pytest.raises(tdlrt.NonFiniteError, match=r"3\.core: its gradient has NaN"):
        problem.optimizer.step()
    assert_same(before, problem.model.state_dict())
    assert problem.optimizer.skipped_steps == 6
    other = Small(skip_nonfinite=2)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert other.optimizer.skipped_steps == 6
    poison(other)
    with pytest.raises(tdlrt.NonFiniteError):  # the count goes on
        other.optimizer.step()


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_a_bad_limit(value):
    with pytest.raises(ValueError, match=r"skip_nonfinite: got .*, expected an int of at least 0"):
        Small(skip_nonfinite=value)


def degrade(layer, factors):
    """Scale the slices of the core in every learned mode: S_i gets these ratios or smaller ones."""
    with torch.no_grad():
        for mode in layer.learned_modes:
            scale = torch.ones(layer.ranks[mode], dtype=layer.core.dtype)
            scale[-len(factors) :] = torch.tensor(factors[-len(scale) :])
            shape = [-1 if m == mode else 1 for m in range(layer.core.ndim)]
            layer.core.mul_(scale.view(shape))


CORES = {
    "1e-12": [1e-4, 1e-8, 1e-12],
    "rank-deficient": [0.0],
    "denormal": [1e-40],
    "zero": [0.0] * 9,
}


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_ill_conditioned_cores_learn(integrator, optimizer_name, core, dtype):
    problem = Small(optimizer_name, integrator=integrator, dtype=dtype, tau=0.01)
    for layer in problem.layers:
        degrade(layer, CORES[core])
    first = problem.sign * problem.loss().item()
    for _ in range(15):
        problem.step()
        for layer in problem.layers:
            layer.check_invariants()
    assert problem.sign * problem.loss().item() < first
    assert all(torch.isfinite(p).all() for p in problem.model.parameters())


@INTEGRATORS
@pytest.mark.parametrize("policy", [tdlrt.FixedRank(), tdlrt.RelativeTolerance(0.0)])
@pytest.mark.parametrize("kind", LAYERS)
def test_rank_one(integrator, policy, kind):
    problem = Regression(kind, rank=1)
    optimizer = tdlrt.TDLRT(
        problem.model, torch.optim.SGD, lr=1e-3, rank_policy=policy, integrator=integrator
    )
    first = problem.closure().item()
    for _ in range(10):
        optimizer.step(problem.closure)
        problem.layer.check_invariants()
    assert problem.closure().item() < first


@INTEGRATORS
def test_a_gradient_of_zero_keeps_the_weight(integrator):
    problem = Small("sgd", integrator=integrator, tau=0.0, dtype=torch.float64)
    before = [layer.dense_weight().detach() for layer in problem.layers]

    def closure():
        problem.optimizer.zero_grad()
        loss = 0.0 * problem.loss()
        loss.backward()
        return loss

    problem.optimizer.step(closure)
    for layer, weight in zip(problem.layers, before, strict=True):
        assert torch.allclose(layer.dense_weight(), weight, rtol=1e-12, atol=1e-12)
        layer.check_invariants()


@INTEGRATORS
def test_a_layer_in_two_places_moves_once(integrator):
    """Its gradient is the sum over the places."""
    torch.manual_seed(0)
    layer = tdlrt.nn.TuckerLinear(6, 6, rank=6, dtype=torch.float64)
    dense = layer.to_dense()
    options = {"lr": 0.1, "momentum": 0.9}
    model, plain = (nn.Sequential(one, nn.Tanh(), one) for one in (layer, dense))
    optimizers = {
        model: tdlrt.TDLRT(
            model, torch.optim.SGD, rank_policy=tdlrt.FixedRank(), integrator=integrator, **options
        ),
        plain: torch.optim.SGD(plain.parameters(), **options),
    }
    inputs = torch.randn(9, 6, dtype=torch.float64)
    for _ in range(5):
        for net, optimizer in optimizers.items():

            def closure(net=net, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (net(inputs) - inputs.roll(1, 0)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert torch.allclose(layer.dense_weight(), dense.weight, rtol=1e-9, atol=1e-9)
    layer.check_invariants()


def test_layers_that_share_a_basis_are_refused():
    first, second = (tdlrt.nn.TuckerLinear(6, 6, rank=3) for _ in range(2))
    second.factors.register_parameter("0", first.factors[0])
    with pytest.raises(ValueError, match=r"share a core or a basis.*one layer in both places"):
        tdlrt.TDLRT(nn.Sequential(first, second), torch.optim.SGD, lr=0.1)


@INTEGRATORS
def test_float16_that_overflows_is_scaled_down(integrator):
    problem = Small("momentum", integrator=integrator, tau=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    first = problem.loss().item()
    calls = 60
    for _ in range(calls):
        problem.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = problem.loss()
        scaler.scale(loss).backward()
        scaler.step(problem.optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert problem.optimizer.skipped_steps == 0  # it is the scaler that skips
    assert problem.loss().item() < first
    for layer in problem.layers:
        layer.check_invariants()
