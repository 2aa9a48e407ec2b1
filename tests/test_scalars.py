"""Numbers that users pass."""

import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.scalars import as_float, as_int


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_numpy_are_ints(value):
    assert type(as_int(value)) is int and as_int(value) == 3
    assert as_float(value) is None


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_fractions_of_numpy_are_floats(value):
    assert type(as_float(value)) is float and as_float(value) == 0.5
    assert as_int(value) is None


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", None, 3j, np.ones(1), torch.ones(1)])
def test_nothing_else_is_a_number(value):
    assert as_int(value) is None and as_float(value) is None


def network(rank):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    net.append(nn.Linear(12, 3))
    tdlrt.factorize_(net, rank=rank, init_scale=np.float32(1), reshape={"0": ((16,), (3, 4))})
    return net


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (
            {"budget": np.float32(0.5), "total_steps": np.int64(8), "adapt_every": np.int32(2)},
            {"budget": 0.5, "total_steps": 8, "adapt_every": 2},
        ),
        (
            {
                "rank_policy": tdlrt.RelativeTolerance(
                    np.float32(0.25), min_rank=np.int64(2), max_rank=np.int64(5), spare=np.int64(0)
                ),
                "freeze_after": np.int64(3),
                "skip_nonfinite": np.int64(1),
            },
            {
                "rank_policy": tdlrt.RelativeTolerance(0.25, min_rank=2, max_rank=5),
                "freeze_after": 3,
                "skip_nonfinite": 1,
            },
        ),
        (
            {
                "rank_policy": tdlrt.ParameterBudget(
                    tdlrt.LinearSchedule(np.float64(0.75), np.float32(0.5), np.int64(4))
                ),
                "integrator": "bug",
                "core_steps": np.int64(2),
            },
            {
                "rank_policy": tdlrt.ParameterBudget(tdlrt.LinearSchedule(0.75, 0.5, 4)),
                "integrator": "bug",
                "core_steps": 2,
            },
        ),
    ],
)
@pytest.mark.parametrize("rank", [np.float32(0.5), np.int64(4)])
def test_numbers_of_numpy_give_the_training_that_pythons_give(given, same, rank, tmp_path):
    states = []
    for options, start in ((given, rank), (same, rank.item())):
        net = network(start)
        optimizer = tdlrt.TDLRT(net, torch.optim.SGD, lr=0.1, momentum=0.9, **options)
        inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        stored = torch.load(tmp_path / "state.pt", weights_only=True)  # takes no numpy scalar
        states.append((net.state_dict(), stored["tdlrt"]["steps"]))
        assert repr(optimizer.rank_policy).count("np.") == 0
    assert states[0][1] == states[1][1]
    for one, other in zip(states[0][0].values(), states[1][0].values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adapt_every", "core_steps", "basis_every", "freeze_after"])
def test_a_boolean_is_no_count(name):
    with pytest.raises(ValueError, match=f"{name}: got True, expected an int of at least 1"):
        tdlrt.TDLRT(network(4), torch.optim.SGD, lr=0.1, **{name: True})


def stored(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)  # takes no numpy scalar


def test_rates_of_numpy_are_pythons_in_all_groups():
    net = network(4)
    group = {"params": net[2].parameters(), "lr": np.float32(0.5), "betas": [np.float64(0.5), 0.9]}
    options = {"lr": np.float64(0.1), "betas": (0.9, np.float32(0.25)), "eps": np.float16(0.5)}
    optimizer = tdlrt.TDLRT(net, torch.optim.AdamW, weight_decay=1, param_groups=[group], **options)
    found = [(of["lr"], of["betas"], of["eps"]) for of in stored(optimizer)["param_groups"]]
    assert found == [(0.1, (0.9, 0.25), 0.5)] * 2 + [(0.5, (0.5, 0.9), 0.5)]
    assert repr(optimizer.param_groups).count("np.") == 0


def test_a_rate_that_a_scheduler_made_numpys_is_stored_as_pythons():
    optimizer = tdlrt.TDLRT(network(4), torch.optim.SGD, lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** (step + 1))
    assert [group["lr"] for group in stored(optimizer)["param_groups"]] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "x"}, "lr: got 'x', expected a number such as 0.001"),
        ({"lr": True}, "lr: got True"),
        ({"lr": None}, "lr: got None"),
        ({"betas": 0.9}, r"betas: got 0.9, expected 2 numbers such as \(0.9, 0.999\)"),
        ({"betas": (0.9,)}, r"betas: got \(0.9,\), expected 2 numbers"),
        ({"betas": ("a", 0.9)}, "betas: got 'a'"),
        ({"eps": "small"}, "eps: got 'small', expected a number such as 1e-08"),
        ({"weight_decay": [0.1]}, r"weight_decay: got \[0.1\], expected a number such as 0.01"),
        ({"param_groups": [{"params": [], "lr": "x"}]}, "lr: got 'x'"),
    ],
)
def test_options_of_the_optimiser_that_are_no_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        tdlrt.TDLRT(network(4), torch.optim.AdamW, **options)


def test_a_momentum_that_is_no_number():
    with pytest.raises(ValueError, match=r"momentum: got '0\.9', expected"):
        tdlrt.TDLRT(network(4), torch.optim.SGD, momentum="0.9")
