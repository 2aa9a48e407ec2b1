"""What a conversion keeps of the layers that it replaces: frozen parameters, flags and hooks."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.surgery import hooks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.Linear(16, 4)
    )


X = torch.ones(2, 3, 8, 8, requires_grad=True)
CONVERSIONS = [tdlrt.to_dense, tdlrt.to_plain]


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("training", [False, True])
def test_frozen_parameters_stay_frozen(convert, weight, bias, layer, training):
    model = network()
    model[layer].weight.requires_grad_(weight)
    model[layer].bias.requires_grad_(bias)
    tdlrt.factorize_(model, rank=0.3, include=str(layer))
    model[layer].train(training)
    with torch.no_grad():
        alone, inside = model[layer], convert(model)[layer]
        method = alone.to_dense if convert is tdlrt.to_dense else alone.to_plain
    for converted in (inside, method()):
        flags = {name.split(".")[-1]: set() for name, _ in converted.named_parameters()}
        for name, parameter in converted.named_parameters():
            flags[name.split(".")[-1]].add(parameter.requires_grad)
        assert flags == {"weight": {weight}, "bias": {bias}}
        assert {module.training for module in converted.modules()} == {training}


def register_all(layer, calls):
    """Every kind of hook that is called in a forward and backward pass."""
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_hook(lambda *_: calls.append("kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.bias.register_hook(lambda _: calls.append("bias"))
    layer.bias.register_post_accumulate_grad_hook(lambda _: calls.append("bias has grad"))


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("layer", [0, 3, 4])
def test_hooks_are_kept(convert, layer):
    model, calls = network(), []
    tdlrt.factorize_(model, rank=0.3)
    register_all(model[layer], calls)
    model(X).sum().backward()
    expected = list(calls)
    assert len(expected) == 9
    calls.clear()
    convert(model)(X).sum().backward()
    assert sorted(calls) == sorted(expected)
    calls.clear()
    model(X).sum().backward()
    assert calls == expected


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_converted_layer_alone_keeps_its_hooks(convert):
    layer, calls = tdlrt.nn.TuckerLinear(8, 8, rank=2), []
    register_all(layer, calls)
    convert(layer)(torch.ones(1, 8, requires_grad=True)).sum().backward()
    assert len(calls) == 9


def test_merged_adapters_keep_hooks_and_their_handles():
    model, calls = network(), []
    tdlrt.add_adapters_(model, rank=1)
    handle = model[3].register_forward_hook(lambda *_: calls.append(1))
    tdlrt.merge_adapters_(model)
    model(X)
    assert calls == [1]
    handle.remove()
    model(X)
    assert calls == [1]


LOST = {
    "core": lambda layer: layer.core.register_hook(lambda gradient: gradient),
    "factors.0": lambda layer: layer.factors[0].register_post_accumulate_grad_hook(print),
    "state_dict": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "forward": lambda layer: setattr(layer, "forward", layer.forward),
}


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("what", LOST)
def test_hooks_without_a_place_are_named(convert, what):
    model = network()
    tdlrt.factorize_(model, rank=0.3)
    LOST[what](model[3])
    with pytest.warns(UserWarning, match=rf"hooks on 3\.{what}, which have no place") as record:
        converted = convert(model)
    assert record[0].filename == __file__
    assert converted(X).shape == (2, 4)


def test_hooks_that_serve_the_training_of_a_parameter_are_not_copied():
    model = network()
    tdlrt.factorize_(model, rank=0.3)
    hook = torch.utils.hooks.unserializable_hook(lambda _: pytest.fail("called for a copy"))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    tdlrt.to_plain(model)(X).sum().backward()


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(print),
    "forward pre": lambda layer: layer.register_forward_pre_hook(print),
    "backward": lambda layer: layer.register_full_backward_hook(print),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(print),
    "gradient": lambda layer: layer.weight.register_hook(print),
    "accumulated": lambda layer: layer.weight.register_post_accumulate_grad_hook(print),
    "state": lambda layer: layer.register_state_dict_pre_hook(print),
    "loading": lambda layer: layer.register_load_state_dict_post_hook(print),
    "replaced": lambda layer: setattr(layer, "forward", layer.forward),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_layer_with_any_hook_is_left_alone(kind):
    model = network()
    HOOKS[kind](model[3])
    before = model[3]
    rows = {row.name: row for row in tdlrt.factorize_(model, rank=0.3).rows}
    assert rows["3"].note == "has hooks, which would be lost"
    assert model[3] is before
    assert rows["0"].ranks


def test_torch_has_no_further_hooks():
    known = {*hooks._CALL_HOOKS, *hooks._STATE_HOOKS, "_is_full_backward_hook"}
    assert {name for name in vars(nn.Module()) if "hook" in name} == known


@pytest.mark.parametrize("frozen", ["layer", "norm", "both", "none"])
def test_a_fused_layer_is_trainable_where_one_part_was(frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    for part in {"layer": model[:1], "norm": model[1:], "both": model, "none": ()}[frozen]:
        part.requires_grad_(False)
    fused = tdlrt.to_plain(model, fuse_batch_norm=True)
    assert isinstance(fused[1], nn.Identity)
    assert fused[0].weight.requires_grad == (frozen != "both")
    assert fused[0].bias.requires_grad == (frozen in ("layer", "none"))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(16, 16))


def test_a_network_with_the_old_weight_norm_converts():
    model = nn.Sequential(nn.Linear(8, 16), old_weight_norm(), nn.Linear(16, 2))
    tdlrt.factorize_(model, rank=0.3)
    x = torch.ones(2, 8)
    for convert in CONVERSIONS:
        assert torch.allclose(convert(model)(x), model(x), atol=1e-6)


class Encoder(nn.Module):
    def __init__(self, activation):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, -1] = True
        return self.encoder(x, src_key_padding_mask=mask)[:, :-1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("include", ["*linear?", "*.linear1", "*.1.linear2"])
@pytest.mark.parametrize("example", [None, torch.ones(1, 3, 8)])
def test_the_plain_network_of_a_transformer_runs_in_evaluation(activation, include, example):
    torch.manual_seed(0)
    model = Encoder(activation).eval()
    tdlrt.factorize_(model, rank=2, include=include, init_scale=None)
    x = torch.randn(2, 5, 8)
    plain = tdlrt.to_plain(model, example_inputs=example)
    for other in (plain, copy.deepcopy(plain), tdlrt.to_dense(model)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(other(x), model(x), atol=1e-5)
