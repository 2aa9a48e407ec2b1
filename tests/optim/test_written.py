"""Weights that somebody else writes: a step begins at the weights that the model has."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import EVERY_OPTIMIZER, INTEGRATORS, Small, assert_same
from reference.cases import gaussian, relative_error

FIXED = {"tau": None, "rank_policy": tdlrt.FixedRank()}


def clip(parameters):
    for p in parameters:
        p.clamp_(-0.2, 0.2)


def decay(parameters):
    for p in parameters:
        p.mul_(0.9)


def initialise(parameters):
    for p in parameters:
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)


def average(parameters):
    """With weights of before, as a restored average is made."""
    for number, p in enumerate(parameters):
        p.lerp_(gaussian(p.shape, number, p.dtype) / 10, 0.1)


def through_data(parameters):
    for p in parameters:
        p.data.copy_(p.data * 1.1)


def flat(parameters):
    parameters = list(parameters)
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(0.8 * vector, parameters)


WAYS = pytest.mark.parametrize("write", [clip, decay, initialise, average, through_data, flat])


def weights(problem):
    return [layer.dense_weight().detach() for layer in problem.layers]


@WAYS
# After three calls `bug` would cut what was written to the ranks at rest.
@pytest.mark.parametrize(
    ("integrator", "calls"), [("parallel", 0), ("parallel", 3), ("bug", 0), ("bug", 2)]
)
def test_a_small_step_changes_no_weight(write, integrator, calls):
    problem = Small("momentum", lr=1e-12, integrator=integrator, dtype=torch.float64, **FIXED)
    problem.call(calls)
    with torch.no_grad():
        write(problem.model.parameters())
    before = weights(problem)
    problem.call(2)
    for layer, weight in zip(problem.layers, before, strict=True):
        assert relative_error(layer.dense_weight(), weight) < 1e-8
        if integrator == "parallel":
            layer.check_invariants()


@EVERY_OPTIMIZER
@INTEGRATORS
def test_the_step_is_that_of_the_same_weight_with_orthonormal_bases(optimizer_name, integrator):
    options = {"integrator": integrator, "dtype": torch.float64, **FIXED}
    ours, theirs = (Small(optimizer_name, **options) for _ in range(2))
    with torch.no_grad():
        for layer, twin in zip(ours.layers, theirs.layers, strict=True):
            for mode in layer.learned_modes:
                size = layer.ranks[mode]
                turn = torch.eye(size).double() + gaussian((size, size), mode) / 10
                q, r = torch.linalg.qr(layer.factors[mode] @ turn)
                signs = r.diagonal().sign()
                layer.factors[mode].copy_(layer.factors[mode] @ turn)
                twin.factors[mode].copy_(q * signs)
                matrix = (signs[:, None] * r) @ twin.core.movedim(mode, 0).flatten(1)
                shape = twin.core.movedim(mode, 0).shape
                twin.core.copy_(matrix.view(shape).movedim(0, mode))
    for weight, twin in zip(weights(ours), weights(theirs), strict=True):
        assert relative_error(weight, twin) < 1e-12
    norms = []
    for problem in (ours, theirs):
        problem.backward()
        norms.append(problem.optimizer.clip_grad_norm_(1e9))
        problem.optimizer.step()
        problem.call(3)
    assert relative_error(*norms) < 1e-10
    for weight, twin in zip(weights(ours), weights(theirs), strict=True):
        assert relative_error(weight, twin) < 1e-8


def test_bases_that_rest_are_written_too():
    problem = Small("momentum", basis_every=3, lr=1e-12, dtype=torch.float64, **FIXED)
    problem.call(2)
    with torch.no_grad():
        decay(problem.model.parameters())
    before = weights(problem)
    problem.call()
    for layer, weight in zip(problem.layers, before, strict=True):
        assert relative_error(layer.dense_weight(), weight) < 1e-8
        layer.check_invariants()


def test_layers_without_a_gradient_wait_as_they_are():
    problem = Small("momentum", lr=0.01, **FIXED)
    problem.call()
    with torch.no_grad():
        decay(problem.layers[1].parameters())
    problem.layers[1].requires_grad_(False)
    before = copy.deepcopy(problem.layers[1].state_dict())
    problem.call(2)
    assert_same(before, problem.layers[1].state_dict())


@INTEGRATORS
def test_a_basis_with_dependent_columns_is_refused_by_name(integrator):
    problem = Small("momentum", integrator=integrator, **FIXED)
    problem.call(2)
    with torch.no_grad():
        problem.layers[1].factors[0][:, 1] = problem.layers[1].factors[0][:, 0]
    before = copy.deepcopy(problem.model.state_dict())
    for _ in range(2):
        problem.backward()
        with pytest.raises(tdlrt.IntegratorStateError, match=r"3\.factors\.0: got a basis"):
            problem.optimizer.step()
    assert_same(before, problem.model.state_dict())


def test_parameters_that_were_replaced_are_refused_by_name():
    problem = Small("momentum", **FIXED)
    problem.call()
    state = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    problem.model.load_state_dict(state, assign=True)
    problem.backward()
    with pytest.raises(tdlrt.IntegratorStateError, match="0: its parameters are not those"):
        problem.optimizer.step()
