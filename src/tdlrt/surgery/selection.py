"""Which layers of a model are replaced by Tucker layers, and why others are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from tdlrt.errors import NothingMatchedError, RankError, UnsupportedLayerError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import adapted_modules
from tdlrt.nn.layer_types import dense_shape, is_registered
from tdlrt.nn.others import (
    VECTORS,
    other_modules,
    other_reason,
    other_shape,
    other_size,
    vector_modules,
    vector_size,
)
from tdlrt.nn.start import Modes, weight_obstacle
from tdlrt.ranks import (
    SMALL_INPUT,
    SMALL_MODE,
    RankSpec,
    RelativeTolerance,
    explicit_ranks,
    fraction_within_dense,
    is_fraction,
)
from tdlrt.scalars import as_number
from tdlrt.surgery.attention import Splits, named_parts
from tdlrt.surgery.factorization_report import FactorizationReport, FactorizationRow
from tdlrt.surgery.hooks import has_hooks
from tdlrt.surgery.tied import tied_weights

__all__ = [
    "Patterns",
    "considered_layers",
    "obstacle",
    "pattern_list",
    "plan_surgery",
]

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
    splits: Splits = MappingProxyType({}),
    leave_frozen: bool = False,
    keep_inputs: bool = False,
) -> tuple[FactorizationReport, dict[nn.Module, TuckerLayer]]:
    """Choose the layers of a model to factorise and build their Tucker layers; replace nothing.

    Args:
        model: The model; not changed.
        build: Makes the Tucker layer from a dense layer and a rank. A fraction at which the layer
            would be larger than dense comes as lowered ranks.
        ranks: Ranks by name pattern.
        modes: See `factorize_`.
        include: See `factorize_`.
        exclude: See `factorize_`.
        reasons: Modules that stay dense for a further reason, and that reason.
        splits: Attention in the place of torch's, whose projections may be factorised.
        leave_frozen: Whether layers whose weight needs no gradient stay dense, if others do not.
        keep_inputs: Whether the first of several layers keeps its few inputs under a fraction.

    Returns:
        A report, and the Tucker layer for each layer that is factorised.

    Raises:
        NothingMatchedError: No layer can be factorised, or a pattern matches no layer.
        RankError: `build` refuses a rank; the layer is named.
        UnsupportedLayerError: The model is itself a layer.
    """
    ranks = {pattern: _plain_number(rank) for pattern, rank in ranks.items()}
    considered = considered_layers(model, splits)
    others = other_modules(named_parts(model, splits), considered.values())
    _check_patterns(considered | others, ranks, include, exclude)
    tied, head = tied_weights(model), _output_head(considered, splits)
    first = next(iter(considered.values())) if keep_inputs and len(considered) > 1 else None
    adapted = {part for one in adapted_modules(model).values() for part in one.modules()}
    patterns: dict[str, str | None] = {}
    why: dict[str, str | None] = {}
    for name, module in considered.items():
        pattern = next((pattern for pattern in ranks if fnmatchcase(name, pattern)), None)
        reason = reasons.get(module) or _selection_reason(name, pattern, include, exclude)
        if reason is None and module is head and include is None:
            reason = "output head"
        if reason is None and module in adapted:
            reason = "part of an adapter"
        reason = reason or _layer_reason(module, tied, modes)
        if reason is None and pattern is not None and include is None:
            reason = _thinness(dense_shape(module)) if is_fraction(ranks[pattern]) else None
        patterns[name], why[name] = pattern, reason
    if leave_frozen:
        free = [name for name, reason in why.items() if reason is None]
        frozen = [n for n in free if not considered[n].get_parameter("weight").requires_grad]
        if len(frozen) < len(free):  # else the user wants a frozen model smaller
            why |= dict.fromkeys(frozen, "frozen; name it in include")
    layers: dict[nn.Module, TuckerLayer] = {}
    rows = []
    for name, module in considered.items():
        pattern, reason = patterns[name], why[name]
        if reason is None and pattern is not None:
            try:
                layer, spec, note = _built(module, ranks[pattern], build, is_first=module is first)
            except RankError as error:
                raise RankError(f"{error} (layer {name!r})") from error
            layers[module] = layer
            rows.append(_factorized_row(name, module, layer, spec, note))
        else:
            shape = dense_shape(module)
            size = math.prod(shape) if shape else 0
            rows.append(_skipped_row(name, module, reason or "", shape, size))
    for name, module in others.items():
        reason = reasons.get(module) or other_reason(module)
        rows.append(_skipped_row(name, module, reason, other_shape(module), other_size(module)))
    vectors = vector_modules(named_parts(model, splits), considered.values())
    report = FactorizationReport(
        rows=tuple(rows),
        vectors=tuple(
            _skipped_row(name, module, VECTORS, (size,), size)
            for name, module in vectors.items()
            if (size := vector_size(module))
        ),
    )
    if not layers:
        raise NothingMatchedError(f"model: no layer can be factorised\n{report}")
    return report, layers


def considered_layers(
    model: nn.Module, splits: Splits = MappingProxyType({})
) -> dict[str, nn.Module]:
    """All layers that get a row in the report, factorised or not, by their first name."""
    if _is_considered(model) or model in splits:
        raise UnsupportedLayerError(
            f"model: got a single {type(model).__name__}, which cannot be replaced in place; use "
            "tdlrt.nn.TuckerConv2d.from_conv or a similar method, or wrap it in torch.nn.Sequential"
        )
    parts = named_parts(model, splits)
    return {name: module for name, module in parts if _is_considered(module)}


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
        "rank": [pattern for pattern in pattern_list(list(ranks), "rank") if pattern != "*"],
        "include": pattern_list(include, "include"),
        "exclude": pattern_list(exclude, "exclude"),
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


def _plain_number(rank: RankSpec) -> RankSpec:
    """A number of numpy as Python's, so that it compares with ranks as one value."""
    number = as_number(rank)
    return rank if number is None else number


