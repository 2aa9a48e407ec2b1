"""Plain layers in words: the class and the arguments of each, written, checked and made."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Container
from typing import Any, TypeAlias

import torch
from torch import nn

from tdlrt.errors import ExportError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.attention import SplitAttention
from tdlrt.nn.packed import PROJECTIONS, attention_options, inner_sizes, packed_like

__all__ = ["Layers", "changed_layers", "made", "parsed"]

Layers: TypeAlias = dict[str, list[dict[str, Any]]]
"""Stages of layers by the name of the layer; a stage is a class, `kind`, with its arguments."""

_ATTENTION = "MultiheadAttention"

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _is_count(value: object, dims: int) -> bool:
    return type(value) is int and value > 0


def _is_flag(value: object, dims: int) -> bool:
    return isinstance(value, bool)


def _is_mode(value: object, dims: int) -> bool:
    return type(value) is int and -8 <= value <= 8


def _are_sizes(value: object, dims: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(n == -1 or _is_count(n, 0) for n in value)  # -1: as many as there are
    )


def _are_counts(value: object, dims: int) -> bool:
    return isinstance(value, list) and len(value) == dims and all(_is_count(n, 0) for n in value)


def _is_padding(value: object, dims: int) -> bool:
    if isinstance(value, list):
        return len(value) == dims and all(type(n) is int and n >= 0 for n in value)
    return value in ("valid", "same")


def _is_share(value: object, dims: int) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _are_inner_sizes(value: object, dims: int) -> bool:
    return (
        isinstance(value, dict)
        and sorted(value) == sorted(PROJECTIONS)
        and all(isinstance(one, list) and len(one) <= 2 for one in value.values())
        and all(_is_count(n, 0) for one in value.values() for n in one)
    )


_CONV: dict[str, Callable[[object, int], bool]] = {
    "in_channels": _is_count,
    "out_channels": _is_count,
    "kernel_size": _are_counts,
    "stride": _are_counts,
    "padding": _is_padding,
    "dilation": _are_counts,
    "groups": _is_count,
    "padding_mode": lambda value, dims: value in _PADDING_MODES,
    "bias": _is_flag,
}
_ARGUMENTS: dict[str, dict[str, Callable[[object, int], bool]]] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONV),
    "Linear": {"in_features": _is_count, "out_features": _is_count, "bias": _is_flag},
    "Identity": {},
    "Flatten": {"start_dim": _is_mode, "end_dim": _is_mode},
    "Unflatten": {"dim": _is_mode, "unflattened_size": _are_sizes},
    _ATTENTION: {
        "embed_dim": _is_count,
        "num_heads": _is_count,
        "dropout": _is_share,
        "bias": _is_flag,
        "add_bias_kv": _is_flag,
        "add_zero_attn": _is_flag,
        "kdim": _is_count,
        "vdim": _is_count,
        "batch_first": _is_flag,
        "inner": _are_inner_sizes,
    },
}
"""The arguments of each class, each with the check of a value from a file."""

_MAX_STAGES = 32


def changed_layers(model: nn.Module, plain: nn.Module) -> Layers:
    """Descriptions, by name, of the layers that differ between `plain` and the dense network."""
    modules = dict(plain.named_modules(remove_duplicate=False))
    attention = [module for module in model.modules() if isinstance(module, SplitAttention)]
    inside = {part for split in attention for part in split.modules() if part is not split}
    return {
        name: [_describe(stage) for stage in _stages(modules[name])]
        for name, layer in model.named_modules(remove_duplicate=False)
        if layer not in inside
        and (
            isinstance(layer, TuckerLayer) or (name in modules and _is_fused(layer, modules[name]))
        )
    }


def _is_fused(layer: nn.Module, plain: nn.Module) -> bool:
    """Whether a layer was fused with a batch norm, or is a batch norm that was fused."""
    gone = type(layer) is not type(plain)
    return gone or (getattr(layer, "bias", None) is None) != (getattr(plain, "bias", None) is None)


def _stages(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.Sequential) else [module]


def _describe(layer: nn.Module) -> dict[str, Any]:
    """Class and arguments of a plain layer."""
    if isinstance(layer, nn.MultiheadAttention):
        inner = {"inner": inner_sizes(layer)}
        return {"kind": _ATTENTION} | attention_options(layer) | inner
    kind = type(layer).__name__
    described = {"kind": kind} | {name: getattr(layer, name) for name in _ARGUMENTS[kind]}
    return described | {"bias": layer.bias is not None} if "bias" in described else described


def parsed(text: str, tensors: Container[str]) -> Layers:
    """Descriptions of layers from a file, after a check of every part of them.

    Args:
        text: The descriptions as JSON.
        tensors: Names of the tensors in the file.

    Raises:
        ExportError: They are not what `changed_layers` gives, or a layer has no weight in the file.
    """
    try:
        layers = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ExportError(f"not a readable export ({error}); export the network again") from error
    if not isinstance(layers, dict) or not all(isinstance(s, list) and s for s in layers.values()):
        raise ExportError("not a readable export (no layers by name); export the network again")
    for name, stages in layers.items():
        if len(stages) > _MAX_STAGES:
            raise ExportError(
                f"layer {name!r}: {len(stages)} stages, expected at most {_MAX_STAGES}; export the "
                "network again"
            )
        for number, stage in enumerate(stages):
            parts = [name, str(number)] if len(stages) > 1 else [name]
            _check(stage, ".".join(part for part in parts if part), tensors)
    return layers


def _check(stage: Any, name: str, tensors: Container[str]) -> None:
    """Check a stage: nothing goes to torch that is not written here, nor a layer without weight."""
    kind = stage.get("kind") if isinstance(stage, dict) else None
    if not isinstance(kind, str) or kind not in _ARGUMENTS:
        raise ExportError(
            f"layer {name!r}: class {reprlib.repr(kind)}; expected one of {', '.join(_ARGUMENTS)}; "
            "export the network again"
        )
    checks = _ARGUMENTS[kind]
    dims = int(kind[4]) if kind.startswith("Conv") else 0
    wrong = [argument for argument in stage if argument not in checks and argument != "kind"]
    wrong += [argument for argument in checks if not checks[argument](stage.get(argument), dims)]
    if wrong:
        raise ExportError(
            f"layer {name!r}: {kind} with {reprlib.repr(wrong[0])} "
            f"{reprlib.repr(stage.get(wrong[0]))}; expected {', '.join(checks) or 'no arguments'}, "
            "with values that torch has for them; export the network again"
        )
    weight = "weight"
    if kind == _ATTENTION:
        whole = "weight" if not stage["inner"]["out"] else "parametrizations.weight.original"
        weight = f"out_proj.{whole}"
    weight = f"{name}.{weight}" if name else weight
    if "bias" in checks and weight not in tensors:
        raise ExportError(f"not a readable export (no {weight}); export the network again")


def made(stages: list[dict[str, Any]]) -> nn.Module:
    """The layer of some stages, on the meta device: without memory."""
    layers = [_made(**stage) for stage in stages]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _made(kind: str, **arguments: Any) -> nn.Module:
    if kind == _ATTENTION:
        inner = arguments.pop("inner")
        return packed_like(arguments, inner)
    make: Any = getattr(nn, kind)
    with torch.device("meta"):
        layer: nn.Module = make(**arguments)
    return layer
