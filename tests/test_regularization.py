"""The penalty on the spectrum of the cores."""

import pytest
import torch
from torch import nn

import tdlrt


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 12), nn.Linear(12, 3))
    tdlrt.factorize_(model.double(), rank=3, init_scale=None)
    return model


def test_it_is_the_distance_of_the_squared_singular_values_of_the_weight_from_their_mean():
    model = network()
    expected = 0.0
    for layer in (model[0], model[2]):
        weight = layer.dense_weight().detach()
        for mode, rank in enumerate(layer.ranks):
            rows = weight.movedim(mode, 0).flatten(1)
            values = torch.linalg.svdvals(rows)[:rank].square()
            expected += float((values - values.mean()).norm())
    assert float(tdlrt.spectral_penalty(model).detach()) == pytest.approx(expected, rel=1e-10)


def test_equal_singular_values_cost_nothing_and_have_a_finite_gradient():
    layer = tdlrt.nn.TuckerLinear(6, 5, rank=3).double()
    layer.core.data = 2.0 * torch.eye(3, dtype=torch.float64)
    penalty = tdlrt.spectral_penalty(layer)
    penalty.backward()
    assert float(penalty.detach()) == 0.0
    assert torch.isfinite(layer.core.grad).all()


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_training_with_it_evens_out_the_spectrum(integrator):
    model = network()
    optimizer = tdlrt.TDLRT(
        model, torch.optim.SGD, lr=0.02, rank_policy=tdlrt.FixedRank(), integrator=integrator
    )

    inputs = torch.randn(4, 4, 6, 6, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean() + tdlrt.spectral_penalty(model)
        loss.backward()
        return loss

    before = float(tdlrt.spectral_penalty(model).detach())
    for _ in range(60):
        optimizer.step(closure)
    assert float(tdlrt.spectral_penalty(model).detach()) < 0.5 * before


def test_a_dense_model_is_refused():
    with pytest.raises(tdlrt.NothingMatchedError, match=r"call tdlrt\.factorize_"):
        tdlrt.spectral_penalty(nn.Linear(3, 3))
