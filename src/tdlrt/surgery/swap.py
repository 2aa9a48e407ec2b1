"""`replace_modules`, by which all other code replaces modules of a model."""

from __future__ import annotations

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
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _has_weights(module):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not all(map(_is_fused, module.layers)):
            module.use_nested_tensor = False  # only the fused operation takes nested tensors


def _is_fused(layer: nn.Module) -> bool:
    """Whether torch may call its fused operation for a transformer layer."""
    attention = layer._modules.get("self_attn")
    return _has_weights(layer) and bool(getattr(attention, "_qkv_same_embed_dim", True))


def _has_weights(layer: nn.Module) -> bool:
    """Whether the linear layers of a transformer layer have a weight for the fused operation."""
    own = (layer._modules.get("linear1"), layer._modules.get("linear2"))
    return not any(isinstance(module, nn.Sequential | TuckerLayer) for module in own)