def _thinness(shape: Sequence[int]) -> str | None:
    """The reason why a fraction as rank leaves a layer dense that has few inputs or outputs.

    A fraction keeps modes of at most `SMALL_MODE` at full rank, because they have little to save,
    and so does it with all inputs or outputs together. A layer with m of them on one side and n on
    the other, n > m, has 2 m^2 parameters more than dense at rank m, and below it loses a part of
    what it passes on that no other layer can replace.
    """
    outputs, inputs = shape[0], math.prod(shape[1:])
    side, count = ("inputs", inputs) if inputs <= outputs else ("outputs", outputs)
    return f"only {count} {side}; name it in include" if count <= SMALL_MODE else None


def obstacle(module: nn.Module, tied: set[nn.Module]) -> str | None:
    """Why no Tucker layer can replace a layer, or None. `tied` is the result of `tied_weights`."""
    if isinstance(module, TuckerLayer):
        return "already in Tucker format"
    if isinstance(module, LazyModuleMixin):
        return weight_obstacle(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if not is_registered(module):
        return other_reason(module)
    if getattr(module, "groups", 1) != 1:
        return f"grouped ({module.groups} groups)"
    reason = weight_obstacle(module)
    if reason is not None:
        return reason
    if module in tied:
        return "weight tied to another parameter"
    if has_hooks(module, [module.get_parameter("weight")]):
        return "has hooks, which would be lost"
    return None


def _smallest_size(shape: Sequence[int], modes: Modes) -> int:
    factored = shape if modes == "all" else shape[:2]
    return math.prod(shape[len(factored) :]) + sum(factored)


def _output_head(considered: Mapping[str, nn.Module], splits: Splits) -> nn.Module | None:
    inside = {part for split in splits.values() for part in split.modules()}
    last = [module for module in considered.values() if module not in inside][-1:]
    return last[0] if last and isinstance(last[0], nn.Linear) and is_registered(last[0]) else None


def _built(
    module: nn.Module,
    asked: RankSpec,
    build: Callable[[nn.Module, RankSpec], TuckerLayer],
    *,
    is_first: bool,
) -> tuple[TuckerLayer, RankSpec, str]:
    """The Tucker layer, its rank, and a note if this is not the rank that was asked for."""
    layer = build(module, asked)
    facts = asked, layer.shape, layer.learned_modes, _channel_modes(layer)
    spec, change = fraction_within_dense(*facts), "lowered to the dense size"
    if is_first and layer.reshape is None and layer.shape[1] <= SMALL_INPUT:
        raised = fraction_within_dense(*facts, whole=(1,))
        if raised != spec:
            spec, change = raised, "raised for the network's inputs"
    if spec == asked:
        return layer, spec, ""
    return build(module, spec), spec, f"rank {asked} {change}"


def _factorized_row(
    name: str, module: nn.Module, layer: TuckerLayer, spec: RankSpec, note: str
) -> FactorizationRow:
    dense, now = math.prod(layer.shape), layer.weight_parameters
    note = note or _clipping_note(spec, layer)
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


def _channel_modes(layer: TuckerLayer) -> int:
    """How many modes a fraction as rank applies to."""
    return 2 if layer.reshape is None else len(layer.shape)


def _clipping_note(spec: RankSpec, layer: TuckerLayer) -> str:
    if isinstance(spec, RelativeTolerance) or len(layer.shape) == 2:
        return ""  # a matrix has one rank, whatever was asked for
    asked = explicit_ranks(spec, layer.shape, _channel_modes(layer))
    cuts = [(one, other) for one, other in zip(asked, layer.ranks, strict=True) if one > other]
    return "".join(f"rank {one} cut to {other}, the others' product" for one, other in cuts)


def _skipped_row(
    name: str, module: nn.Module, reason: str, shape: tuple[int, ...], size: int
) -> FactorizationRow:
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
    return any(fnmatchcase(name, pattern) for pattern in pattern_list(patterns, "patterns"))


def pattern_list(patterns: Patterns | None, argument: str) -> list[str]:
    """The name patterns in a list; None is an empty list.

    Args:
        patterns: One or several patterns.
        argument: Name of the argument, for messages.

    Raises:
        NothingMatchedError: One is not a string, such as a class of layers.
    """
    if patterns is None:
        return []
    single = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    found: list[str] = [patterns] if single else list(patterns)  # type: ignore[list-item]
    for pattern in found:
        if not isinstance(pattern, str):
            raise NothingMatchedError(
                f"{argument}: got {pattern!r}, expected names of layers or patterns such as "
                "'encoder.*'; the layers of a class have the names [name for name, module in "
                "model.named_modules() if isinstance(module, nn.Linear)]"
            )
    return found
