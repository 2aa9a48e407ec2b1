"""The tensors of a state_dict as a file stores them, and the tensors that a model expects."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdlrt.errors import CheckpointError, RankError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.attention import PACKED, SplitAttention
from tdlrt.nn.layer_types import dense_shape, takes_reshape
from tdlrt.nn.reshape import check_reshape
from tdlrt.serialization.header import LayerFormat
from tdlrt.surgery import obstacle, tied_weights

__all__ = [
    "ExpectedTensor",
    "check_names",
    "check_shape",
    "check_values",
    "distinct_tensors",
    "expected_tensors",
    "key",
]

# A stored tensor of one of these types may be loaded into any other of them.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class ExpectedTensor(NamedTuple):
    """What a model expects of one tensor of its state_dict.

    Attributes:
        shape: Shape of the tensor.
        dtype: Type of the tensor.
        owner: Equal for two entries of the state_dict that share their memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: Hashable


def distinct_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of the tensors of a state_dict on the CPU; a shared tensor is copied once.

    Returns:
        The copies by name, and for each further name of a shared tensor the name of its copy.

    Raises:
        CheckpointError: A value of the state_dict is not a tensor in memory.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[Hashable, str] = {}
    for name, value in state.items():
        _check_storable(name, value)
        owner = owners.setdefault(_owner(name, value), name)
        if owner == name:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[name] = owner
    return tensors, aliases


def expected_tensors(
    model: nn.Module,
    layers: Mapping[str, LayerFormat],
    splits: Mapping[nn.Module, SplitAttention] = MappingProxyType({}),
) -> tuple[dict[str, ExpectedTensor], dict[nn.Module, str]]:
    """The tensors that a model expects once its layers have the format of a file.

    Args:
        model: Not changed.
        layers: Layers that the file holds in Tucker format, by name.
        splits: Attention that takes the place of torch's in the model.

    Returns:
        The expected tensors by name, and the name of each dense layer that has to be replaced.

    Raises:
        CheckpointError: The layers do not fit those of the model.
    """
    expected = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict()
    for name, module in list(modules.items()):
        if module in splits:
            for packed in PACKED:
                state.pop(key(name, packed), None)
            split = splits[module]
            state |= split.state_dict(prefix=key(name, ""))
            modules |= split.named_modules(prefix=name)
    for name, value in state.items():
        _check_storable(name, value)
        expected[name] = ExpectedTensor(tuple(value.shape), value.dtype, _owner(name, value))
    for name, module in modules.items():
        if isinstance(module, TuckerLayer) and name not in layers:
            raise CheckpointError(
                f"layer {name!r}: dense in the file, in Tucker format in the model; load the file "
                "into the dense network"
            )
    tied = tied_weights(model)
    dense: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if name not in modules:
            raise CheckpointError(
                f"layer {name!r}: not in the model; expected the network that was saved"
            )
        module = modules[name]
        if not isinstance(module, TuckerLayer):
            _check_replaceable(name, module, tied)
            dense.setdefault(module, name)
        shape = _tensor_shape(name, module, layer)
        _check_format(name, module, layer, shape)
        expected |= _expected_parts(name, module, layer, shape)
        expected.pop(key(name, "weight"), None)
    return expected, dense


def key(layer: str, part: str) -> str:
    """Name of a part of a layer in the state_dict; the layer's name is '' if it is the model."""
    return f"{layer}.{part}" if layer else part


def check_names(names: set[str], expected: Mapping[str, ExpectedTensor]) -> None:
    """Check that a file has every tensor that the model expects, and no other.

    Raises:
        CheckpointError: A tensor is missing or unexpected.
    """
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"does not fit the model (missing: {_listed(missing)}; unexpected: "
            f"{_listed(unexpected)}); expected the network that was saved"
        )


def check_shape(name: str, shape: tuple[int, ...], expected: ExpectedTensor) -> None:
    """Check the shape of a stored tensor.

    Raises:
        CheckpointError: The model expects another shape.
    """
    if shape != expected.shape:
        raise CheckpointError(
            f"{name}: got shape {shape}, expected {expected.shape}; the file belongs to another "
            "network"
        )


