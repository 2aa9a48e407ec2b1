"""`to_plain` and `to_dense`: Tucker layers converted to torch layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import adapted_modules
from tdlrt.nn.calls import Inputs, calls_for, random_state_kept
from tdlrt.nn.models import check_model
from tdlrt.paths import LayerShape, Preference, check_preference
from tdlrt.surgery.attention import packed_attention
from tdlrt.surgery.fusion import fuse_batch_norms_
from tdlrt.surgery.hooks import copy_parameter_hooks, take_over_hooks
from tdlrt.surgery.swap import replace_modules

__all__ = ["copied", "plain_layers", "to_dense", "to_plain", "without_adapters"]


def to_dense(model: nn.Module) -> nn.Module:
    """Copy of a model in which a torch layer with the full weight replaces every Tucker layer.

    Adapters are merged. What is frozen stays frozen, and hooks are kept as in `to_plain`.

    Args:
        model: Any model; not changed.

    Returns:
        A new model with equal outputs.
    """
    return _converted(copied(model), lambda layer: layer.to_dense(), pack=True, stacklevel=3)


def to_plain(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    example_inputs: Inputs | None = None,
    prefer: Preference = "size",
    fuse_batch_norm: bool = False,
) -> nn.Module:
    """Copy of a model in which one or several small torch layers replace every Tucker layer.

    A convolution becomes 1x1, core, 1x1, and a linear layer becomes two linear layers, or fewer
    depending on `prefer`. A `path` that was set on the layer is followed; a path that `autotune_`
    measured only if speed is preferred. Adapters are merged. The result runs and loads without this
    library. Attention is torch.nn.MultiheadAttention again. That takes one matrix for each
    projection, so where a projection has fewer parameters as two factors, the factors are the
    parameters of a parametrisation (torch.nn.utils.parametrize), which multiplies them in every
    forward pass; torch stores such a module by its `state_dict` alone.

    A torch layer is trainable if the core or a basis was, its bias if the bias was. Hooks of layers
    and of parameters that remain are kept. A warning names those of cores, of bases and of the
    state_dict of a Tucker layer, which have no place in the result.

    Args:
        model: Any model; not changed.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32), for which paths are
            chosen; one forward pass on zeros finds the inputs of the layers. If None, many
            positions (batch size times image size) are assumed, and for a linear layer with
            `reshape` inputs of shape (batch, features): give one of the two arguments if it is
            applied to sequences.
        example_inputs: Instead of input_size, what the model is called with: a tensor, a tuple of
            inputs or a dict of keyword arguments, for models that take token ids or several inputs.
        prefer: 'size' chooses the torch layers with the fewest parameters. They never have more
            than the Tucker layer, unless kernel modes have ranks below the size of the kernel:
            torch has no layer for these modes, so their bases are multiplied into the core. 'speed'
            chooses the torch layers that are expected to be fastest, possibly one dense layer.
        fuse_batch_norm: Fold each BatchNorm in evaluation mode into the layer right before it and
            replace it by an Identity. This needs certainty that the BatchNorm directly follows the
            layer, from a trace by torch.fx or, if the model cannot be traced, from their order in a
            torch.nn.Sequential. After a linear layer it also needs `input_size` or
            `example_inputs`, which show that the features are normalised. Other batch norms stay.

    Returns:
        A new model with equal outputs.

    Raises:
        PathError: prefer is neither 'size' nor 'speed'.
        TypeError: input_size is not a sequence of ints, or example_inputs has another type.
        ValueError: A size is negative or far too large, the model does not take zeros of this size,
            or both arguments are given.
    """
    return plain_layers(
        model,
        input_size=input_size,
        example_inputs=example_inputs,
        prefer=prefer,
        fuse_batch_norm=fuse_batch_norm,
        pack=True,
    )


def plain_layers(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None,
    example_inputs: Inputs | None,
    prefer: Preference,
    fuse_batch_norm: bool,
    pack: bool,
) -> nn.Module:
    """`to_plain`, or without `pack` the same with attention that is still split.

    The latter is for tracing: it applies projections factor by factor.
    """
    check_preference(prefer)
    result = copied(model)
    with random_state_kept(model):
        calls = _called_shapes(result, input_size, example_inputs)
        result = _converted(
            result,
            lambda layer: layer.to_plain(layer.plain_path(calls.get(layer, ()), prefer)),
            pack=pack,
            stacklevel=4,
        )
        if fuse_batch_norm:
            fuse_batch_norms_(result, input_size, example_inputs)
    return result


def copied(model: nn.Module) -> nn.Module:
    """Deep copy of a model, with the hooks of its parameters.

    copy.deepcopy alone refuses the weights that the hooks of torch.nn.utils.weight_norm compute.

    Raises:
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [one for one in attributes if isinstance(one, Tensor) and not one.is_leaf]
    result = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
    for parameter, copy_of_it in zip(model.parameters(), result.parameters(), strict=True):
        copy_parameter_hooks(parameter, copy_of_it)
    return result


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with adapters merged, in place unless it is an adapter itself."""
    merged: dict[nn.Module, nn.Module] = {
        one: one.merged() for one in adapted_modules(model).values()
    }
    for adapted, layer in merged.items():
        take_over_hooks(adapted, layer)
    replace_modules(model, merged)
    return packed_attention(merged.get(model, model))


def _called_shapes(
    model: nn.Module, input_size: Sequence[int] | None, example_inputs: Inputs | None
) -> dict[nn.Module, list[LayerShape]]:
    """The shapes of all calls in one forward pass, for each Tucker layer whose path is 'auto'."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, TuckerLayer) and module.path == "auto"
    ]
    calls = calls_for(model, layers, input_size, example_inputs)
    return {
        layer: [
            layer.plan_shape(call.input.shape, channels_last=call.channels_last)
            for call in calls.get(layer, ())
        ]
        for layer in layers
    }


def _converted(
    model: nn.Module, convert: Callable[[TuckerLayer], nn.Module], *, pack: bool, stacklevel: int
) -> nn.Module:
    """The model with adapters merged and Tucker layers converted, in place unless it is a layer.

    With `pack`, attention is torch's own again. A warning points to the caller at `stacklevel`.
    """
    model = without_adapters(model)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, TuckerLayer)
    }
    replacements: dict[nn.Module, nn.Module] = {layer: convert(layer) for layer in layers.values()}
    lost = [
        f"{name}.{what}".lstrip(".")
        for name, layer in layers.items()
        for what in take_over_hooks(layer, replacements[layer])
    ]
    if lost:
        warnings.warn(
            f"model: got hooks on {', '.join(lost)}, which have no place in torch layers and are "
            "lost; register hooks on the layers of the new model instead",
            stacklevel=stacklevel,
        )
    replace_modules(model, replacements)
    model = replacements.get(model, model)
    return packed_attention(model) if pack else model
