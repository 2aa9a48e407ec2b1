"""The registry of dense layer types and their Tucker layers, which users can extend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn import FACTORIZERS, TuckerLayer
from tdlrt.nn.models import weight_shape
from tdlrt.nn.reshape import Reshape, tensor_shape
from tdlrt.nn.start import Modes, Start
from tdlrt.nn.transposed import TuckerTransposedLinear

__all__ = [
    "Build",
    "as_stored",
    "build_layer",
    "can_store",
    "dense_shape",
    "dense_weight",
    "is_registered",
    "register_layer",
    "takes_reshape",
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
    store: Callable[[Tensor], Tensor] | None = None


def _transposed_weight(dense: Any) -> Tensor:
    weight: Tensor = dense.get_parameter("weight")
    return weight.T


# By class, or by full name where the library of the class need not be installed.
_LAYER_TYPES: dict[type[nn.Module] | str, _LayerType] = {
    **{kind: _LayerType(build) for kind, build in FACTORIZERS.items()},
    "transformers.pytorch_utils.Conv1D": _LayerType(
        TuckerTransposedLinear.from_transposed, weight=_transposed_weight, store=Tensor.t
    ),
}


def register_layer(
    dense_type: type[nn.Module] | str,
    build: Build,
    *,
    weight: Callable[[Any], Tensor] | None = None,
    store: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Let `factorize_`, `load` and `add_adapters_` replace layers of a type by Tucker layers.

    Subclasses of the type are not included and have to be registered separately. A second call for
    the same type replaces the first. A dense layer must hold its weight as a Parameter named
    `weight` and its bias, or None, as `bias`.

    Args:
        dense_type: The class of the dense layers, or its full name, such as
            'transformers.pytorch_utils.Conv1D', if its library need not be imported.
        build: Called as build(layer, rank=..., modes=..., init_scale=...), with the arguments of
            `TuckerLinear.from_linear`; returns the Tucker layer. It may be a `from_...` method of a
            layer in `tdlrt.nn` or of a class derived from it. If it has a parameter `reshape`,
            layers of the type may be named in the `reshape` of `factorize_`.
        weight: Returns the weight W of a dense layer, of shape n_1 x ... x n_d in the order
            outputs, inputs, kernel; None if the Parameter `weight` already has that order.
        store: The inverse of `weight` on tensors: W in the order of the Parameter. Layers with
            `weight` and without `store` get no adapter, because an update could not be merged into
            the Parameter.

    Raises:
        UnsupportedLayerError: dense_type is neither a class of modules nor a full name, or is a
            Tucker layer, or build, weight or store is not callable.
    """
    if isinstance(dense_type, str):
        if not all(map(str.isidentifier, dense_type.split("."))) or "." not in dense_type:
            raise UnsupportedLayerError(
                f"dense_type: got {dense_type!r}, expected a subclass of torch.nn.Module, or the "
                "full name of one, such as 'transformers.pytorch_utils.Conv1D'"
            )
    elif not (isinstance(dense_type, type) and issubclass(dense_type, nn.Module)):
        raise UnsupportedLayerError(
            f"dense_type: got {dense_type!r}, expected a subclass of torch.nn.Module"
        )
    elif issubclass(dense_type, TuckerLayer):
        raise UnsupportedLayerError(
            f"dense_type: got {dense_type.__name__}, which is in Tucker format already; expected "
            "the class of the dense layers"
        )
    given: list[tuple[str, object, str]] = [("build", build, "a function of a layer")]
    if weight is not None:
        given.append(("weight", weight, "a function of a layer"))
    if store is not None:
        given.append(("store", store, "a function of a tensor"))
    for name, function, expected in given:
        if not callable(function):
            raise UnsupportedLayerError(f"{name}: got {function!r}, expected {expected}")
    _LAYER_TYPES[dense_type] = _LayerType(build, weight, store)


def _layer_type(module: nn.Module) -> _LayerType | None:
    kind = type(module)
    return _LAYER_TYPES.get(kind) or _LAYER_TYPES.get(f"{kind.__module__}.{kind.__qualname__}")


def is_registered(module: nn.Module) -> bool:
    """Whether a Tucker layer is registered for exactly the type of a module."""
    return _layer_type(module) is not None


def takes_reshape(module: nn.Module) -> bool:
    """Whether the matrix of a layer can be read as a tensor of more than two modes."""
    kind = _layer_type(module)
    return kind is not None and "reshape" in inspect.signature(kind.build).parameters


def can_store(module: nn.Module) -> bool:
    """Whether W can be written into the Parameter `weight` of a layer (see `as_stored`)."""
    kind = _layer_type(module)
    return kind is None or kind.weight is None or kind.store is not None


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """W, or W read as a tensor of more modes, in the order of the Parameter `weight` of a layer."""
    kind, matrix = _layer_type(module), weight.reshape(dense_shape(module))
    return matrix if kind is None or kind.store is None else kind.store(matrix)


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
        reshape: Modes of the rows and columns of a matrix, see `TuckerLinear`.

    Raises:
        UnsupportedLayerError: No function is registered for the type, or it does not return a
            Tucker layer of the shape of W.
    """
    options: dict[str, Any] = {} if reshape is None else {"reshape": reshape}
    kind = _layer_type(module)
    if kind is None:
        raise UnsupportedLayerError(
            f"module: got {type(module).__name__}, for which no Tucker layer is registered; call "
            "tdlrt.surgery.register_layer"
        )
    layer = kind.build(module, rank=rank, modes=modes, init_scale=init_scale, **options)
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
    kind = _layer_type(module)
    if kind is None or kind.weight is None:
        return module.get_parameter("weight")
    return kind.weight(module)


def dense_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight W of a Tucker or dense layer, outputs x inputs x kernel."""
    kind = _layer_type(module)
    own_order = kind is not None and kind.weight is not None
    return tuple(dense_weight(module).shape) if own_order else weight_shape(module)