def check_values(state: Mapping[str, Tensor], expected: Mapping[str, ExpectedTensor]) -> None:
    """Check the types of tensors, and that tensors which the model shares have equal values.

    Raises:
        CheckpointError: A type differs, or two tensors that the model shares are not equal.
    """
    twins: dict[Hashable, str] = {}
    for name, wanted in expected.items():
        tensor, twin = state[name], state[twins.setdefault(wanted.owner, name)]
        if tensor.dtype != wanted.dtype and not {tensor.dtype, wanted.dtype} <= _FLOATS:
            raise CheckpointError(
                f"{name}: got type {tensor.dtype}, expected {wanted.dtype}; the file belongs to "
                "another network"
            )
        if tensor is not twin and not torch.equal(tensor, twin):
            raise CheckpointError(
                f"{name}: differs from {twins[wanted.owner]}, which is the same tensor in the "
                "model; expected the network that was saved"
            )


def _check_storable(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
        return
    kind = type(value).__name__
    if isinstance(value, Tensor):
        kind = "tensor without memory (device meta)" if value.is_meta else f"{value.layout} tensor"
    raise CheckpointError(
        f"{name}: got a {kind} in the model's state_dict, expected ordinary tensors in memory"
    )


def _owner(name: str, tensor: Tensor) -> Hashable:
    if not tensor.numel():
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_replaceable(name: str, module: nn.Module, tied: set[nn.Module]) -> None:
    reason = obstacle(module, tied) if name else "it is the model; wrap it in torch.nn.Sequential"
    if reason:
        raise CheckpointError(
            f"layer {name!r}: in Tucker format in the file, but the model's layer cannot be "
            f"replaced by a Tucker layer: {reason}"
        )


def _tensor_shape(name: str, module: nn.Module, layer: LayerFormat) -> tuple[int, ...]:
    """Shape of the tensor whose core and bases a file holds for a layer of the model."""
    if isinstance(module, TuckerLayer) or layer.reshape is None:
        return dense_shape(module)
    try:
        if not takes_reshape(module):
            raise RankError(f"reshape: got {layer.reshape} for a {type(module).__name__}")
        rows, columns = check_reshape(layer.reshape, dense_shape(module))
    except RankError as error:
        raise CheckpointError(
            f"layer {name!r}: the file does not fit the model ({error}); expected the network that "
            "was saved"
        ) from error
    return (*rows, *columns)


def _check_format(name: str, module: nn.Module, layer: LayerFormat, shape: tuple[int, ...]) -> None:
    ranks, learned = layer.ranks, layer.learned
    if isinstance(module, TuckerLayer) and module.reshape != layer.reshape:
        raise CheckpointError(
            f"layer {name!r}: its weight is reshaped to {layer.reshape} in the file and to "
            f"{module.reshape} in the model; load the file into the dense network"
        )
    every = tuple(range(len(shape)))
    fits = len(ranks) == len(shape) and all(
        1 <= rank <= size and (mode in learned or rank == size)
        for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True))
    )
    if not fits or learned not in (every, every[:2]):
        raise CheckpointError(
            f"layer {name!r}: ranks {ranks} with the modes {learned} learned do not fit the "
            f"model's weight of shape {shape}; expected the network that was saved"
        )
    if isinstance(module, TuckerLayer) and module.learned_modes != learned:
        raise CheckpointError(
            f"layer {name!r}: the modes {learned} are learned in the file and "
            f"{module.learned_modes} in the model; load the file into the dense network"
        )


def _expected_parts(
    name: str, module: nn.Module, layer: LayerFormat, shape: tuple[int, ...]
) -> dict[str, ExpectedTensor]:
    """The core and the bases of a layer that a file holds in Tucker format."""
    own = module.core if isinstance(module, TuckerLayer) else module.get_parameter("weight")
    shapes: dict[str, tuple[int, ...]] = {"core": layer.ranks}
    for mode, sizes in enumerate(zip(shape, layer.ranks, strict=True)):
        shapes[f"factors.{mode}"] = sizes
    return {
        key(name, part): ExpectedTensor(shape, own.dtype, (id(module), part))
        for part, shape in shapes.items()
    }


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "none") + more
