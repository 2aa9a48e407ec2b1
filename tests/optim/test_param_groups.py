"""Groups with options of their own, and clipping by the norm of the projected gradient."""

import copy
import math

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import INTEGRATORS, OPTIMIZERS, Regression, Small, closure_for
from reference.algebra import tangent_projection
from reference.cases import relative_error

# --- groups -------------------------------------------------------------------------------------


def grouped(groups, name="momentum", *, model=None, **options):
    """The optimiser of a `Small` problem with groups made from its model."""
    problem = Small(name)
    optimizer_cls, defaults = OPTIMIZERS[name]
    problem.optimizer = tdlrt.TDLRT(
        problem.model,
        optimizer_cls,
        param_groups=groups(problem.model),
        **(defaults | {"tau": 0.3} | options),
    )
    return problem


def weights(problem):
    return {
        "0": problem.model[0].dense_weight().detach(),
        "3": problem.model[3].dense_weight().detach(),
        "5": problem.model[5].weight.detach().clone(),
    }


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
@pytest.mark.parametrize("index", [0, 3, 5])
def test_the_rate_of_a_group_moves_its_layer_alone(index, optimizer_name, integrator):
    def groups(model):
        return [{"params": model[index].parameters(), "lr": 0.0}]

    fixed = tdlrt.FixedRank()
    options = {"integrator": integrator, "tau": None, "rank_policy": fixed, "weight_decay": 0.1}
    problem = grouped(groups, optimizer_name, **options)
    before = weights(problem)
    problem.step(2)
    after = weights(problem)
    for name in before:
        change = relative_error(after[name], before[name])
        assert (change < 1e-5) == (name == str(index)), name
    assert [len(group["params"]) > 0 for group in problem.optimizer.param_groups] == [True] * 3


@INTEGRATORS
@pytest.mark.parametrize("index", [0, 3, 5])
def test_the_decay_of_a_group_shrinks_its_layer_alone(index, integrator):
    """Without a gradient a step of SGD is W (1 - lr weight_decay), exactly."""

    def groups(model):
        return [{"params": list(model[index].parameters()), "weight_decay": 0.5}]

    options = {"integrator": integrator, "tau": None, "rank_policy": tdlrt.FixedRank()}
    problem = grouped(groups, "sgd", **options)

    def closure():
        problem.optimizer.zero_grad()
        (0 * problem.loss()).backward()

    before = weights(problem)
    problem.optimizer.step(closure)
    for name, weight in weights(problem).items():
        shrunk = 1 - 0.2 * 0.5 if name == str(index) else 1.0
        assert relative_error(weight, shrunk * before[name]) < 1e-5


def test_every_layer_in_a_group_of_its_own_equals_one_group():
    together = Small("adamw", tau=0.3)
    apart = grouped(lambda model: [{"params": m.parameters()} for m in model], "adamw")
    assert [len(group["params"]) for group in apart.optimizer.param_groups[:2]] == [0, 0]
    for problem in (together, apart):
        problem.step(4)
    for one, other in zip(together.model.parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_single_tensor_and_a_generator_are_groups_too():
    problem = grouped(lambda model: [{"params": model[5].bias}, {"params": model[3].parameters()}])
    sizes = [len(group["params"]) for group in problem.optimizer.param_groups]
    assert sizes == [4, 2, 1, 4]


def test_options_of_groups_survive_a_checkpoint():
    def groups(model):
        return [{"params": model[3].parameters(), "lr": 0.007, "momentum": 0.3}]

    problem, other = grouped(groups), grouped(lambda model: [{"params": model[3].parameters()}])
    problem.step(2)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    for one in (problem, other):
        one.step(2)
    for own, loaded in zip(problem.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, loaded)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda model: [{"params": [model[3].core]}], r"3 has parameters in groups \[0, 2\]; put"),
        (
            lambda model: [
                {"params": [model[0].core]},
                {"params": list(model[0].factors.parameters())},
            ],
            r"0 has parameters in groups \[2, 3\]; put its core and factors in the same group",
        ),
        (
            lambda model: [{"params": model[5].parameters()}, {"params": [model[5].bias]}],
            "some parameters appear in more than one parameter group",
        ),
        (
            lambda model: [{"params": nn.Linear(2, 2).parameters()}],
            r"got a parameter that is not the model's.*nn\.ModuleList\(\[model, criterion\]\)",
        ),
        (
            lambda model: [{"params": nn.Linear(2, 2).named_parameters()}],
            "got a parameter that is not the model's",
        ),
    ],
)
def test_groups_that_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        grouped(groups)


