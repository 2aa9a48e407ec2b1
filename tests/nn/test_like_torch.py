"""What code does with torch's layers: reads attributes, resets, initialises, traces."""

import io

import pytest
import torch
from torch import nn

import tdlrt
from nn.cases import each_case
from tdlrt.nn import TuckerConv2d, TuckerLinear
from tdlrt.ranks import RelativeTolerance


def public(layer):
    return {name for name in dir(layer) if not name.startswith("_")}


@each_case
def test_every_public_attribute_of_the_torch_layer_is_there(case):
    plain = case.plain()
    layer = case.factorize(plain, "full")
    assert public(plain) <= public(layer)
    for name in (*vars(plain), "weight", "bias"):
        if not name.startswith("_"):
            expected, got = getattr(plain, name), getattr(layer, name)
            same = (
                torch.allclose(got, expected)
                if isinstance(expected, torch.Tensor)
                else got == expected
            )
            assert same, name


@each_case
def test_a_reset_layer_is_a_new_one_of_the_same_ranks(case):
    layer = case.factorize(case.plain())
    layer.requires_grad_(False)
    parameters, ranks = dict(layer.named_parameters()), layer.ranks
    before = {name: value.clone() for name, value in parameters.items()}
    torch.manual_seed(7)
    layer.reset_parameters()
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert all(layer.get_parameter(name) is value for name, value in parameters.items())
    assert not any(value.requires_grad for value in parameters.values())
    assert layer.ranks == ranks
    layer.check_invariants()
    assert not torch.equal(before["core"], layer.core)
    fresh = case.plain()
    torch.manual_seed(7)
    fresh.reset_parameters()
    expected = case.factorize(fresh, layer.ranks)
    assert torch.allclose(layer.dense_weight(), expected.dense_weight())
    if layer.bias is not None:
        assert torch.equal(layer.bias, fresh.bias)


@pytest.mark.parametrize("scale", [0.3, None])
def test_a_reset_keeps_the_scale_of_the_start(scale):
    layer = TuckerLinear(400, 300, rank=0.2, init_scale=scale)
    norm = layer.core.norm().item()
    with torch.no_grad():
        layer.core.mul_(9)
    layer.reset_parameters()
    assert layer.core.norm().item() == pytest.approx(norm, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_reset_keeps_type_and_device(dtype, device):
    layer = TuckerConv2d(4, 5, 3, rank=2, dtype=dtype, device=device)
    layer.reset_parameters()
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(dtype, device)}


def test_a_reset_is_trained_as_a_new_network_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    tdlrt.factorize_(model, rank=0.5)
    optimizer = tdlrt.TDLRT(
        model, torch.optim.SGD, lr=0.1, rank_policy=RelativeTolerance(0.2), adapt_every=1
    )
    x = torch.randn(16, 20)
    for turn in range(4):
        if turn == 2:
            model[0].reset_parameters()
            start = model[0].dense_weight().detach()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model[0].check_invariants()
    assert (model[0].dense_weight() - start).norm() < 0.5 * start.norm()


def test_the_reset_of_an_adapter_leaves_the_frozen_layer_alone():
    model = nn.Sequential(nn.Linear(7, 5))
    before = model[0].weight.detach().clone()
    tdlrt.add_adapters_(model, rank=2, include="0")
    nn.init.ones_(model[0].update.core)
    model[0].reset_parameters()
    assert torch.equal(model[0].weight, before)
    model[0].update.check_invariants()


def scale_data(weight):
    weight.data *= 2


WRITES = {
    "init": lambda w: nn.init.normal_(w),
    "init of data": lambda w: nn.init.kaiming_uniform_(w.data),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "orthogonal": lambda w: nn.init.orthogonal_(w),
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "method": lambda w: w.detach().uniform_(-1, 1),
    "item": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].fill_(0.0),
    "view": lambda w: w.view(-1).zero_(),
    "transposed": lambda w: w.T.mul_(2),
    "operator": scale_data,
    "copy": lambda w: w.copy_(torch.zeros_like(w)),
    "clamp": lambda w: torch.clamp_(w, 0, 1),
    "out": lambda w: torch.add(w, 1, out=w),
    "data": lambda w: setattr(w, "data", torch.zeros(5, 7)),
    "list": lambda w: torch._foreach_mul_([w], 2.0),
    "flag": lambda w: w.requires_grad_(False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_write_into_the_full_weight_raises_instead_of_being_lost(write, adapter):
    layer = TuckerLinear(7, 5, rank=3)
    if adapter:
        model = nn.Sequential(nn.Linear(7, 5))
        tdlrt.add_adapters_(model, rank=2, include="0")
        layer = model[0]
    before = layer.weight.clone()
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"weight: got a write .*lost"):
        with torch.no_grad():
            write(layer.weight)
    assert torch.equal(layer.weight, before)


