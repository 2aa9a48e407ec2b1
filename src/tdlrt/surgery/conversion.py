"""`to_plain` and `to_dense`: Tucker layers converted to torch layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn

from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import AdaptedModule, adapted_modules
from tdlrt.nn.calls import watch_calls, zeros_for
from tdlrt.nn.fusion import fuse_batch_norms_
from tdlrt.paths import LayerShape, Preference, check_preference
from tdlrt.surgery.swap import replace_modules

__all__ = ["to_dense", "to_plain"]


def to_dense(model: nn.Module) -> nn.Module:
    """Copy of a model in which a torch layer with the full weight replaces every Tucker layer.

    Adapters are merged.

    Args:
        model: Any model; not changed.

    Returns:
        A new model with equal outputs.
    """
    return _converted(copy.deepcopy(model), lambda layer: layer.to_dense())


def to_plain(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    prefer: Preference = "size",
    fuse_batch_norm: bool = False,
) -> nn.Module:
    """Copy of a model in which one or several small torch layers replace every Tucker layer.

    A convolution becomes 1x1, core, 1x1, and a linear layer becomes two linear layers, or fewer
    depending on `prefer`. A `path` that was set on the layer is followed; a path that `autotune_`
    measured only if speed is preferred. Adapters are merged. The result runs and loads without this
    library.

    Args:
        model: Any model; not changed.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32), for which paths are
            chosen; one forward pass on zeros finds the inputs of the layers. If None, many
            positions (batch size times image size) are assumed.
        prefer: 'size' chooses the torch layers with the fewest parameters. They never have more
            than the Tucker layer, unless kernel modes have ranks below the size of the kernel:
            torch has no layer for these modes, so their bases are multiplied into the core. 'speed'
            chooses the torch layers that are expected to be fastest, possibly one dense layer.
        fuse_batch_norm: Fold each BatchNorm in evaluation mode into the layer right before it and
            replace it by an Identity. This needs certainty that the BatchNorm directly follows the
            layer, from a trace by torch.fx or, if the model cannot be traced, from their order in a
            torch.nn.Sequential. After a linear layer it also needs `input_size`, which shows that
            the features are normalised. Other batch norms stay.

    Returns:
        A new model with equal outputs.

    Raises:
        PathError: prefer is neither 'size' nor 'speed'.
        TypeError: input_size is not a sequence of ints.
        ValueError: A size in it is negative or far too large.
    """
    check_preference(prefer)
    result = copy.deepcopy(model)
    calls = {} if input_size is None else _called_shapes(result, input_size)
    result = _converted(
        result, lambda layer: layer.to_plain(layer.plain_path(calls.get(layer, ()), prefer))
    )
    if fuse_batch_norm:
        fuse_batch_norms_(result, input_size)
    return result


def _called_shapes(
    model: nn.Module, input_size: Sequence[int]
) -> dict[nn.Module, list[LayerShape]]:
    """The shapes of all calls in one forward pass, for each Tucker layer whose path is 'auto'."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, TuckerLayer) and module.path == "auto"
    ]
    calls = watch_calls(model, layers, zeros_for(model, input_size))
    return {
        layer: [
            layer.plan_shape(call.input.shape, channels_last=call.channels_last)
            for call in calls[layer]
        ]
        for layer in layers
    }


def _converted(model: nn.Module, convert: Callable[[TuckerLayer], nn.Module]) -> nn.Module:
    """The model with adapters merged and Tucker layers converted, in place unless it is a layer."""
    if isinstance(model, TuckerLayer):
        return convert(model)
    if isinstance(model, AdaptedModule):
        return model.merged()
    replace_modules(model, {one: one.merged() for one in adapted_modules(model).values()})
    layers = [module for module in model.modules() if isinstance(module, TuckerLayer)]
    replace_modules(model, {layer: convert(layer) for layer in layers})
    return model
