"""Surgery on models: dense layers into Tucker format, and back to plain torch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from tdlrt.errors import NothingMatchedError, RankError, UnsupportedLayerError
from tdlrt.nn import FACTORIZERS, TuckerLayer
from tdlrt.nn.adapters import AdaptedModule, adapted_modules
from tdlrt.nn.calls import watch_calls, zeros_for
from tdlrt.nn.fusion import fuse_batch_norms_
from tdlrt.nn.layer import weight_shape
from tdlrt.nn.start import Modes, weighted_start
from tdlrt.paths import LayerShape, Preference, check_preference
from tdlrt.ranks import RankSpec, RelativeTolerance, explicit_ranks
from tdlrt.tables import format_shape, format_table

__all__ = [
    "FactorizationReport",
    "FactorizationRow",
    "Patterns",
    "as_list",
    "factorize_",
    "obstacle",
    "plan_surgery",
    "replace_modules",
    "tied_weights",
    "to_dense",
    "to_plain",
]

Patterns: TypeAlias = str | Sequence[str]

# Norm of the start relative to the layer's own, for training from scratch (docs/algorithm.md).
DEFAULT_INIT_SCALE = 0.3

_CONSIDERED = (nn.modules.conv._ConvNd, nn.Linear, TuckerLayer)


@dataclass(frozen=True, kw_only=True)
class FactorizationRow:
    """What happened, or would happen, to one layer.

    Attributes:
        name: Name of the layer in the model.
        kind: Its class before.
        shape: Shape of its weight.
        ranks: Ranks at the start, or None where the layer is left alone.
        parameters: Numbers that stand for the weight afterwards.
        dense_parameters: Numbers in the dense weight.
        note: Why it was left alone, or what is worth knowing.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    parameters: int
    dense_parameters: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FactorizationReport:
    """The plan or the outcome of `factorize_`; prints as a table."""

    rows: tuple[FactorizationRow, ...]

    _now: ClassVar[str] = "now"

    @property
    def factorized(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers put in Tucker format."""
        return tuple(row for row in self.rows if row.ranks is not None)

    @property
    def skipped(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers left alone, the reason in `note`."""
        return tuple(row for row in self.rows if row.ranks is None)

    def __str__(self) -> str:
        table = [
            [
                row.name,
                format_shape(row.shape),
                "-" if row.ranks is None else format_shape(row.ranks),
                f"{row.dense_parameters:,}",
                f"{row.parameters:,}",
                row.note,
            ]
            for row in self.rows
        ]
        header = ["layer", "shape", "ranks", "dense", self._now, "note"]
        return f"{format_table(header, table)}\n{self._total}"

    @property
    def _total(self) -> str:
        hits = self.factorized
        before = sum(row.dense_parameters for row in hits)
        after = sum(row.parameters for row in hits)
        return (
            f"{len(hits)} of {len(self.rows)} layers in Tucker format, "
            f"{before:,} -> {after:,} weight parameters"
        )


def factorize_(
    model: nn.Module,
    *,
    rank: RankSpec | Mapping[str, RankSpec] = 0.5,
    modes: Modes = "all",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    init_scale: float | Literal["auto"] | None = "auto",
    covariances: Mapping[str, Tensor] | None = None,
    dry_run: bool = False,
) -> FactorizationReport:
    """Put the convolutions and linear layers of a model in Tucker format, in place.

    Conv1d/2d/3d and Linear are taken by exact type. Left alone, with the reason in the report: the
    output head (a Linear registered last), grouped and transposed convolutions, layers that would
    not be smaller even at rank 1, tied weights and layers with hooks. Shared modules stay shared,
    biases keep their Parameter. Everything is validated and computed before anything is changed.

    Args:
        model: The model; changed in place unless dry_run.
        rank: Initial rank, for all layers or by name pattern (the first that matches; layers that
            none matches are left alone). A fraction in (0, 1] of the channel modes, an int, a tuple
            with one rank per mode, 'full', or a `RelativeTolerance`.
        modes: 'all', or 'channels' to leave kernel modes unfactorised (Tucker-2).
        include: Only layers whose name matches one of these patterns (`*`, `?`, `[..]`), the output
            head too if it does.
        exclude: No layer whose name matches one of these patterns.
        init_scale: Norm of the start relative to the layer's own; None keeps the truncated weight
            as it is. 'auto' is None where the rank asks to keep the network ('full' or a
            tolerance) and 0.3 otherwise: from a smaller start the learned directions stand out,
            and the tolerance can tell them from the rest.
        covariances: Second moments of the inputs by layer name, from `input_covariances`, for a
            trained network. The truncation then keeps what the layer does to such inputs (a
            tolerance bounds that error), and init_scale stays 'auto', which is None here. A layer
            that is not in it is truncated as it is.
        dry_run: Only report what would be done.

    Returns:
        A report with a row per layer; prints as a table.

    Raises:
        NothingMatchedError: No layer can be factorised, or a pattern matches no layer.
        RankError: A rank is not positive, or larger than its mode; a covariance does not fit its
            layer, or comes with an init_scale.
        UnsupportedLayerError: The model is itself a layer; use e.g. TuckerConv2d.from_conv.
        NonFiniteError: A weight is not finite.
    """
    ranks = rank if isinstance(rank, Mapping) else {"*": rank}
    weighted = {} if covariances is None else _by_layer(model, covariances)
    if weighted and init_scale != "auto":
        raise RankError(
            f"init_scale: got {init_scale} together with covariances, which keep the outputs as "
            "they are; leave it out"
        )

    def build(module: nn.Module, spec: RankSpec) -> TuckerLayer:
        if module in weighted:
            weight = module.get_parameter("weight").detach()
            start = weighted_start(weight, spec, modes, weighted[module])
            return FACTORIZERS[type(module)](module, rank=start, modes=modes)
        scale = _resolve_scale(init_scale, spec)
        return FACTORIZERS[type(module)](module, rank=spec, modes=modes, init_scale=scale)

    report, replacements = plan_surgery(
        model, build, ranks=ranks, modes=modes, include=include, exclude=exclude
    )
    if not dry_run:
        replace_modules(model, replacements)
    return report


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
    """Walk over a model's layers: which get a Tucker layer, and why others do not.

    Args:
        model: The model; not changed.
        build: Makes the Tucker layer for a torch layer and a rank.
        ranks: Ranks by name pattern.
        modes: See `factorize_`.
        include: See `factorize_`.
        exclude: See `factorize_`.
        reasons: Why some modules are left alone that would be taken otherwise.

    Returns:
        A report, and the Tucker layer of each layer taken.

    Raises:
        NothingMatchedError: No layer can be factorised, or a pattern matches no layer.
        UnsupportedLayerError: The model is itself a layer.
    """
    candidates = _candidates(model)
    _check_patterns(candidates, ranks, include, exclude)
    tied, head = tied_weights(model), _output_head(candidates)
    adapted = {part for one in adapted_modules(model).values() for part in one.modules()}
    layers: dict[nn.Module, TuckerLayer] = {}
    rows = []
    for name, module in candidates.items():
        pattern = next((pattern for pattern in ranks if fnmatchcase(name, pattern)), None)
        reason = reasons.get(module) or _selection_reason(name, pattern, include, exclude)
        if reason is None and module is head and include is None:
            reason = "output head"
        if reason is None and module in adapted:
            reason = "part of an adapter"
        reason = reason or _layer_reason(module, tied, modes)
        if reason is None and pattern is not None:
            layers[module] = build(module, ranks[pattern])
            rows.append(_hit(name, module, layers[module], ranks[pattern]))
        else:
            rows.append(_skip(name, module, reason or ""))
    report = FactorizationReport(rows=tuple(rows))
    if not layers:
        raise NothingMatchedError(f"model: no layer can be factorised\n{report}")
    return report, layers


def to_dense(model: nn.Module) -> nn.Module:
    """Copy of a model with every Tucker layer replaced by the torch layer with its full weight.

    Adapters are merged.

    Args:
        model: Any model; not changed.

    Returns:
        A new model with equal outputs.
    """
    return _replaced(copy.deepcopy(model), lambda layer: layer.to_dense())


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
    result = _replaced(
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


def _replaced(model: nn.Module, convert: Callable[[TuckerLayer], nn.Module]) -> nn.Module:
    if isinstance(model, TuckerLayer):
        return convert(model)
    if isinstance(model, AdaptedModule):
        return model.merged()
    replace_modules(model, {one: one.merged() for one in adapted_modules(model).values()})
    layers = [module for module in model.modules() if isinstance(module, TuckerLayer)]
    replace_modules(model, {layer: convert(layer) for layer in layers})
    return model


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they stand in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that a reader of the report would ask about, by first name."""
    if isinstance(model, _CONSIDERED):
        raise UnsupportedLayerError(
            f"model: got a single {type(model).__name__}, which cannot be replaced in place; use "
            "tdlrt.nn.TuckerConv2d.from_conv or its like, or wrap it in torch.nn.Sequential"
        )
    return {
        name: module for name, module in model.named_modules() if isinstance(module, _CONSIDERED)
    }


def _check_patterns(
    candidates: Mapping[str, nn.Module],
    ranks: Mapping[str, RankSpec],
    include: Patterns | None,
    exclude: Patterns | None,
) -> None:
    groups = {
        "rank": [pattern for pattern in ranks if pattern != "*"],
        "include": as_list(include),
        "exclude": as_list(exclude),
    }
    for argument, patterns in groups.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise NothingMatchedError(
                    f"{argument}: the pattern {pattern!r} matches no layer, expected one that "
                    f"matches some of {', '.join(candidates) or 'no layers at all'}"
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
    """Why a layer is not factorised, or None."""
    shape = weight_shape(module)
    reason = obstacle(module, tied)
    if reason is None and _smallest_size(shape, modes) >= math.prod(shape):
        return "too small to save anything"
    return reason


def obstacle(module: nn.Module, tied: set[nn.Module]) -> str | None:
    """Why a layer cannot be replaced by a Tucker layer, or None; `tied` are the `tied_weights`."""
    kind = type(module).__name__
    if isinstance(module, TuckerLayer):
        return "in Tucker format already"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if type(module) not in FACTORIZERS:
        return f"{kind} is not a plain torch layer"
    if getattr(module, "groups", 1) != 1:
        return f"grouped ({module.groups} groups)"
    if "weight" not in module._parameters:
        return "weight computed from other parameters"
    if module in tied:
        return "weight tied to another layer"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return "has hooks, which would be lost"
    return None


def _smallest_size(shape: Sequence[int], modes: Modes) -> int:
    factored = shape if modes == "all" else shape[:2]
    return math.prod(shape[len(factored) :]) + sum(factored)


def _output_head(candidates: Mapping[str, nn.Module]) -> nn.Module | None:
    last = list(candidates.values())[-1:]
    return last[0] if last and type(last[0]) is nn.Linear else None


def tied_weights(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight is that of another layer too."""
    owners = [
        (id(module._parameters["weight"]), module)
        for module in model.modules()
        if module._parameters.get("weight") is not None
    ]
    counts = Counter(key for key, _ in owners)
    return {module for key, module in owners if counts[key] > 1}


def _by_layer(model: nn.Module, covariances: Mapping[str, Tensor]) -> dict[nn.Module, Tensor]:
    modules = dict(model.named_modules())
    unknown = [name for name in covariances if name not in modules]
    if unknown:
        raise NothingMatchedError(
            f"covariances: got {unknown[0]!r}, which is no layer of the model; expected what "
            "tdlrt.input_covariances(model, batches) returns"
        )
    return {modules[name]: covariance for name, covariance in covariances.items()}


def _resolve_scale(init_scale: float | str | None, spec: RankSpec) -> float | None:
    if init_scale != "auto":
        return init_scale  # type: ignore[return-value]
    keeps = isinstance(spec, RelativeTolerance) or spec == "full"
    return None if keeps else DEFAULT_INIT_SCALE


def _hit(name: str, module: nn.Module, layer: TuckerLayer, spec: RankSpec) -> FactorizationRow:
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
        return ""  # the ranks of a matrix are one number, whatever was asked
    asked = explicit_ranks(spec, layer.shape)
    cuts = [(one, other) for one, other in zip(asked, layer.ranks, strict=True) if one > other]
    return "".join(f"rank {one} cut to {other}, the others' product" for one, other in cuts)


def _skip(name: str, module: nn.Module, reason: str) -> FactorizationRow:
    size = math.prod(weight_shape(module))
    return FactorizationRow(
        name=name,
        kind=type(module).__name__,
        shape=weight_shape(module),
        ranks=None,
        parameters=module.weight_parameters if isinstance(module, TuckerLayer) else size,
        dense_parameters=size,
        note=reason,
    )


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in as_list(patterns))


def as_list(patterns: Patterns | None) -> list[str]:
    """Name patterns, given as one, several or none."""
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)
