"""Format `plain`: weights as safetensors, with the arguments of their layers in the header."""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from tdlrt.errors import ExportError
from tdlrt.export.plain_layers import changed_layers, made, parsed
from tdlrt.export.source import Source
from tdlrt.surgery import replace_modules, take_over_hooks
from tdlrt.tensor_files import header_length, open_tensors

__all__ = ["dump", "load", "load_plain"]

VERSION = "1"


def load_plain(path: str | Path, model: nn.Module) -> nn.Module:
    """The network in a file of format `plain`, as a copy of a model with the file's layers.

    Args:
        path: The file.
        model: The network as it was before `factorize_`, with any weights; not changed.

    Returns:
        A copy of the model with the layers and weights of the file.

    Raises:
        ExportError: The file cannot be read, is broken, has another format or version, or belongs
            to another network.
    """
    try:
        with open_tensors(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return _network(file.metadata() or {}, shapes, file.get_tensor, model)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    except (SafetensorError, RuntimeError, MemoryError) as error:
        raise ExportError(
            f"{path}: not a readable export ({error}); export the network again"
        ) from error
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror or error}); expected a file that tdlrt "
            "exported in format 'plain'"
        ) from error


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
        "layers": json.dumps(changed_layers(source.model, source.plain)),
    }
    return save(tensors, header)


def load(data: bytes, model: nn.Module) -> nn.Module:
    """The network in a file's content."""
    tensors = load_tensors(data)
    metadata = json.loads(data[8 : 8 + header_length(data)])["__metadata__"]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _network(metadata, shapes, tensors.__getitem__, model)


def _network(
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    model: nn.Module,
) -> nn.Module:
    """The network that a file describes; its tensors are read once all of their shapes fit."""
    version = metadata.get("plain")
    if version != VERSION:
        raise ExportError(
            f"version {reprlib.repr(version)}; expected a file that tdlrt exported in format "
            f"'plain', version {VERSION!r}"
        )
    layers = parsed(metadata.get("layers", ""), shapes)
    result = copy.deepcopy(model)
    try:
        for name in layers:
            model.get_submodule(name)  # raises where there is none, before anything is made
        for name, stages in layers.items():
            result = _with_layer(result, name, made(stages))
        _check_shapes(shapes, result)
        tied = _tied_parameters(result)
        # Cloned, since a tensor that is mapped from a file changes with it.
        tensors = {name: read(name).clone() for name in shapes}
        result.load_state_dict(tensors, assign=True)
        for names in tied:  # assign makes a parameter for each name
            _tie(result, names)
    except Exception as error:  # a layer of any size, under any name, can raise nearly anything
        raise ExportError(
            f"does not fit the model ({error}); pass the network as it was before factorize_"
        ) from error
    return result


def _check_shapes(found: Mapping[str, tuple[int, ...]], network: nn.Module) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name}: shape {found.get(name)} in the file, {expected.get(name)} in the network"
            )


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
