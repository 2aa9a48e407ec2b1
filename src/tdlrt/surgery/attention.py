"""torch's attention in a model: which can be split into layers, and the names of these."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import AdaptedModule
from tdlrt.nn.attention import PACKED, SplitAttention
from tdlrt.nn.packed import packed
from tdlrt.nn.start import parameter_obstacle
from tdlrt.surgery.hooks import has_hooks, take_over_hooks
from tdlrt.surgery.swap import replace_modules
from tdlrt.surgery.tied import is_tied, tensor_places

__all__ = ["Splits", "named_parts", "packed_attention", "split_attention"]

Splits = Mapping[nn.Module, SplitAttention]


def split_attention(
    model: nn.Module, among: Collection[str] | None = None
) -> tuple[dict[nn.Module, SplitAttention], dict[nn.Module, str]]:
    """The attention modules of a model whose projections can be layers of their own.

    Args:
        model: The model; not changed. The new layers share its memory.
        among: Names of the modules to look at; all if None.

    Returns:
        For each torch.nn.MultiheadAttention, by exact type, a SplitAttention to replace it, and for
        those that cannot be split the reason.
    """
    places = tensor_places(model)
    splits: dict[nn.Module, SplitAttention] = {}
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.MultiheadAttention or module in splits:
            continue
        if among is None or name in among:
            reason = _obstacle(module, places)
            if reason is None:
                splits[module] = SplitAttention(module)
            else:
                reasons[module] = f"projections packed in one parameter; {reason}"
    return splits, reasons


def named_parts(model: nn.Module, splits: Splits) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it would be with split attention in the model."""
    replaced = {part for one in splits for part in one.modules()}
    for name, module in model.named_modules():
        if module in splits:
            yield from splits[module].named_modules(prefix=name)
        elif module not in replaced:
            yield name, module


def packed_attention(model: nn.Module) -> nn.Module:
    """The model with torch's own attention again, in place unless it is an attention itself.

    An attention with projections in Tucker format, or with adapters, stays as it is.
    """
    own: dict[nn.Module, nn.Module] = {
        module: packed(module)
        for module in model.modules()
        if isinstance(module, SplitAttention)
        and not any(isinstance(part, TuckerLayer | AdaptedModule) for part in module.modules())
    }
    for split, attention in own.items():
        take_over_hooks(split, attention)
    replace_modules(model, own)
    return own.get(model, model)


def _obstacle(attention: nn.MultiheadAttention, places: Mapping[int, int]) -> str | None:
    """Why an attention cannot be split into layers, or None."""
    output = attention.out_proj
    if type(output) is not NonDynamicallyQuantizableLinear:
        return f"its output projection is a {type(output).__name__}"
    own = [attention._parameters.get(name) for name in PACKED]
    weights = [weight for weight in own if weight is not None]
    for weight in (*weights, output._parameters.get("weight")):
        reason = parameter_obstacle(weight)
        if reason is not None:
            return reason
        if weight is not None and is_tied(weight, places):
            return "weight tied to another parameter"
    if has_hooks(attention, weights) or has_hooks(output, [output.weight]):
        return "has hooks, which would be lost"
    return None