def test_a_parameter_twice_in_one_group_is_warned_about_by_torch():
    with pytest.warns(UserWarning, match="duplicate parameters"):
        grouped(lambda model: [{"params": [model[5].bias, model[5].bias]}])


@pytest.mark.parametrize(
    ("name", "option"), [("momentum", "fused"), ("adamw", "capturable"), ("adam", "differentiable")]
)
@pytest.mark.parametrize("index", [3, 5])
def test_a_group_with_an_option_without_a_rule(index, name, option):
    with pytest.raises(tdlrt.UnsupportedOptimizerError, match=f"{option}: got True"):
        grouped(lambda model: [{"params": model[index].parameters(), option: True}], name)


def test_the_groups_are_fixed_at_construction():
    problem = Small()
    groups = len(problem.optimizer.param_groups)
    with pytest.raises(ValueError, match="more than one parameter group"):
        problem.optimizer.add_param_group({"params": problem.model[5].parameters()})
    other = Small().model[3]  # a Tucker layer that the optimiser knows nothing of
    with pytest.raises(ValueError, match="not the model's"):
        problem.optimizer.add_param_group({"params": other.parameters()})
    assert len(problem.optimizer.param_groups) == groups
    problem.step()


def test_a_criterion_with_parameters_trains_beside_the_model():
    problem = Small()
    scale = nn.Linear(1, 1)
    both = nn.ModuleList([problem.model, scale])
    group = {"params": scale.parameters(), "lr": 1.0}
    optimizer = tdlrt.TDLRT(both, torch.optim.SGD, lr=0.1, param_groups=[group])
    before = scale.bias.detach().clone()
    (problem.loss() * scale(torch.ones(1, 1)).square().sum()).backward()
    gradient = scale.bias.grad.clone()
    optimizer.step()
    assert torch.equal(scale.bias, before - gradient)


# --- clipping -----------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])


def projected_gradient(problem):
    layer = problem.layer
    factors = [factor.detach() for factor in layer.factors]
    dense = problem.dense_gradient(layer.dense_weight().detach())
    return tangent_projection(layer.core.detach(), factors, dense)


def sgd(problem, **options):
    return tdlrt.TDLRT(problem.model, torch.optim.SGD, **({"lr": 0.1, "tau": 0.0} | options))


@KINDS
@INTEGRATORS
def test_the_norm_is_that_of_the_projected_dense_gradient(kind, integrator):
    problem = Regression(kind)
    optimizer = sgd(problem, integrator=integrator)
    problem.closure()
    rest = problem.layer.bias.grad.norm()
    expected = torch.hypot(projected_gradient(problem).norm(), rest)
    raw = torch.nn.utils.get_total_norm([p.grad for p in problem.model.parameters()])
    assert relative_error(raw, expected) > 0.01  # or the next line says nothing
    assert relative_error(optimizer.clip_grad_norm_(math.inf), expected) < 1e-12
    max_norm = float(expected) / 3
    assert relative_error(optimizer.clip_grad_norm_(max_norm), expected) < 1e-12
    assert abs(float(optimizer.clip_grad_norm_(math.inf)) / max_norm - 1) < 1e-6


@KINDS
def test_a_clipped_step_is_the_step_along_the_scaled_gradient(kind):
    problem = Regression(kind)
    optimizer = sgd(problem)
    problem.closure()
    before, gradient = problem.layer.dense_weight().detach(), projected_gradient(problem)
    bias, bias_gradient = problem.layer.bias.detach().clone(), problem.layer.bias.grad.clone()
    norm = float(torch.hypot(gradient.norm(), bias_gradient.norm()))
    factor = 0.25
    assert float(optimizer.clip_grad_norm_(factor * norm)) == pytest.approx(norm, rel=1e-12)
    optimizer.step()
    expected = before - 0.1 * factor * gradient
    assert relative_error(problem.layer.dense_weight() - before, expected - before) < 1e-6
    assert relative_error(problem.layer.bias - bias, -0.1 * factor * bias_gradient) < 1e-6


def test_a_norm_below_the_bound_changes_nothing():
    problem = Small(tau=0.3)
    problem.backward()
    before = [parameter.grad.clone() for parameter in problem.model.parameters()]
    norm = problem.optimizer.clip_grad_norm_(1e6)
    assert 0 < norm < 1e6
    for parameter, gradient in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_only_the_core_counts_in_a_core_step():
    problem = Regression("conv2d")
    optimizer = sgd(problem, integrator="bug", core_steps=2)
    problem.closure()
    optimizer.step()
    for _ in range(2):
        problem.closure()
        expected = torch.hypot(problem.layer.core.grad.norm(), problem.layer.bias.grad.norm())
        assert relative_error(optimizer.clip_grad_norm_(math.inf), expected) < 1e-12
        optimizer.step()
    problem.closure()  # at rest again
    expected = torch.hypot(projected_gradient(problem).norm(), problem.layer.bias.grad.norm())
    assert relative_error(optimizer.clip_grad_norm_(math.inf), expected) < 1e-10


