"""Second moments of inputs, and the factorisation that they weigh."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from nn.cases import Case, each_case
from reference.cases import gaussian, relative_error
from tdlrt.errors import NonFiniteError, NothingMatchedError, RankError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 9, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(81, 12),
        nn.Linear(12, 3),
    ).double()


def batches():
    """Inputs whose channels are far from equal."""
    sizes = torch.tensor([3.0, 1.0, 0.5, 0.1, 0.05, 0.01]).double().view(1, 6, 1, 1)
    return [gaussian((40, 6, 5, 5), seed) * sizes for seed in range(3)]


@each_case
def test_they_are_means_of_products(case: Case) -> None:
    layer, x = case.plain(), case.input()
    found = tdlrt.input_covariances(nn.Sequential(layer), [x, 2 * x])["0"]
    channels = x.shape[-1] if isinstance(layer, nn.Linear) else layer.in_channels
    place = x.ndim - 1 if isinstance(layer, nn.Linear) else x.ndim - layer.weight.ndim + 1
    rows = torch.stack([x.select(place, i).reshape(-1) for i in range(channels)])
    assert relative_error(found, (1 + 4) / 2 * rows @ rows.T / rows.shape[1]) < 1e-12


def test_the_model_is_left_as_it_is() -> None:
    model = network().train()
    model.insert(1, nn.BatchNorm2d(9).double())
    before = copy.deepcopy(model.state_dict())
    found = tdlrt.input_covariances(model, batches())
    assert set(found) == {"0", "5", "6"}
    assert model.training
    assert not model[0]._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: [x], lambda x: {"input": x}]
)
def test_batches_as_loaders_give_them(wrap) -> None:
    model = network()
    found = tdlrt.input_covariances(model, (wrap(x) for x in batches()))
    expected = tdlrt.input_covariances(model, batches())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("modes", ["all", "channels"])
def test_outputs_stay_closer_than_without(modes) -> None:
    model, x = network().eval(), torch.cat(batches())
    errors = []
    for covariances in (None, tdlrt.input_covariances(model, batches())):
        smaller = copy.deepcopy(model)
        tdlrt.factorize_(
            smaller,
            rank=0.5,
            init_scale="auto" if covariances else None,
            modes=modes,
            covariances=covariances,
        )
        errors.append(relative_error(smaller(x), model(x)))
        sizes = tdlrt.summary(smaller).ranks
        smaller[0].check_invariants()
    assert errors[1] < 0.8 * errors[0]
    assert sizes["4"] == (6, 6)  # half of 12


def test_a_tolerance_needs_fewer_parameters_for_such_inputs() -> None:
    model = network()
    sizes = []
    for covariances in (None, tdlrt.input_covariances(model, batches())):
        report = tdlrt.factorize_(
            model, rank=tdlrt.RelativeTolerance(0.2), covariances=covariances, dry_run=True
        )
        sizes.append(sum(row.parameters for row in report.factorized))
    assert sizes[1] < sizes[0]


def test_a_layer_without_one_is_truncated_as_it_is() -> None:
    plain, weighted = network(), network()
    found = tdlrt.input_covariances(plain, batches())
    tdlrt.factorize_(plain, rank="full")
    tdlrt.factorize_(weighted, rank="full", covariances={"4": found["4"]})
    assert torch.equal(plain[0].core, weighted[0].core)
    assert not torch.equal(plain[4].core, weighted[4].core)


@pytest.mark.parametrize("given", [[], [[]][0:0]])
def test_no_batches(given) -> None:
    with pytest.raises(NothingMatchedError, match="batches: got none"):
        tdlrt.input_covariances(network(), given)


@pytest.mark.parametrize(
    ("covariances", "options", "error", "match"),
    [
        ({"9": torch.eye(6)}, {}, NothingMatchedError, "covariances: got '9'"),
        ({"0": torch.eye(5)}, {}, RankError, r"got one of shape \(5, 5\) for a layer with 6"),
        ({"0": torch.full((6, 6), torch.nan)}, {}, NonFiniteError, "covariances: got NaN"),
        ({"0": torch.eye(6)}, {"init_scale": 0.3}, RankError, "init_scale: got 0.3 together"),
    ],
)
def test_bad_covariances_leave_the_model_as_it_is(covariances, options, error, match) -> None:
    model = network()
    with pytest.raises(error, match=match):
        tdlrt.factorize_(model, covariances=covariances, **options)
    assert type(model[0]) is nn.Conv2d
