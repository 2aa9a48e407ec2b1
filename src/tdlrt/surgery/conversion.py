"""`to_plain` and `to_dense`: Tucker layers back to layers of torch."""

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
    """Copy of a model with every Tucker layer replaced by the torch layer with its full weight.

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
    """Copy of a model in which every Tucker layer is one torch layer or a sequence of small ones.

    A convolution becomes 1x1, core, 1x1, a linear layer two linear layers; or fewer, as `prefer`
    says. A `path` set on the layer is followed; one that `autotune_` measured is followed for
    speed only. Adapters are merged. Nothing of this library is needed to run or load the result.

    Args:
        model: Any model; not changed.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32), to choose for; found
            by one forward pass on zeros. None stands for many positions (batch times image).
        prefer: 'size' takes the torch layers with the fewest parameters. They never have more than
            the Tucker layer, unless the ranks of its kernel modes are below the kernel's size:
            torch has no layer for that, so the bases of these modes are multiplied into the core.
            'speed' takes the torch layers that are expected to be the fastest, which may be one
            dense layer.
        fuse_batch_norm: Fold each BatchNorm in evaluation mode into the layer right before it and
            put an Identity in its place. Done where the next module is certain: as seen in a
            trace by torch.fx or, if the model cannot be traced, next to each other in a
            torch.nn.Sequential. After a linear layer it also takes `input_size`, which shows
            that the features are normalised. Elsewhere batch norms stay.

    Returns:
        A new model with equal outputs.

    Raises:
        PathError: prefer is neither 'size' nor 'speed'.
        TypeError: input_size is no sequence of ints.
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
    """The calls of each Tucker layer without a path of its own, in a forward pass."""
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
    """The model with adapters merged and every Tucker layer converted, in place where possible."""
    if isinstance(model, TuckerLayer):
        return convert(model)
    if isinstance(model, AdaptedModule):
        return model.merged()
    replace_modules(model, {one: one.merged() for one in adapted_modules(model).values()})
    layers = [module for module in model.modules() if isinstance(module, TuckerLayer)]
    replace_modules(model, {layer: convert(layer) for layer in layers})
    return model
