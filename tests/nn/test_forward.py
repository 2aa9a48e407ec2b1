import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import reference
import tdlrt
from nn.cases import BY_NAME, CONV, Case, each_case
from reference.cases import gaussian, on_every_device, relative_error, rounding
from tdlrt.nn import TuckerConv2d, TuckerLayer, TuckerLinear
from tdlrt.paths import PATHS, PathName
from tdlrt.ranks import RelativeTolerance

every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
each_path = pytest.mark.parametrize("path", PATHS)


def through_dense_weight(plain: nn.Module, layer: TuckerLayer, x: Tensor) -> Tensor:
    """What torch's layer gives with the weight of the Tucker layer in its place."""
    tensors = {"weight": layer.dense_weight().reshape(plain.weight.shape)}
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return functional_call(plain, tensors, x)


def allowed(dtype: torch.dtype) -> float:
    return rounding(dtype, 4 if dtype == torch.bfloat16 else 50)


@on_every_device
@every_dtype
@each_case
def test_forward_is_the_torch_layer_with_the_dense_weight(
    device: str, dtype: torch.dtype, case: Case
) -> None:
    plain = case.plain(dtype, device)
    layer, x = case.factorize(plain), case.input(dtype, device)
    output = layer(x)
    assert output.dtype == dtype
    assert relative_error(output, through_dense_weight(plain, layer, x)) <= allowed(dtype)


@on_every_device
@every_dtype
@each_case
def test_full_rank_is_the_original_layer(device: str, dtype: torch.dtype, case: Case) -> None:
    plain, x = case.plain(dtype, device), case.input(dtype, device)
    assert relative_error(case.factorize(plain, "full")(x), plain(x)) <= allowed(dtype)


@each_path
@each_case
def test_every_derivative_is_that_of_finite_differences(path: PathName, case: Case) -> None:
    layer = case.factorize(case.plain())
    layer.path = path
    names = [name for name, _ in layer.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    leaves = [case.input(), *(p.detach() for p in layer.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, leaves, fast_mode=True)


@on_every_device
@each_path
@each_case
def test_every_path_is_the_dense_layer_gradients_included(
    device: str, path: PathName, case: Case
) -> None:
    plain = case.plain(device=device)
    layer, x = case.factorize(plain), case.input(device=device).requires_grad_()
    layer.path = path
    leaves = [x, *layer.parameters()]
    output = layer(x)
    z = gaussian(output.shape, 2, device=device)
    gradients = torch.autograd.grad((output * z).sum(), leaves)
    expected = through_dense_weight(plain, layer, x)
    assert relative_error(output, expected) <= 1e-12
    dense = torch.autograd.grad((expected * z).sum(), leaves)
    for gradient, expected in zip(gradients, dense, strict=True):
        assert relative_error(gradient, expected) <= 1e-12


@each_case
def test_constructor_takes_the_arguments_of_the_torch_layer(case: Case) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "rank": case.rank, **case.options}
    if case.kind is nn.Linear:
        options["reshape"] = case.reshape
    else:
        options["modes"] = case.modes
    torch.manual_seed(0)
    layer = {nn.Linear: TuckerLinear, **CONV}[case.kind](*case.arguments, **options)
    torch.manual_seed(0)
    plain = case.kind(*case.arguments, **case.options, dtype=torch.float64)
    expected, x = case.factorize(plain), case.input()
    assert torch.equal(layer(x), expected(x))
    assert repr(layer) == repr(expected)


@each_case
def test_repr_shows_the_arguments_and_the_ranks(case: Case) -> None:
    layer = case.factorize(case.plain())
    for name in ("in_features", "out_features", "kernel_size", "stride", "padding", "dilation"):
        if hasattr(layer, name):
            assert f"{name}={getattr(layer, name)!r}" in layer.extra_repr()
    assert f"bias={layer.bias is not None}" in layer.extra_repr()
    assert f"ranks={layer.ranks}" in layer.extra_repr()


@on_every_device
@each_case
def test_start_is_the_truncated_hosvd_of_the_weight(device: str, case: Case) -> None:
    plain = case.plain(device=device)
    layer = case.factorize(plain)
    weight = reference.as_double(plain.weight).reshape(layer.shape)
    modes = range(weight.ndim) if case.modes == "all" else (0, 1)
    core, factors = reference.truncate(weight, ranks=layer.ranks, modes=modes)
    assert core.shape == layer.core.shape
    expected = reference.tucker_to_dense(core, factors)
    assert relative_error(layer.dense_weight(), expected) <= 1e-9
    layer.check_invariants()


def test_explicit_ranks_are_the_ranks() -> None:
    assert TuckerConv2d(8, 8, 3, rank=(3, 2, 2, 3)).ranks == (3, 2, 2, 3)
    assert TuckerConv2d(8, 6, 3, rank=0.5).ranks == (3, 4, 3, 3)
    assert TuckerConv2d(4, 6, 7, rank=0.5).ranks == (3, 4, 7, 7)
    assert TuckerConv2d(8, 6, 3, rank=4).ranks == (4, 4, 3, 3)
    assert TuckerConv2d(8, 6, 3, rank="full").ranks == (6, 8, 3, 3)
    assert TuckerConv2d(8, 6, 3, rank=2, modes="channels").ranks == (2, 2, 3, 3)
    assert TuckerLinear(8, 6, rank=(3, 5)).ranks == (3, 3)


def test_ranks_no_core_can_have_are_lowered() -> None:
    layer = TuckerConv2d(8, 8, 3, rank=(7, 2, 1, 3))
    assert layer.ranks == (6, 2, 1, 3)
    layer.check_invariants()


def test_a_relative_tolerance_bounds_the_error_of_the_start() -> None:
    conv = BY_NAME["conv2d"].plain()
    layer = TuckerConv2d.from_conv(conv, rank=RelativeTolerance(0.8))
    expected, _ = reference.truncate(conv.weight.detach(), 0.8)
    assert layer.ranks == tuple(expected.shape)
    assert 0 < relative_error(layer.dense_weight(), conv.weight) <= 0.8


@pytest.mark.parametrize("scale", [0.1, 1, 3.0])
def test_init_scale_sets_the_norm_of_the_start(scale: float) -> None:
    conv = nn.Conv2d(6, 5, 3, dtype=torch.float64)
    whole = TuckerConv2d.from_conv(conv, rank=2)
    layer = TuckerConv2d.from_conv(conv, rank=2, init_scale=scale)
    assert relative_error(layer.dense_weight().norm(), scale * conv.weight.norm()) <= 1e-13
    direction = whole.dense_weight() / whole.dense_weight().norm()
    assert relative_error(layer.dense_weight() / layer.core.norm(), direction) <= 1e-13


def test_kernel_modes_left_out_are_identities_that_do_not_train() -> None:
    layer = TuckerConv2d(6, 5, (3, 2), rank=2, modes="channels")
    assert layer.ranks == (2, 2, 3, 2)
    assert {name for name, _ in layer.named_parameters()} == {
        "core",
        "factors.0",
        "factors.1",
        "bias",
    }
    for mode in (2, 3):
        assert torch.equal(layer.factors[mode], torch.eye(layer.ranks[mode]))
    layer.double()(torch.zeros(1, 6, 5, 5, dtype=torch.float64)).sum().backward()
    assert layer.factors[3].dtype == torch.float64


def test_factors_are_a_sequence() -> None:
    layer = TuckerConv2d(6, 5, (3, 2), rank=2)
    assert len(layer.factors) == 4
    assert [tuple(factor.shape) for factor in layer.factors] == [(5, 2), (6, 2), (3, 2), (2, 2)]
    assert layer.factors[-1] is layer.factors[3]
    with pytest.raises(IndexError, match="got 4"):
        layer.factors[4]


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_the_rest_of_the_layer_is_taken_over(name: str) -> None:
    plain = BY_NAME[name].plain().eval()
    plain.weight.requires_grad_(False)
    layer = BY_NAME[name].factorize(plain)
    assert layer.bias is plain.bias
    assert not layer.training
    assert {name for name, value in layer.named_parameters() if value.requires_grad} == {"bias"}


@each_case
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(
    duplicate: Callable[[TuckerLayer], TuckerLayer], case: Case
) -> None:
    layer, x = case.factorize(case.plain()), case.input()
    before = layer(x)
    twin = duplicate(layer)
    assert torch.equal(twin(x), before)
    assert repr(twin) == repr(layer)
    with torch.no_grad():
        twin.core.zero_()
    assert torch.equal(layer(x), before)


@on_every_device
@each_case
def test_conversion_moves_every_tensor(device: str, case: Case) -> None:
    plain = case.plain()
    layer = case.factorize(plain).to(device, torch.float32)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.float32, device)}
    x = case.input(torch.float32, device)
    expected = through_dense_weight(plain.to(device, torch.float32), layer, x)
    assert relative_error(layer(x), expected) <= rounding(torch.float32)


