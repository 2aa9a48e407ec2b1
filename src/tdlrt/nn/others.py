"""Modules that hold weights but have no Tucker layer, such as attention, and the reason why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from tdlrt.nn.attention import SplitAttention

__all__ = [
    "RECURRENT",
    "RECURRENT_TYPES",
    "VECTORS",
    "other_modules",
    "other_reason",
    "other_shape",
    "other_size",
    "vector_modules",
    "vector_size",
]

VECTORS = "vectors, such as scales and biases, have no ranks"

RECURRENT = "recurrent layer"
RECURRENT_TYPES = (nn.RNNBase, nn.RNNCellBase)

_REASONS: dict[type[nn.Module], str] = {
    SplitAttention: "added to keys and values, one vector each",
    nn.MultiheadAttention: "projections packed in one parameter",
    nn.modules.linear.NonDynamicallyQuantizableLinear: "attention reads its weight itself",
    **dict.fromkeys(RECURRENT_TYPES, RECURRENT),
    nn.Embedding: "embedding, a table of rows",
    nn.EmbeddingBag: "embedding, a table of rows",
}


def other_modules(
    named: Iterable[tuple[str, nn.Module]], layers: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """The modules outside given layers that hold a parameter of two or more dimensions, by name.

    The name of the model itself is '(model)'.

    Args:
        named: The modules of a model, as from `named_modules()`.
        layers: Layers that are not looked at.
    """
    return _outside(named, layers, lambda module: bool(_weights(module)))


def vector_modules(
    named: Iterable[tuple[str, nn.Module]], layers: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """The modules outside given layers that hold vectors alone, such as norms, by name.

    Args:
        named: The modules of a model, as from `named_modules()`.
        layers: Layers that are not looked at.
    """
    return _outside(named, layers, lambda one: vector_size(one) > 0 and not _weights(one))


def _outside(
    named: Iterable[tuple[str, nn.Module]],
    layers: Iterable[nn.Module],
    wanted: Callable[[nn.Module], bool],
) -> dict[str, nn.Module]:
    """The wanted modules outside given layers, by name."""
    inside = {part for layer in layers for part in layer.modules()}
    return {
        name or "(model)": module
        for name, module in named
        if module not in inside and wanted(module)
    }


def vector_size(module: nn.Module) -> int:
    """Number of entries of all vectors and scalars that a module holds itself."""
    own = module._parameters.values()
    return sum(one.numel() for one in own if one is not None and not is_lazy(one) and one.ndim < 2)


def other_reason(module: nn.Module) -> str:
    """Why a module of a type without a Tucker layer stays dense."""
    known = next((why for kind, why in _REASONS.items() if isinstance(module, kind)), None)
    if known is None and any(module.children()):
        return "parameters beside its layers"
    return known or f"{type(module).__name__} is not a plain torch layer"


def other_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the largest parameter of two or more dimensions that a module holds itself."""
    return tuple(max(_weights(module), key=nn.Parameter.numel).shape)


def other_size(module: nn.Module) -> int:
    """Number of entries of all parameters of two or more dimensions that a module holds itself."""
    return sum(weight.numel() for weight in _weights(module))


def _weights(module: nn.Module) -> list[nn.Parameter]:
    own = module._parameters.values()
    return [one for one in own if one is not None and not is_lazy(one) and one.ndim > 1]
