"""Which layers of a model are replaced by Tucker layers, and why others are not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from tdlrt.errors import NothingMatchedError, UnsupportedLayerError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import adapted_modules
from tdlrt.nn.start import Modes
from tdlrt.ranks import RankSpec, RelativeTolerance, explicit_ranks
from tdlrt.surgery.factorization_report import FactorizationReport, FactorizationRow
from tdlrt.surgery.hooks import has_hooks
from tdlrt.surgery.layer_types import dense_shape, is_registered

__all__ = ["Patterns", "obstacle", "pattern_list", "plan_surgery", "tied_weights"]

Patterns: TypeAlias = str | Sequence[str]


def plan_surgery(
    model: nn.Module,
    build: Callable[[nn.Module, RankSpec], TuckerLayer],
    *,
    ranks: Mapping[str, RankSpec],
    modes: Modes,
    include: Patterns | None,
    exclude: Patterns | None,
    reasons: Mapping[nn.Module, str] = MappingProxyType({}),
) -> tuple[FactorizationReport, dict[nn.Module, TuckerLayer]]:
    """Choose the layers of a model to factorise and build their Tucker layers; replace nothing.

    Args:
        model: The model; not changed.
        build: Makes the Tucker layer from a dense layer and a rank.
        ranks: Ranks by name pattern.
        modes: See `factorize_`.
        include: See `factorize_`.
        exclude: See `factorize_`.
        reasons: Modules that stay dense for a further reason, and that reason.

    Returns:
        A report, and the Tucker layer for each layer that is factorised.

    Raises:
        NothingMatchedError: No layer can be factorised, or a pattern matches no layer.
        UnsupportedLayerError: The model is itself a layer.
    """
    considered = _considered(model)
    _check_patterns(considered, ranks, include, exclude)
    tied, head = tied_weights(model), _output_head(considered)
    adapted = {part for one in adapted_modules(model).values() for part in one.modules()}
    layers: dict[nn.Module, TuckerLayer] = {}
    rows = []
    for name, module in considered.items():
        pattern = next((pattern for pattern in ranks if fnmatchcase(name, pattern)), None)
        reason = reasons.get(module) or _selection_reason(name, pattern, include, exclude)
        if reason is None and module is head and include is None:
            reason = "output head"
        if reason is None and module in adapted:
            reason = "part of an adapter"
        reason = reason or _layer_reason(module, tied, modes)
        if reason is None and pattern is not None:
            layers[module] = build(module, ranks[pattern])
            rows.append(_factorized_row(name, module, layers[module], ranks[pattern]))
        else:
            rows.append(_skipped_row(name, module, reason or ""))
    report = FactorizationReport(rows=tuple(rows))
    if not layers:
        raise NothingMatchedError(f"model: no layer can be factorised\n{report}")
    return report, layers


def _considered(model: nn.Module) -> dict[str, nn.Module]:
    """All layers that get a row in the report, factorised or not, by their first name."""
    if _is_considered(model):
        raise UnsupportedLayerError(
            f"model: got a single {type(model).__name__}, which cannot be replaced in place; use "
            "tdlrt.nn.TuckerConv2d.from_conv or a similar method, or wrap it in torch.nn.Sequential"
        )
    return {name: module for name, module in model.named_modules() if _is_considered(module)}


def _is_considered(module: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear, TuckerLayer)
    return isinstance(module, kinds) or is_registered(module)


def _check_patterns(
    considered: Mapping[str, nn.Module],
    ranks: Mapping[str, RankSpec],
    include: Patterns | None,
    exclude: Patterns | None,
) -> None:
    groups = {
        "rank": [pattern for pattern in ranks if pattern != "*"],
        "include": pattern_list(include),
        "exclude": pattern_list(exclude),
    }
    for argument, patterns in groups.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in considered):
                raise NothingMatchedError(
                    f"{argument}: the pattern {pattern!r} matches no layer, expected one that "
                    f"matches some of {', '.join(considered) or 'no layers at all'}"
                )


def _selection_reason(
    name: str, pattern: str | None, include: Patterns | None, exclude: Patterns | None
) -> str | None:
    if include is not None and not _matches(name, include):
        return "not included"
    if exclude is not None and _matches(name, exclude):
        return "excluded"
    return "no rank pattern matches" if pattern is None else None


def _layer_reason(module: nn.Module, tied: set[nn.Module], modes: Modes) -> str | None:
    """The reason why a layer stays dense, or None."""
    shape = dense_shape(module)
    reason = obstacle(module, tied)
    if reason is None and _smallest_size(shape, modes) >= math.prod(shape):
        return "too small to save anything"
    return reason


def obstacle(module: nn.Module, tied: set[nn.Module]) -> str | None:
    """Why no Tucker layer can replace a layer, or None. `tied` is the result of `tied_weights`."""
    kind = type(module).__name__
    if isinstance(module, TuckerLayer):
        return "already in Tucker format"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if not is_registered(module):
        return f"{kind} is not a plain torch layer"
    if getattr(module, "groups", 1) != 1:
        return f"grouped ({module.groups} groups)"
    if "weight" not in module._parameters:
        return "weight computed from other parameters"
    if module in tied:
        return "weight tied to another layer"
    if has_hooks(module, [module.get_parameter("weight")]):
        return "has hooks, which would be lost"
    return None


def _smallest_size(shape: Sequence[int], modes: Modes) -> int:
    factored = shape if modes == "all" else shape[:2]
    return math.prod(shape[len(factored) :]) + sum(factored)


def _output_head(considered: Mapping[str, nn.Module]) -> nn.Module | None:
    last = list(considered.values())[-1:]
    return last[0] if last and isinstance(last[0], nn.Linear) and is_registered(last[0]) else None


def tied_weights(model: nn.Module) -> set[nn.Module]:
    """Layers that share their weight with another layer."""
    owners = [
        (id(module._parameters["weight"]), module)
        for module in model.modules()
        if module._parameters.get("weight") is not None
    ]
    counts = Counter(key for key, _ in owners)
    return {module for key, module in owners if counts[key] > 1}


def _factorized_row(
    name: str, module: nn.Module, layer: TuckerLayer, spec: RankSpec
) -> FactorizationRow:
    dense, now = math.prod(layer.shape), layer.weight_parameters
    note = _clipping_note(spec, layer)
    if not note and now > dense:
        note = "starts larger than dense"
    return FactorizationRow(
        name=name,
        kind=type(module).__name__,
        shape=layer.shape,
        ranks=layer.ranks,
        parameters=now,
        dense_parameters=dense,
        note=note,
    )


def _clipping_note(spec: RankSpec, layer: TuckerLayer) -> str:
    if isinstance(spec, RelativeTolerance) or len(layer.shape) == 2:
        return ""  # a matrix has one rank, whatever was asked for
    asked = explicit_ranks(spec, layer.shape)
    cuts = [(one, other) for one, other in zip(asked, layer.ranks, strict=True) if one > other]
    return "".join(f"rank {one} cut to {other}, the others' product" for one, other in cuts)


def _skipped_row(name: str, module: nn.Module, reason: str) -> FactorizationRow:
    shape = dense_shape(module)
    size = math.prod(shape)
    return FactorizationRow(
        name=name,
        kind=type(module).__name__,
        shape=shape,
        ranks=None,
        parameters=module.weight_parameters if isinstance(module, TuckerLayer) else size,
        dense_parameters=size,
        note=reason,
    )


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in pattern_list(patterns))


def pattern_list(patterns: Patterns | None) -> list[str]:
    """The name patterns in a list; None is an empty list."""
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)
