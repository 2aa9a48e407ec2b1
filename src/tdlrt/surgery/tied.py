"""Weights that a model uses in several places, such as an embedding that is the output head too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["is_tied", "tensor_places", "tied_weights"]


def tied_weights(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight is also a parameter or buffer of another name, or shares its memory."""
    places = tensor_places(model)
    return {
        module
        for module in model.modules()
        if (weight := module._parameters.get("weight")) is not None and is_tied(weight, places)
    }


def tensor_places(model: nn.Module) -> Mapping[int, int]:
    """How many parameters and buffers of a model stand at each address."""
    return Counter(
        _memory(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )


def is_tied(tensor: Tensor, places: Mapping[int, int]) -> bool:
    """Whether a tensor of the model whose `tensor_places` are given stands in several places."""
    return places[_memory(tensor)] > 1


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's memory; of the object if it has none, or more than one."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.data_ptr() if plain else 0) or id(tensor)
