"""Numbers that users pass."""

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