def test_a_layer_that_rests_in_this_core_step_does_not_count():
    problem = Small(integrator="bug")
    problem.layers[1].requires_grad_(False)
    problem.call()
    problem.layers[1].requires_grad_(True)
    problem.backward()
    moving = [problem.model[0].core, problem.model[0].bias, *problem.model[5].parameters()]
    moving.append(problem.model[3].bias)
    expected = torch.nn.utils.get_total_norm([p.grad for p in moving])
    assert relative_error(problem.optimizer.clip_grad_norm_(math.inf), expected) < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["0.core", "0.factors.0", "5.bias"])
def test_a_norm_that_is_not_finite(where, value):
    problem = Small()
    problem.backward()
    problem.model.get_parameter(where).grad.view(-1)[0] = value
    before = [parameter.grad.clone() for parameter in problem.model.parameters()]
    with pytest.raises(tdlrt.NonFiniteError, match=r"their norm is (nan|inf).*nothing was scaled"):
        problem.optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    for parameter, gradient in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad.nan_to_num(7), gradient.nan_to_num(7))
    assert not torch.isfinite(problem.optimizer.clip_grad_norm_(1.0))
    with pytest.raises(tdlrt.NonFiniteError):  # without the option the step still refuses it
        problem.optimizer.step()


def test_layers_without_gradients_count_as_zero():
    problem = Small()
    assert problem.optimizer.clip_grad_norm_(1.0) == 0
    problem.layers[0].requires_grad_(False)
    problem.backward()
    norm = problem.optimizer.clip_grad_norm_(1e-3)
    assert norm > 0
    assert problem.layers[0].core.grad is None
    problem.optimizer.step()


def test_without_moving_tucker_layers_it_is_torchs_function():
    problem, twin = Small(), Small()
    for one in (problem, twin):
        for layer in one.layers:
            layer.core.requires_grad_(False)
            layer.factors.requires_grad_(False)
        one.backward()
    own = problem.optimizer.clip_grad_norm_(0.01)
    theirs = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 0.01)
    assert relative_error(own, theirs) < 1e-6
    for one, other in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        if other.grad is not None:
            assert relative_error(one.grad, other.grad) < 1e-6


def test_torchs_function_sees_the_size_of_the_core_instead():
    """The weight and its gradient are the same in both layers, and torch's norm is not."""
    norms = []
    for scale in (1.0, 100.0):
        problem = Small()
        layer = problem.model[3]
        before = layer.dense_weight().detach()
        with torch.no_grad():
            layer.core.mul_(scale)
            problem.model[2].register_forward_hook(lambda _, __, out, s=scale: out / s)
        problem.backward()
        assert relative_error(layer.dense_weight() / scale, before) < 1e-6
        factors = [parameter.grad for parameter in layer.factors]
        norms.append(float(torch.nn.utils.get_total_norm(factors)) * scale)
    assert norms[1] > 50 * norms[0]


@INTEGRATORS
def test_clipping_in_a_loop_with_a_scaler(integrator):
    plain, scaled = (Small(integrator=integrator, tau=0.3) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(4):
        plain.backward()
        plain.optimizer.clip_grad_norm_(0.05)
        plain.optimizer.step()
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss()).backward()
        scaler.unscale_(scaled.optimizer)
        scaled.optimizer.clip_grad_norm_(0.05)
        scaler.step(scaled.optimizer)
        scaler.update()
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_clipping_inside_a_closure():
    problem = Small(integrator="bug", tau=0.3)
    plain = closure_for(problem.model, problem.inputs, problem.labels)
    norms = []

    def closure():
        loss = plain()
        norms.append(problem.optimizer.clip_grad_norm_(0.01))
        return loss

    problem.optimizer.step(closure)
    assert len(norms) == 2
    # On the core alone; its bases hold the whole projected gradient, and cross terms besides.
    assert norms[1] >= norms[0] * (1 - 1e-6)


@pytest.mark.parametrize(
    ("groups", "got"),
    [
        (None, "NoneType"),
        ("conv", "str"),
        ([nn.Parameter(torch.ones(2))], "Parameter"),
        ([{"lr": 0.1}], "a dict without 'params'"),
    ],
)
def test_what_is_no_group_is_refused(groups, got):
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 2))
    tdlrt.factorize_(model, rank=2)
    with pytest.raises(TypeError, match=f"^param_groups: got {got}, expected a list of dicts"):
        tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, param_groups=groups)
