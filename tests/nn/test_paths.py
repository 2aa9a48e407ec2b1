"""Choosing and forcing a forward path, layouts, memory, compilers."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tdlrt
from reference.cases import gaussian, relative_error
from tdlrt.nn import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLayer, TuckerLinear
from tdlrt.paths import PATHS
from tdlrt.paths.apply import conv_stages, is_channels_last
from tdlrt.paths.choose import cached_path

each_path = pytest.mark.parametrize("path", PATHS)


def conv(rank: Any = 3, **options: Any) -> TuckerConv2d:
    torch.manual_seed(0)
    return TuckerConv2d(6, 5, 3, padding=1, rank=rank, dtype=torch.float64, **options)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the convolutions and remembers the largest tensor made."""

    convolutions, entries = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        self.convolutions += function is torch.ops.aten.convolution.default
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("path", "stages"), {"three_stage": 3, "fold_in": 2, "fold_out": 2, "dense": 1}.items()
)
def test_a_forced_path_is_taken(path: Any, stages: int) -> None:
    layer, x = conv(), gaussian((2, 6, 5, 5), 1)
    expected = layer(x)
    layer.path = path
    with Operations() as seen:
        output = layer(x)
    assert seen.convolutions == stages
    assert relative_error(output, expected) <= 1e-14
    assert f"path={path!r}" in repr(layer)
    assert "path" not in repr(conv())


@pytest.mark.parametrize("path", ["three-stage", "", None, 3])
def test_an_unknown_path_is_refused(path: Any) -> None:
    for layer in (conv(), TuckerLinear(6, 5)):
        with pytest.raises(tdlrt.PathError, match=r"^path: got .*, expected 'auto' or one of 'thr"):
            layer.path = path
        assert layer.path == "auto"
        with pytest.raises(tdlrt.PathError, match=r"^path: got"):
            layer.to_plain(path)


def test_a_forced_path_stays_through_copies_and_loading() -> None:
    layer = conv()
    layer.path = "fold_in"
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    twins.append(torch.load(stored, weights_only=False))
    layer.load_state_dict(conv(rank=2).state_dict())
    for one in (layer, *twins):
        assert one.path == "fold_in"
    assert layer.ranks == (2, 2, 2, 2)
    assert "path" not in "".join(layer.state_dict())


def test_the_plan_is_made_once_for_each_shape() -> None:
    layer = TuckerLinear(11, 13, rank=4)
    cached_path.cache_clear()
    for rows in (3, 3, 4, 3):
        layer(torch.zeros(rows, 11))
    with torch.no_grad():
        layer(torch.zeros(3, 11))
    assert cached_path.cache_info()[:2] == (2, 3)