READS = {
    "copy into another": lambda w: torch.zeros(5, 7).copy_(w),
    "clone": lambda w: w.clone().mul_(2),
    "sum": lambda w: (w + 1).mul_(2),
    "out of place": lambda w: torch.relu(w).add_(1),
    "stack": lambda w: torch.stack([w, w]).zero_(),
    "out": lambda w: torch.add(w, 1, out=torch.zeros(5, 7)),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 7), w).add_(1),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_made_from_the_full_weight_is_an_ordinary_tensor(read):
    layer = TuckerLinear(7, 5, rank=3)
    with torch.no_grad():
        assert type(read(layer.weight)) is torch.Tensor
        assert torch.equal(read(layer.weight), read(layer.dense_weight()))


def test_the_full_weight_is_differentiable_stored_and_printed():
    layer = TuckerLinear(7, 5, rank=3)
    weight = layer.weight
    weight.retain_grad()
    weight.square().sum().backward()
    assert torch.allclose(weight.grad, 2 * weight)
    assert layer.core.grad.norm() > 0
    file = io.BytesIO()
    torch.save(layer.weight.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.dense_weight())
    assert repr(layer.weight).startswith("WeightValue([[")


def networks():
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    yield nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 24)), (2, 24)
    yield nn.Sequential(shared, nn.ReLU(), shared), (2, 3, 24)
    yield nn.Sequential(nn.Conv1d(8, 16, 3, padding="same"), nn.Conv1d(16, 8, 3)), (2, 8, 9)
    yield nn.Sequential(nn.Conv2d(8, 16, 3), nn.Sequential(nn.Conv2d(16, 8, 3))), (2, 8, 9, 9)
    yield nn.Sequential(nn.Conv3d(4, 8, 3, padding=1, padding_mode="circular")), (1, 4, 5, 5, 5)


@pytest.mark.parametrize(("model", "shape"), [*networks()])
def test_a_trace_by_fx_calls_tucker_layers_like_those_of_torch(model, shape):
    dense = torch.fx.symbolic_trace(model)
    tdlrt.factorize_(model, rank=0.3, include="*")
    trace = torch.fx.symbolic_trace(model)
    trace.graph.lint()
    assert [(node.op, node.target) for node in trace.graph.nodes] == [
        (node.op, node.target) for node in dense.graph.nodes
    ]
    x = torch.randn(shape)
    assert torch.equal(trace(x), model(x))
    trace(x).sum().backward()
    assert model.get_submodule("0").core.grad is not None


class Gain(TuckerLinear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("model", [TuckerLinear(4, 4), nn.Sequential(Gain(4, 4))])
def test_a_trace_that_would_be_wrong_is_refused(model):
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"Proxy .*is_leaf_module"):
        torch.fx.symbolic_trace(model)


CALLS = [tdlrt.factorize_, tdlrt.add_adapters_, tdlrt.summary, tdlrt.metrics, tdlrt.to_dense]
CALLS += [tdlrt.merge_adapters_, tdlrt.spectral_penalty, lambda m: tdlrt.input_covariances(m, [])]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(2, 2)]])
def test_what_is_no_model_is_refused_at_once(call, model):
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"model: got \w+, expected a torch.nn"):
        call(model)


@pytest.mark.parametrize("argument", ["include", "exclude", "train", "rank"])
@pytest.mark.parametrize("patterns", [nn.Linear, [nn.Linear], ["0", 1], 3, [None]])
def test_what_is_no_name_pattern_is_refused_at_once(argument, patterns):
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    if argument == "rank":
        patterns = dict.fromkeys(patterns if isinstance(patterns, list) else [patterns], 4)
    for call in (tdlrt.factorize_, tdlrt.add_adapters_)[argument == "train" :]:
        with pytest.raises(tdlrt.NothingMatchedError, match=rf"{argument}: got .*expected names"):
            call(model, **{argument: patterns})
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)


def test_names_of_layers_of_a_class_are_patterns():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    assert len(tdlrt.factorize_(model, include=[*names][:2]).factorized) == 2
