"""The tensors of a model as a file holds them, and whether those of a file fit a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdlrt.errors import CheckpointError
from tdlrt.nn import TuckerLayer
from tdlrt.serialization.header import LayerFormat
from tdlrt.surgery import dense_shape, obstacle, tied_weights

__all__ = [
    "Slot",
    "check_names",
    "check_shape",
    "check_values",
    "distinct_tensors",
    "key",
    "plan_slots",
]

# These convert into one another; any other type has to be the same.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Slot(NamedTuple):
    """The place of a tensor in a model.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        owner: Equal for two places that share their numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: Hashable


def distinct_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies on the CPU of the tensors of a state, each once, and the names that repeat others.

    Raises:
        CheckpointError: Something in the state is no tensor in memory.
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


def plan_slots(
    model: nn.Module, layers: Mapping[str, LayerFormat]
) -> tuple[dict[str, Slot], dict[nn.Module, str]]:
    """The model's slots once its layers have the format of a file, and the dense layers to replace.

    Args:
        model: Not changed.
        layers: Layers that the file holds in Tucker format, by name.

    Raises:
        CheckpointError: The layers do not fit those of the model.
    """
    slots = {}
    for name, value in model.state_dict().items():
        _check_storable(name, value)
        slots[name] = Slot(tuple(value.shape), value.dtype, _owner(name, value))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, TuckerLayer) and name not in layers:
            raise CheckpointError(
                f"layer {name!r}: dense in the file, in Tucker format in the model; load it into "
                "the dense network"
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
        _check_format(name, module, layer)
        slots |= _tucker_slots(name, module, layer)
        slots.pop(key(name, "weight"), None)
    return slots, dense


def key(layer: str, part: str) -> str:
    """Name in the state_dict of a part of a layer; the model itself has the name ''."""
    return f"{layer}.{part}" if layer else part


def check_names(names: set[str], slots: Mapping[str, Slot]) -> None:
    """Check that a file has a tensor for every slot, and no other.

    Raises:
        CheckpointError: It has not.
    """
    missing, unexpected = sorted(slots.keys() - names), sorted(names - slots.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"does not fit the model (missing: {_listed(missing)}; unexpected: "
            f"{_listed(unexpected)}); expected the network that was saved"
        )


def check_shape(name: str, shape: tuple[int, ...], slot: Slot) -> None:
    """Check the shape of a tensor.

    Raises:
        CheckpointError: It is another one.
    """
    if shape != slot.shape:
        raise CheckpointError(
            f"{name}: got shape {shape}, expected {slot.shape}; it is of another network"
        )


def check_values(state: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> None:
    """Check the types of tensors, and that slots which share their numbers get the same ones.

    Raises:
        CheckpointError: One does not fit.
    """
    twins: dict[Hashable, str] = {}
    for name, slot in slots.items():
        tensor, twin = state[name], state[twins.setdefault(slot.owner, name)]
        if tensor.dtype != slot.dtype and not {tensor.dtype, slot.dtype} <= _FLOATS:
            raise CheckpointError(
                f"{name}: got type {tensor.dtype}, expected {slot.dtype}; it is of another network"
            )
        if tensor is not twin and not torch.equal(tensor, twin):
            raise CheckpointError(
                f"{name}: differs from {twins[slot.owner]}, which is the same tensor in the model; "
                "expected the network that was saved"
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
            f"layer {name!r}: in Tucker format in the file, and no Tucker layer can take its place "
            f"in the model: {reason}"
        )


def _check_format(name: str, module: nn.Module, layer: LayerFormat) -> None:
    shape, (ranks, learned) = dense_shape(module), layer
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
            f"{module.learned_modes} in the model; load it into the dense network"
        )


def _tucker_slots(name: str, module: nn.Module, layer: LayerFormat) -> dict[str, Slot]:
    own = module.core if isinstance(module, TuckerLayer) else module.get_parameter("weight")
    shapes: dict[str, tuple[int, ...]] = {"core": layer.ranks}
    for mode, sizes in enumerate(zip(dense_shape(module), layer.ranks, strict=True)):
        shapes[f"factors.{mode}"] = sizes
    return {
        key(name, part): Slot(shape, own.dtype, (id(module), part))
        for part, shape in shapes.items()
    }


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "none") + more
