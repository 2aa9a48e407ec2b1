"""What a model holds: its Tucker layers by name, and the shape of a layer's weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdlrt.errors import NothingMatchedError, UnsupportedLayerError
from tdlrt.nn.layer import TuckerLayer

__all__ = ["check_model", "tucker_layers", "weight_shape"]


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        UnsupportedLayerError: It is none.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedLayerError(
            f"model: got {type(model).__name__}, expected a torch.nn.Module; pass the network "
            "itself, which is changed in place by functions whose name ends in _"
        )


def tucker_layers(model: nn.Module) -> dict[str, TuckerLayer]:
    """The Tucker layers of a model by name.

    Raises:
        NothingMatchedError: The model has no Tucker layer.
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, TuckerLayer)
    }
    if not layers:
        raise NothingMatchedError(
            "model: got one without Tucker layers, expected at least one; call "
            "tdlrt.factorize_(model) first"
        )
    return layers


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, in Tucker format or dense; empty if it has none yet.

    A weight that is computed from other parameters is not computed here, because that may change
    the layer: spectral norm takes a step of its power iteration in training mode.
    """
    if isinstance(module, TuckerLayer):
        return module.shape
    weight = module._parameters.get("weight")
    if weight is None and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if weight is None and isinstance(module, nn.modules.conv._ConvNd):
        modes = [module.out_channels, module.in_channels // module.groups]
        if module.transposed:
            modes = [module.in_channels, module.out_channels // module.groups]
        return (*modes, *module.kernel_size)
    weight = getattr(module, "weight", None) if weight is None else weight
    return tuple(weight.shape) if isinstance(weight, Tensor) and not is_lazy(weight) else ()
