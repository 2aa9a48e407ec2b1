"""Format `plain`: weights as safetensors, with the arguments of their layers in the header."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from tdlrt.errors import ExportError
from tdlrt.export.source import Source
from tdlrt.nn import TuckerLayer
from tdlrt.surgery import replace_modules, take_over_hooks

__all__ = ["dump", "load", "load_plain"]

VERSION = "1"

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), (*_CONV, "padding_mode")),
    "Linear": ("in_features", "out_features"),
    "Identity": (),
    "Flatten": ("start_dim", "end_dim"),
    "Unflatten": ("dim", "unflattened_size"),
}


def load_plain(path: str | Path, model: nn.Module) -> nn.Module:
    """The network in a file of format `plain`, as a copy of a model with the file's layers.

    Args:
        path: The file.
        model: The network as it was before `factorize_`, with any weights; not changed.

    Returns:
        A copy of the model with the layers and weights of the file.

    Raises:
        ExportError: The file is broken, has another format or version, or belongs to another
            network.
    """
    try:
        return load(Path(path).read_bytes(), model)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def dump(source: Source) -> bytes:
    """The content of a file for a network."""
    tensors = {
        # Cloned, since safetensors refuses modules that share a tensor.
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in source.plain.state_dict().items()
    }
    header = {
        **source.metadata,
        "format": "pt",
        "plain": VERSION,
        "layers": json.dumps(_changed_layers(source.model, source.plain)),
    }
    return save(tensors, header)


def load(data: bytes, model: nn.Module) -> nn.Module:
    """The network in a file's content. Layers are made on the meta device, then get its weights."""
    tensors, layers = _read(data)
    result = copy.deepcopy(model)
    try:
        for name, stages in layers.items():
            made = [_make(**stage) for stage in stages]
            layer = made[0] if len(made) == 1 else nn.Sequential(*made)
            result = _with_layer(result, name, layer)
        tied = _tied_parameters(result)
        result.load_state_dict(tensors, assign=True)
        for names in tied:  # assign makes a parameter for each name
            _tie(result, names)
    except ExportError:
        raise
    except Exception as error:  # arguments of any type and size can raise nearly anything
        raise ExportError(
            f"does not fit the model ({error}); pass the network as it was before factorize_"
        ) from error
    return result


def _read(data: bytes) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
    """The tensors and the descriptions of the layers in a file's content."""
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        if header.get("plain") != VERSION:
            raise ExportError(
                f"version {header.get('plain')!r}; expected a file that tdlrt exported in format "
                f"'plain', version {VERSION!r}"
            )
        return tensors, json.loads(header["layers"])
    except (SafetensorError, KeyError, ValueError, RecursionError, MemoryError) as error:
        raise ExportError(f"not a readable export ({error}); export the network again") from error


def _changed_layers(model: nn.Module, plain: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """Descriptions, by name, of the layers that differ between `plain` and the dense network."""
    modules = dict(plain.named_modules(remove_duplicate=False))
    return {
        name: [_describe(stage) for stage in _stages(modules[name])]
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, TuckerLayer) or (name in modules and _is_fused(layer, modules[name]))
    }


def _is_fused(layer: nn.Module, plain: nn.Module) -> bool:
    """Whether a layer was fused with a batch norm, or is a batch norm that was fused."""
    gone = type(layer) is not type(plain)
    return gone or (getattr(layer, "bias", None) is None) != (getattr(plain, "bias", None) is None)


def _stages(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.Sequential) else [module]


def _describe(layer: nn.Module) -> dict[str, Any]:
    """Class and arguments of a plain layer."""
    kind = type(layer).__name__
    described = {"kind": kind} | {name: getattr(layer, name) for name in _ARGUMENTS[kind]}
    return described | ({"bias": layer.bias is not None} if hasattr(layer, "bias") else {})


def _make(kind: str, **arguments: Any) -> nn.Module:
    """The layer that a description stands for, on the meta device."""
    if kind not in _ARGUMENTS:
        raise ExportError(f"layer of class {kind!r}; expected one of {', '.join(_ARGUMENTS)}")
    make: Any = getattr(nn, kind)
    with torch.device("meta"):
        layer: nn.Module = make(**arguments)
    return layer


def _with_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with one layer replaced; the new layer itself if the model is that layer.

    The new layer is frozen and in training where the old one is, and has its hooks.
    """
    old = model.get_submodule(name)
    trainable = {_leaf(key): one.requires_grad for key, one in old.named_parameters()}
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(trainable.get(_leaf(key), True))
    take_over_hooks(old, layer)
    layer.train(old.training)
    replace_modules(model, {old: layer})
    return layer if old is model else model


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    """Let the first parameter stand under all names, if the values are the same."""
    parameters = [model.get_parameter(name) for name in names]
    if all(torch.equal(parameters[0], one) for one in parameters[1:]):
        for name in names[1:]:
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_parameter(own, parameters[0])
