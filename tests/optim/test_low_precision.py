"""Parameters of float16 and bfloat16: steps work on weights before rounding, in float32."""

import pytest
import torch

import tdlrt
from optim.problems import EVERY_OPTIMIZER, INTEGRATORS, Small, assert_same
from optim.test_loops import load, saved
from reference.cases import relative_error

TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def small(*arguments, dtype=torch.bfloat16, **options):
    """The network in low precision, with its inputs."""
    problem = Small(*arguments, dtype=dtype, **options)
    assert problem.layers[0].core.dtype == dtype
    return problem


def weights(problem):
    return [layer.dense_weight().detach().float() for layer in problem.layers]


@TYPES
@INTEGRATORS
def test_no_weight_drifts_at_a_rate_of_zero(dtype, integrator):
    fixed = {"tau": None, "rank_policy": tdlrt.FixedRank()}
    problem = small("momentum", dtype=dtype, lr=0.0, integrator=integrator, **fixed)
    before = weights(problem)
    problem.step(200)
    for weight, start in zip(weights(problem), before, strict=True):
        assert relative_error(weight, start) < 4 * torch.finfo(dtype).eps


@INTEGRATORS
@EVERY_OPTIMIZER
def test_save_load_continue_equals_continue(optimizer_name, integrator):
    options = {"integrator": integrator, "tau": 0.3}
    problem = small(optimizer_name, **options)
    problem.call(5)
    other = small(optimizer_name, seed=1, **options)
    load(other, saved(problem))
    problem.call(4)
    other.call(4)
    assert_same(problem.model.state_dict(), other.model.state_dict())
    assert_same(problem.optimizer.state_dict(), other.optimizer.state_dict())


def test_many_small_steps_add_up():
    """Each is below the rounding of a parameter."""
    fixed = {"tau": None, "rank_policy": tdlrt.FixedRank()}
    one, many = (small("sgd", lr=lr, dtype=torch.float16, **fixed) for lr in (0.02, 0.0002))
    before = weights(one)
    one.step()
    many.step(100)
    for far, near, start in zip(weights(one), weights(many), before, strict=True):
        assert relative_error(near - start, far - start) < 0.5


def test_masters_follow_what_others_write():
    problem = small("momentum", lr=0.0, tau=0.3)
    problem.step(3)
    with torch.no_grad():
        for layer in problem.layers:
            layer.core.mul_(2.0)
    doubled = weights(problem)
    problem.step()
    for weight, expected in zip(weights(problem), doubled, strict=True):
        assert relative_error(weight, expected) < 0.02


def test_float32_has_no_masters():
    problem = Small("momentum", tau=0.3)
    problem.step(2)
    assert not any("master" in own for own in problem.optimizer.state.values())
