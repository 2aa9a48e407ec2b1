"""`replace_modules`, by which all other code replaces modules of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

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
