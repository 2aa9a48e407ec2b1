"""The way back to plain layers."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from surgery.networks import Odd, everything, inputs


@pytest.mark.parametrize("convert", [tdlrt.to_plain, tdlrt.to_dense])
@pytest.mark.parametrize("modes", ["all", "channels"])
@pytest.mark.parametrize("rank", [0.4, "full"])
def test_the_way_back(convert, modes, rank):
    model = everything()
    tdlrt.factorize_(model, rank=rank, modes=modes)
    state = copy.deepcopy(model.state_dict())

    converted = convert(model)

    assert all(
        type(module).__module__.startswith("torch.") or isinstance(module, Odd)
        for module in converted.modules()
    )
    assert torch.allclose(converted(inputs()), model(inputs()), atol=1e-5)
    assert not converted.training
    assert {id(p) for p in converted.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if convert is tdlrt.to_dense:
        assert converted.state_dict().keys() == everything().state_dict().keys()


@pytest.mark.parametrize(
    "layer",
    [
        tdlrt.nn.TuckerConv1d(6, 8, 3, stride=2, padding="valid", rank=0.5),
        tdlrt.nn.TuckerConv2d(6, 8, (3, 2), dilation=2, padding="same", rank=0.5, bias=False),
        tdlrt.nn.TuckerConv3d(6, 8, 2, padding=1, padding_mode="replicate", rank=0.5),
        tdlrt.nn.TuckerLinear(6, 8, rank=2),
    ],
)
@pytest.mark.parametrize("convert", [tdlrt.to_plain, tdlrt.to_dense])
def test_a_layer_alone_converts_too(layer, convert):
    spatial = layer.core.ndim - 2
    inputs = torch.randn(2, 6, *[9] * spatial)
    assert torch.allclose(convert(layer)(inputs), layer(inputs), atol=1e-5)


def with_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16, affine=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 40),
        nn.BatchNorm1d(40),
        nn.Linear(40, 10),
    )
    tdlrt.factorize_(model, rank=0.4)
    for _ in range(3):
        model(1 + 3 * torch.randn(8, 3, 8, 8))
    return model.eval()


class Untraceable(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() < float("inf") else x


class Branching(nn.Module):
    """A batch norm that is not all there is after its convolution."""

    def __init__(self, used_twice):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.used_twice = used_twice

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + (self.norm(x) if self.used_twice else self.conv.weight.mean())


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("wrap", [nn.Sequential, Untraceable])
@pytest.mark.parametrize("input_size", [None, (2, 3, 8, 8)])
def test_batch_norms_are_fused_on_request(wrap, input_size):
    model = wrap(with_batch_norms()).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    assert len(norms(tdlrt.to_plain(model, input_size=input_size))) == 4
    plain = tdlrt.to_plain(model, input_size=input_size, fuse_batch_norm=True)
    assert torch.allclose(plain(x), expected, atol=1e-5)
    # The one without statistics stays, and without an input size that after the linear layer.
    assert len(norms(plain)) == (2 if input_size is None else 1)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not plain.training


def test_batch_norms_that_are_not_certain_stay():
    x = torch.randn(2, 16, 8, 8)
    shared = nn.BatchNorm2d(16)
    hooked = nn.Conv2d(16, 16, 3)
    hooked.register_forward_hook(lambda *_: None)
    for model in (
        Branching(used_twice=True),
        Branching(used_twice=False),
        nn.Sequential(nn.Conv2d(16, 16, 3), shared, nn.Conv2d(16, 16, 3), shared),
        Untraceable(nn.Sequential(nn.Conv2d(16, 16, 3), shared, nn.Conv2d(16, 16, 3), shared)),
        nn.Sequential(hooked, nn.BatchNorm2d(16)),
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.BatchNorm2d(16)),
    ):
        model(x)
        model.eval()
        plain = tdlrt.to_plain(model, fuse_batch_norm=True)
        assert len(norms(plain)) == 1
        assert torch.equal(plain(x), model(x))


def test_batch_norms_in_training_stay():
    model = with_batch_norms().train()
    plain = tdlrt.to_plain(model, input_size=(2, 3, 8, 8), fuse_batch_norm=True)
    assert len(norms(plain)) == 4
    assert plain.training


def test_plain_layers_are_planned_for_the_input_size():
    model = nn.Sequential(tdlrt.nn.TuckerLinear(500, 500, rank=200)).eval()
    many, few = (
        tdlrt.to_plain(model, input_size=(rows, 500), prefer="speed") for rows in (10**4, 1)
    )
    forced = copy.deepcopy(model)
    forced[0].path = "dense"
    x = torch.randn(3, 500)
    for plain in (many, few, tdlrt.to_plain(forced, input_size=(1, 500))):
        assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert isinstance(tdlrt.to_plain(forced, input_size=(1, 500))[0], nn.Linear)
    assert isinstance(few[0], nn.Linear)  # one call less
    assert isinstance(many[0], nn.Sequential)


def test_a_layer_called_twice_is_planned_for_both():
    shared = tdlrt.nn.TuckerLinear(30, 30, rank=4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    plain = tdlrt.to_plain(model, input_size=(2, 30))
    assert plain[0] is plain[2]
    x = torch.randn(2, 30)
    assert torch.allclose(plain(x), model(x), atol=1e-6)
