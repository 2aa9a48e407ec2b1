"""Plain parameters are moved without copies of them where a bound says that nothing overflows."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.optim import plain
from tdlrt.optim.rules import resolve_rule

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "heavy": (
        torch.optim.SGD,
        {"lr": 30.0, "momentum": 0.99, "dampening": 0.5, "weight_decay": 3.0},
    ),
    "nesterov": (torch.optim.SGD, {"lr": 2.0, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 5.0, "amsgrad": True, "weight_decay": 2.0}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "eps": 1e-12, "betas": (0.99, 0.9)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_within_the_bound_is_finite(name, dtype):
    optimizer_cls, options = OPTIMIZERS[name]
    probe = optimizer_cls([torch.zeros(1)], **options)
    rule = resolve_rule(optimizer_cls).from_group(probe.param_groups[0])
    bound = rule.largest_norm(dtype)
    assert bound > 1e3
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    for state in (1.0, 0.0):
        weight = nn.Parameter((signs[0] * bound / 2).to(dtype))
        optimizer = optimizer_cls([weight], **options)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor) and value.ndim:
                value.fill_(state * bound / 2)
        weight.data.copy_((signs[0] * bound / 2).to(dtype))
        weight.grad = (signs[1] * bound / 2).to(dtype)
        optimizer.step()
        assert weight.isfinite().all()
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor):
                assert value.isfinite().all()


def test_a_type_in_which_eps_is_zero_has_no_bound():
    rule = resolve_rule(torch.optim.Adam)(lr=0.1)
    assert rule.largest_norm(torch.float16) == 0.0


def problem(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    tdlrt.factorize_(model, rank=2)
    optimizer_cls, options = OPTIMIZERS[name]
    optimizer = tdlrt.TDLRT(model, optimizer_cls, rank_policy=tdlrt.FixedRank(), **options)
    model(torch.ones(4, 6)).square().mean().backward()
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_ordinary_step_copies_no_plain_parameter(name, monkeypatch):
    monkeypatch.delattr(plain, "Before")
    model, optimizer = problem(name)
    before = model[2].bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model[2].bias, before)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_gradient_beyond_the_bound_moves_as_in_torch_if_the_step_is_finite(name):
    model, optimizer = problem(name)
    bias = model[2].bias
    bias.grad = torch.full_like(bias, 1e18)
    alone = nn.Parameter(copy.deepcopy(bias.detach()))
    alone.grad = bias.grad.clone()
    optimizer_cls, options = OPTIMIZERS[name]
    optimizer_cls([alone], **options).step()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), alone.detach())