@each_path
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_input_is_that_of_all_maps(path: Any, layout: Any) -> None:
    layer, x = conv(), gaussian((2, 6, 5, 5), 1).to(memory_format=layout)
    layer.path = path
    maps: list[Tensor] = []

    class Maps(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.convolution.default:
                maps.append(result)
            return result

    assert layer.core.is_contiguous()
    with Maps():
        output = layer(x)
    assert all(one.is_contiguous(memory_format=layout) for one in (output, *maps))
    kernel = conv_stages(
        layer.core, list(layer.factors), path, channels_last=layout == torch.channels_last
    )[1]
    assert kernel.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3, 4, 5), False),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 1, 4, 5), False),
        (torch.zeros(2, 4, 5, 1).permute(0, 3, 1, 2), True),
        (torch.zeros(2, 3, 1, 1), False),
        (torch.zeros(2, 3, 1, 1).to(memory_format=torch.channels_last), True),
        (torch.zeros(3, 4, 5), False),
    ],
)
def test_the_layout_is_read_from_the_strides(x: Tensor, expected: bool) -> None:
    assert is_channels_last(x, 4) == expected
    if x.ndim == 4:
        assert nn.Conv2d(x.shape[1], 2, 1)(x).is_contiguous(memory_format=torch.channels_last) or (
            not expected
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_path
def test_autocast_takes_every_path(path: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer, x in (
        (TuckerConv2d(16, 12, 3, rank=4), torch.randn(2, 16, 6, 6)),
        (TuckerLinear(16, 12, rank=4), torch.randn(3, 16)),
    ):
        layer.path = path
        x.requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            output = layer(x)
        assert output.dtype == dtype
        assert relative_error(output, layer(x)) <= 0.03
        output.sum().backward()
        assert layer.core.grad is not None and layer.core.grad.dtype == torch.float32


@each_path
def test_functional_transforms(path: Any) -> None:
    layer, x = conv(), gaussian((4, 6, 5, 5), 1)
    layer.path = path
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, values, image).square().sum()

    one_by_one = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    together = grad(loss)(parameters, x)
    for name, value in together.items():
        assert relative_error(one_by_one[name].sum(0), value) <= 1e-12


def layers() -> list[tuple[TuckerLayer, Tensor]]:
    torch.manual_seed(0)
    return [
        (TuckerConv1d(6, 5, 3, rank=2), torch.randn(2, 6, 9)),
        (TuckerConv2d(6, 5, 3, rank=3, padding=1), torch.randn(2, 6, 5, 5)),
        (TuckerConv3d(3, 4, 2, rank=2), torch.randn(2, 3, 4, 4, 4)),
        (TuckerLinear(6, 5, rank=3), torch.randn(4, 6)),
    ]


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_recomputing_changes_no_number(path: Any) -> None:
    for layer, x in layers():
        layer.path = path
        x.requires_grad_()
        leaves = [x, *layer.parameters()]
        expected = torch.autograd.grad(layer(x).square().sum(), leaves)
        layer.recompute = True
        gradients = torch.autograd.grad(layer(x).square().sum(), leaves)
        for gradient, other in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, other)
        with torch.no_grad():
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def bytes_of_a_step(layer: nn.Module, x: Tensor) -> int:
    """What a training step keeps: tensors saved for the backward pass, parameters, gradients."""
    parameters = list(layer.parameters())
    storages = {one.untyped_storage().data_ptr() for one in parameters}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return activations + sum(2 * one.nbytes for one in parameters)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
@pytest.mark.parametrize(("channels", "size"), [(32, 32), (64, 8), (128, 2)])
def test_with_recomputing_a_step_keeps_no_more_than_dense(
    channels: int, size: int, share: float
) -> None:
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    layer = TuckerConv2d.from_conv(plain, rank=share)
    assert layer.weight_parameters <= 0.55 * plain.weight.numel()
    x = torch.randn(8, channels, size, size, requires_grad=True)
    dense = bytes_of_a_step(plain, x)
    keeps_maps = bytes_of_a_step(layer, x)
    layer.recompute = True
    assert bytes_of_a_step(layer, x) <= min(dense, keeps_maps)
    if size == 32:  # what it is for
        assert keeps_maps > dense


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_compiled_layers_are_equal(path: Any) -> None:
    for layer, x in layers():
        torch._dynamo.reset()
        layer.path = path
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        leaves = list(layer.parameters())
        expected = torch.autograd.grad(layer(x).square().sum(), leaves)
        gradients = torch.autograd.grad(compiled(x).square().sum(), leaves)
        for gradient, other in zip(gradients, expected, strict=True):
            assert relative_error(gradient, other) <= 1e-6


def test_a_dynamic_batch_compiles_once() -> None:
    torch._dynamo.reset()
    layer = TuckerConv2d(6, 5, 3, rank=3)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 9):  # from 16 on torch.nn.Conv2d compiles anew too
        x = torch.randn(batch, 6, 5, 5)
        assert relative_error(compiled(x), layer(x)) <= 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    batch = torch.export.Dim("batch", min=2, max=4096)
    for layer, x in layers():
        exported = torch.export.export(
            layer, (x,), dynamic_shapes=({0: batch},), strict=strict
        ).module()
        more = torch.cat([x] * 3)
        assert relative_error(exported(more), layer(more)) <= 1e-6


def test_after_freezing_the_ranks_steps_do_not_recompile() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )
    tdlrt.factorize_(model, rank=0.5)
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.1)
    x, y = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))

    def step(network: Any) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    step(model)
    optimizer.freeze_ranks()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = [step(compiled) for _ in range(5)]
    assert counter.frame_count == 1
    assert losses[-1] < losses[0]