@on_every_device
def test_channels_last_changes_the_layout_only(device: str) -> None:
    torch.manual_seed(0)
    # In float64 cuDNN answers in NCHW, whatever it is given.
    layer = TuckerConv2d(6, 5, (3, 2), padding=1, rank=3, device=device)
    x = gaussian((2, 6, 5, 5), 1, torch.float32, device=device)
    expected = layer(x)
    output = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(output, expected) <= rounding(torch.float32)


@pytest.mark.parametrize("device", ["cpu"])
def test_autocast_runs_in_half_precision(device: str) -> None:
    layer, x = TuckerConv2d(6, 5, 3, rank=3), gaussian((2, 6, 5, 5), 1, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, layer(x)) <= rounding(torch.bfloat16, 4)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of entries that an operation has returned."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("layer", "input_shape"),
    [
        (lambda: TuckerConv2d(256, 256, 3, padding=1, rank=12), (1, 256, 3, 3)),
        (lambda: TuckerLinear(512, 512, rank=24), (2, 512)),
    ],
    ids=["conv2d", "linear"],
)
def test_nothing_of_the_size_of_the_weight_is_made(
    layer: Callable[[], TuckerLayer], input_shape: tuple[int, ...]
) -> None:
    made = layer()
    largest = max(parameter.numel() for parameter in made.parameters())
    with LargestTensor() as watch:
        made(torch.ones(input_shape)).sum().backward()
    assert watch.entries <= largest
    with LargestTensor() as watch:
        dense = made.dense_weight()
    assert watch.entries >= dense.numel() > 10 * largest


def test_layers_are_public() -> None:
    assert tdlrt.nn.TuckerConv2d is TuckerConv2d


@pytest.mark.parametrize("training", [True, False])
def test_code_that_reads_the_weight_of_a_layer_gets_the_dense_one(training: bool) -> None:
    # In evaluation this module passes its layers' weights to one fused kernel.
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    tdlrt.factorize_(module, rank=0.5, include="linear1")
    dense = tdlrt.to_dense(module).train(training)
    images = gaussian((2, 5, 16), 0, torch.float32)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(module.train(training)(images), dense(images))


def test_the_replicas_of_data_parallel_compute_the_same():
    """What torch.nn.parallel.replicate makes for each device, here on one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40))
    tdlrt.factorize_(model, rank=0.5)
    modules = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            setattr(replica, name, replicas[modules.index(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter * 1)
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(replicas[0](inputs), model(inputs))
    replicas[0](inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
