"""The one place where modules of a model are replaced by others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["replace_modules"]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, in place.

    A module that the model holds under several names is replaced under all of them, so shared
    modules stay shared.

    Args:
        model: The model; it cannot be replaced itself.
        replacements: The new module of each module that is to be replaced.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
