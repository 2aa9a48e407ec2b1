"""autotune_: measured paths."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.nn import TuckerLayer
from tdlrt.paths import PATHS


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.Linear(64, 10),
    )
    tdlrt.factorize_(model, rank=0.3)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_the_fastest_path_is_set_and_nothing_else(training, monkeypatch):
    monkeypatch.setattr(tdlrt.tuning, "SECONDS_PER_LAYER", 0.0)
    model, x = network().train(training), torch.randn(4, 3, 8, 8)
    before, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model)(x)
    report = tdlrt.autotune_(model, x)
    assert report.training == training
    assert [row.name for row in report.rows] == ["0", "3", "6"]
    assert [row.inputs for row in report.rows] == [((4, 3, 8, 8),), ((4, 32, 8, 8),), ((4, 128),)]
    for row in report.rows:
        assert set(row.seconds) == set(PATHS)
        assert 0 < row.seconds[row.path] == min(row.seconds.values())
        assert model.get_submodule(row.name).path == row.path
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training == training
    assert torch.allclose(model(x), expected, atol=1e-5)
    text = str(report)
    assert "fold_out (ms)" in text
    assert ("forward and backward" in text) == training


def test_the_slow_path_is_not_chosen(monkeypatch):
    monkeypatch.setattr(tdlrt.tuning, "SECONDS_PER_LAYER", 0.0)
    model = nn.Sequential(tdlrt.nn.TuckerLinear(1000, 1000, rank=2)).eval()
    tdlrt.autotune_(model, torch.randn(4, 1000))
    assert model[0].path != "dense"  # which multiplies two hundred times as much


def test_layers_that_are_not_called_stay_as_they_are():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = (tdlrt.nn.TuckerLinear(9, 9) for _ in range(2))

        def forward(self, x):
            return self.used(self.used(x))

    model = Partial()
    report = tdlrt.autotune_(model, torch.randn(2, 9))
    assert model.spare.path == "auto" != model.used.path
    assert report.rows[0].inputs == ((2, 9), (2, 9))
    assert report.rows[1].path is None
    assert "not called" in str(report)


def test_bad_input_changes_nothing():
    with pytest.raises(tdlrt.NothingMatchedError, match=r"without Tucker layers, .*factorize_"):
        tdlrt.autotune_(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))
    model = network()
    for example, message in (
        (torch.zeros(0, 3, 8, 8), r"example_input: got \(0, 3, 8, 8\), expected a tensor with at"),
        ([1, 2], r"example_input: got \[1, 2\], expected a tensor"),
    ):
        with pytest.raises(tdlrt.PathError, match=message):
            tdlrt.autotune_(model, example)
    with pytest.raises(RuntimeError):
        tdlrt.autotune_(model, torch.randn(2, 5, 8, 8))
    assert {layer.path for layer in model.modules() if isinstance(layer, TuckerLayer)} == {"auto"}
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
