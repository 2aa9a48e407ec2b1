"""The registry of dense layer types and their Tucker layers, which users can extend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn import FACTORIZERS, TuckerLayer
from tdlrt.nn.models import weight_shape
from tdlrt.nn.reshape import Reshape, tensor_shape
from tdlrt.nn.start import Modes, Start

__all__ = [
    "Build",
    "build_layer",
    "dense_shape",
    "dense_weight",
    "has_own_layout",
    "is_registered",
    "register_layer",
]


class Build(Protocol):
    """A function that makes the Tucker layer for a dense layer, such as `from_linear`."""

    def __call__(
        self, layer: Any, /, *, rank: Start, modes: Modes, init_scale: float | None
    ) -> TuckerLayer:
        """See `TuckerLinear.from_linear`."""


class _LayerType(NamedTuple):
    build: Build
    weight: Callable[[Any], Tensor] | None = None


_LAYER_TYPES: dict[type[nn.Module], _LayerType] = {
    kind: _LayerType(build) for kind, build in FACTORIZERS.items()
}


def register_layer(
    dense_type: type[nn.Module],
    build: Build,
    *,
    weight: Callable[[Any], Tensor] | None = None,
) -> None:
    """Let `factorize_`, `load` and `add_adapters_` replace layers of a type by Tucker layers.

    Subclasses of the type are not included and have to be registered separately. A second call for
    the same type replaces the first. A dense layer must hold its weight as a Parameter named
    `weight` and its bias, or None, as `bias`.

    Args:
        dense_type: The class of the dense layers.
        build: Called as build(layer, rank=..., modes=..., init_scale=...), with the arguments of
            `TuckerLinear.from_linear`; returns the Tucker layer. It may be a `from_...` method of a
            layer in `tdlrt.nn` or of a class derived from it.
        weight: Returns the weight W of a dense layer, of shape n_1 x ... x n_d in the order
            outputs, inputs, kernel; None if the Parameter `weight` already has that order. Layers
            with a `weight` function get no adapter, because an update could not be merged into the
            Parameter.

    Raises:
        UnsupportedLayerError: dense_type is not a class of modules or is a Tucker layer, or build
            or weight is not callable.
    """
    if not (isinstance(dense_type, type) and issubclass(dense_type, nn.Module)):
        raise UnsupportedLayerError(
            f"dense_type: got {dense_type!r}, expected a subclass of torch.nn.Module"
        )
    if issubclass(dense_type, TuckerLayer):
        raise UnsupportedLayerError(
            f"dense_type: got {dense_type.__name__}, which is in Tucker format already; expected "
            "the class of the dense layers"
        )
    given: list[tuple[str, object]] = [("build", build)]
    if weight is not None:
        given.append(("weight", weight))
    for name, function in given:
        if not callable(function):
            raise UnsupportedLayerError(f"{name}: got {function!r}, expected a function of a layer")
    _LAYER_TYPES[dense_type] = _LayerType(build, weight)


def is_registered(module: nn.Module) -> bool:
    """Whether a Tucker layer is registered for exactly the type of a module."""
    return type(module) in _LAYER_TYPES


def has_own_layout(module: nn.Module) -> bool:
    """Whether the Parameter `weight` has another order than outputs, inputs, kernel."""
    return is_registered(module) and _LAYER_TYPES[type(module)].weight is not None


def build_layer(
    module: nn.Module,
    *,
    rank: Start,
    modes: Modes,
    init_scale: float | None = None,
    reshape: Reshape | None = None,
) -> TuckerLayer:
    """The Tucker layer for a layer of a registered type; the layer is not changed.

    Args:
        module: The dense layer.
        rank: Initial rank, or a `TuckerTensor` that replaces the weight.
        modes: See `factorize_`.
        init_scale: Norm of the initial weight relative to the dense layer's; None keeps the norm of
            the truncated weight.
        reshape: Modes of the rows and columns of a torch.nn.Linear, see `TuckerLinear`.

    Raises:
        UnsupportedLayerError: The registered function does not return a Tucker layer of the shape
            of W.
    """
    options: dict[str, Any] = {} if reshape is None else {"reshape": reshape}
    build = _LAYER_TYPES[type(module)].build
    layer = build(module, rank=rank, modes=modes, init_scale=init_scale, **options)
    shape = tensor_shape(dense_shape(module), reshape)
    if not isinstance(layer, TuckerLayer) or layer.shape != shape:
        got = f"one of shape {layer.shape}" if isinstance(layer, TuckerLayer) else repr(layer)
        raise UnsupportedLayerError(
            f"build: the function registered for {type(module).__name__} returned {got}, expected "
            f"a TuckerLayer of shape {shape}; if the layer stores its weight in another order than "
            "outputs, inputs, kernel, call register_layer with weight=..."
        )
    return layer


def dense_weight(module: nn.Module) -> Tensor:
    """The weight W of a dense layer, of shape outputs x inputs x kernel."""
    view = _LAYER_TYPES[type(module)].weight if is_registered(module) else None
    return module.get_parameter("weight") if view is None else view(module)


def dense_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight W of a Tucker or dense layer, outputs x inputs x kernel."""
    return tuple(dense_weight(module).shape) if has_own_layout(module) else weight_shape(module)
