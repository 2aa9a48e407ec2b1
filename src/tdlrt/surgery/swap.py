"""`replace_modules`, by which all other code replaces modules of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from tdlrt.nn import TuckerLayer

__all__ = ["replace_modules"]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of a model, in place.

    A module that occurs under several names is replaced under all of them, so shared modules stay
    shared.

    Args:
        model: The model, which is not replaced itself.
        replacements: The new module for each module that is replaced.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, nn.TransformerEncoderLayer)]
    stacks = [module for module in modules if isinstance(module, nn.TransformerEncoder)]
    apart = [layer for layer in layers if not _has_weights(layer)]
    split = [stack for stack in stacks if not all(map(_is_fused, stack.layers))]
    for parent in modules:
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    for layer in layers:
        if not _has_weights(layer):
            layer.activation_relu_or_gelu = 0
        elif layer in apart:
            layer.activation_relu_or_gelu = _fused_activation(layer)
    for stack in stacks:
        if not all(map(_is_fused, stack.layers)):
            stack.use_nested_tensor = False  # only the fused operation takes nested tensors
        elif stack in split:
            stack.use_nested_tensor = _takes_nested_tensors(stack)


def _fused_activation(layer: nn.TransformerEncoderLayer) -> int:
    """Number of a layer's activation in torch's fused operation, as torch itself finds it."""
    like = nn.TransformerEncoderLayer(1, 1, 1, activation=layer.activation, device="meta")
    return like.activation_relu_or_gelu


def _takes_nested_tensors(stack: nn.TransformerEncoder) -> bool:
    """Whether torch gives nested tensors to a stack of layers, as torch itself finds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says why not, as it did when the stack was built
        enabled = stack.enable_nested_tensor
        return nn.TransformerEncoder(stack.layers[0], 0, None, enabled).use_nested_tensor


def _is_fused(layer: nn.Module) -> bool:
    """Whether torch may call its fused operation for a transformer layer."""
    attention = layer._modules.get("self_attn")
    return _has_weights(layer) and bool(getattr(attention, "_qkv_same_embed_dim", True))


def _has_weights(layer: nn.Module) -> bool:
    """Whether the linear layers of a transformer layer have a weight for the fused operation."""
    own = (layer._modules.get("linear1"), layer._modules.get("linear2"))
    return not any(isinstance(module, nn.Sequential | TuckerLayer) for module in own)
