import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.cases import gaussian, on_every_device, relative_error
from tdlrt.errors import StateDictError
from tdlrt.nn import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLayer, TuckerLinear

StateDict = dict[str, Any]


def conv(rank: Any, seed: int = 0, **options: Any) -> TuckerConv2d:
    torch.manual_seed(seed)
    return TuckerConv2d(6, 5, (3, 2), rank=rank, dtype=torch.float64, **options)


def linear(rank: Any, seed: int = 0) -> TuckerLinear:
    torch.manual_seed(seed)
    return TuckerLinear(7, 5, rank=rank, dtype=torch.float64)


PAIRS = {
    "smaller": (conv((2, 2, 1, 2)), conv((4, 3, 3, 2), 1), (2, 6, 4, 4)),
    "larger": (conv((4, 3, 3, 2)), conv((2, 2, 1, 2), 1), (2, 6, 4, 4)),
    "mixed": (conv((4, 2, 3, 1)), conv((2, 3, 1, 2), 1), (2, 6, 4, 4)),
    "equal": (conv((4, 2, 3, 1)), conv((4, 2, 3, 1), 1), (2, 6, 4, 4)),
    "full": (conv("full"), conv(1, 1), (2, 6, 4, 4)),
    "channels": (conv(3, modes="channels"), conv(2, 1, modes="channels"), (2, 6, 4, 4)),
    "linear": (linear(4), linear(2, 1), (2, 7)),
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
Pair = tuple[TuckerLayer, TuckerLayer, tuple[int, ...]]


def snapshot(layer: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}


def assert_unchanged(layer: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(layer)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


@on_every_device
@each_pair
@pytest.mark.parametrize("strict", [True, False])
def test_loading_into_another_rank_keeps_the_parameters(
    device: str, pair: Pair, strict: bool
) -> None:
    source, target = (copy.deepcopy(layer).to(device) for layer in pair[:2])
    x = gaussian(pair[2], 0, device=device)
    identities = [id(parameter) for parameter in target.parameters()]
    incompatible = target.load_state_dict(source.state_dict(), strict=strict)
    assert incompatible == ([], [])
    assert [id(parameter) for parameter in target.parameters()] == identities
    assert all(parameter.requires_grad for parameter in target.parameters())
    assert target.ranks == source.ranks
    assert relative_error(target(x), source(x)) <= 1e-14
    target.check_invariants()


@each_pair
def test_loading_copies_and_does_not_alias(pair: Pair) -> None:
    source, target = (copy.deepcopy(layer) for layer in pair[:2])
    target.load_state_dict(source.state_dict())
    before = snapshot(source)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1)
    assert_unchanged(source, before)


@each_pair
def test_training_goes_on_while_an_older_graph_is_alive(pair: Pair) -> None:
    source, target = (copy.deepcopy(layer) for layer in pair[:2])
    x = gaussian(pair[2], 0)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    older = target(x).square().sum()
    older.backward()
    target.load_state_dict(source.state_dict())
    optimizer.zero_grad()
    target(x).square().sum().backward()
    source(x).square().sum().backward()
    for parameter, expected in zip(target.parameters(), source.parameters(), strict=True):
        assert relative_error(parameter.grad, expected.grad) <= 1e-13
    loss = target(x).square().sum()
    optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.step()
    assert target(x).square().sum() < loss


def test_a_parameter_of_another_shape_loses_its_gradient() -> None:
    source, target = conv((2, 2, 1, 2)), conv((4, 3, 3, 2))
    target(gaussian((2, 6, 4, 4), 0)).sum().backward()
    target.load_state_dict(source.state_dict())
    assert target.core.grad is None
    assert target.factors[0].grad is None
    assert target.bias.grad is not None


def test_values_take_the_type_of_the_layer() -> None:
    source, target = conv((2, 2, 1, 2)), conv((4, 3, 3, 2)).float()
    target.load_state_dict(source.state_dict())
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    assert relative_error(target.dense_weight(), source.dense_weight()) <= 1e-6


def test_nested_layers_load_under_their_prefix() -> None:
    def model(rank: int) -> nn.Module:
        return nn.Sequential(nn.Sequential(conv(rank), nn.ReLU()), nn.Flatten(), linear(rank))

    source, target = model(3), model(2)
    keys = {"core", "bias", "factors.0", "factors.1", "factors.2", "factors.3"}
    assert {key[4:] for key in source.state_dict() if key.startswith("0.0.")} == keys
    target.load_state_dict(source.state_dict())
    assert [target[0][0].ranks, target[2].ranks] == [(3, 3, 3, 2), (3, 3)]
    assert torch.equal(target[2].dense_weight(), source[2].dense_weight())


def without(key: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_changed(key: str, value: Callable[[Tensor], Any]) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, key: value(state[key])}


def state_of(layer: nn.Module) -> Callable[[StateDict], StateDict]:
    return lambda state: layer.state_dict()


WRONG = {
    "more channels": (state_of(TuckerConv2d(7, 5, (3, 2), rank=2)), r"shape \(5, 6, 3, 2\)"),
    "other kernel": (state_of(TuckerConv2d(6, 5, 3, rank=2)), r"shape \(5, 6, 3, 2\)"),
    "conv1d": (state_of(TuckerConv1d(6, 5, 3, rank=2)), "factors.3: missing"),
    "conv3d": (state_of(TuckerConv3d(6, 5, 2, rank=2)), r"core of shape \(2, 2, 2, 2, 2\)"),
    "linear": (state_of(TuckerLinear(6, 5, rank=2)), "factors.2, factors.3: missing"),
    "dense": (state_of(nn.Conv2d(6, 5, (3, 2))), "weight: got a dense weight"),
    "no core": (without("core"), "core: missing"),
    "no first factor": (without("factors.0"), "factors.0: missing"),
    "no last factor": (without("factors.3"), "factors.3: missing"),
    "factor of another rank": (with_changed("factors.1", lambda u: u[:, :1]), "factors of shapes"),
    "core of another rank": (with_changed("core", lambda c: c[:1]), "factors of shapes"),
    "flat core": (with_changed("core", torch.flatten), "core of shape"),
    "flat factor": (with_changed("factors.0", torch.flatten), "factors of shapes"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_state_dict_is_refused_and_changes_nothing(
    change: Callable[[StateDict], StateDict], message: str, strict: bool
) -> None:
    layer = conv((3, 3, 2, 2))
    before = snapshot(layer)
    wrong = change(conv((2, 2, 2, 2)).state_dict())
    with pytest.raises(StateDictError, match=message):
        layer.load_state_dict(wrong, strict=strict)
    assert_unchanged(layer, before)


def test_kernel_ranks_do_not_fit_a_layer_that_leaves_the_kernel_whole() -> None:
    layer = conv(2, modes="channels")
    before = snapshot(layer)
    with pytest.raises(
        StateDictError,
        match="mode 2: got rank 1, expected 3, because the layer does not factorise this mode",
    ):
        layer.load_state_dict(conv((2, 2, 1, 2)).state_dict())
    assert_unchanged(layer, before)


def test_the_error_names_the_layer_in_its_model() -> None:
    model = nn.Sequential(nn.ReLU(), conv(2))
    with pytest.raises(StateDictError, match=r"1\.factors\.2"):
        model.load_state_dict(without("1.factors.2")(model.state_dict()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_another_layer_changes_nothing(bias):
    layer = TuckerLinear(9, 8, bias=bias, rank=2)
    other = TuckerLinear(9, 8, rank=3).state_dict()
    other["bias"] = torch.zeros(5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(StateDictError, match=r"^bias: got one of shape \(5,\), expected"):
        layer.load_state_dict(other)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_core_that_is_no_tensor():
    layer = TuckerLinear(9, 8, rank=2)
    state = dict(layer.state_dict(), core=None)
    with pytest.raises(StateDictError, match="core: missing"):
        layer.load_state_dict(state)
