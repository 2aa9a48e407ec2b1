"""Adapters: a frozen network and small trainable Tucker updates of its weights."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import nn

from tdlrt.errors import AdapterError, NothingMatchedError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapters import (
    AdaptedModule,
    AdapterLayer,
    TrainedCopy,
    adapted_modules,
    adapter_parts,
)
from tdlrt.nn.start import Modes
from tdlrt.ranks import RankSpec
from tdlrt.serialization import load, save
from tdlrt.surgery import (
    FactorizationReport,
    Patterns,
    as_list,
    build_layer,
    has_own_layout,
    plan_surgery,
    replace_modules,
)

__all__ = [
    "AdapterReport",
    "add_adapters_",
    "load_adapters",
    "merge_adapters_",
    "save_adapters",
    "unload_adapters_",
]


@dataclass(frozen=True, kw_only=True)
class AdapterReport(FactorizationReport):
    """What `add_adapters_` did; prints as a table.

    Attributes:
        trained: Names of the modules that are trained in full.
        trained_parameters: Numbers in them.
    """

    trained: tuple[str, ...]
    trained_parameters: int

    _now: ClassVar[str] = "adapter"

    @property
    def parameters(self) -> int:
        """All trainable numbers: cores and bases of the updates, modules trained in full."""
        return sum(row.parameters for row in self.factorized) + self.trained_parameters

    @property
    def _total(self) -> str:
        total = f"{len(self.factorized)} of {len(self.rows)} layers get an adapter, "
        total += f"{self.parameters - self.trained_parameters:,} parameters"
        if self.trained:
            names = ", ".join(self.trained)
            total += f"; trained in full: {names}, {self.trained_parameters:,} parameters"
        return total


def add_adapters_(
    model: nn.Module,
    *,
    rank: RankSpec | Mapping[str, RankSpec] = 8,
    modes: Modes = "all",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    train: Patterns | None = None,
    scale: float = 1.0,
) -> AdapterReport:
    """Freeze a model and put a trainable Tucker update beside its weights, in place.

    y = layer(x) + s update(x), the weight of the update being C x_1 U_1 ... x_d U_d without bias.
    C is zero at the start, so that no output changes, not by a bit, and the U_i are random.
    `tdlrt.TDLRT` trains the updates and finds their ranks; a `ParameterBudget` counts their cores
    and bases, and its fraction is one of the dense weights of the adapted layers.

    Layers are taken and left alone as by `factorize_`. All parameters are frozen, except those of
    the updates and of copies of the modules that `train` names (a new head, say). Batch norms keep
    their running statistics too: a copy, whose parameters are frozen, takes the new ones.

    Args:
        model: The model; changed in place.
        rank: Rank of the updates at the start, for all layers or by name pattern. An int is that
            of the channel modes, clipped to each, and kernel modes start full; see `factorize_`
            for more.
        modes: 'all', or 'channels' to leave kernel modes unfactorised (Tucker-2).
        include: Only layers whose name matches one of these patterns.
        exclude: No layer whose name matches one of these patterns.
        train: Modules, by name pattern, that are trained in full instead.
        scale: s.

    Returns:
        A report with a row per layer; prints as a table.

    Raises:
        AdapterError: The model has adapters already, a module to train in full shares a parameter
            with another one, or scale is not finite.
        NothingMatchedError: No layer can have an adapter, or a pattern matches nothing.
        RankError: A rank is not positive, or larger than its mode.
        UnsupportedLayerError: The model is itself a layer.
    """
    if adapted_modules(model):
        raise AdapterError(
            "model: got one with adapters, expected one without; merge_adapters_ or "
            "unload_adapters_ first"
        )
    if not math.isfinite(scale):
        raise AdapterError(f"scale: got {scale}, expected a finite number")
    trained = _modules_to_train(model, train)
    # What is merged is added to the Parameter as it is stored.
    reasons = {
        module: "stores its weight in another order"
        for module in model.modules()
        if has_own_layout(module)
    }
    reasons |= {
        inner: "trained in full" for module in trained.values() for inner in module.modules()
    }
    report, updates = plan_surgery(
        model,
        lambda layer, spec: _update(layer, spec, modes),
        ranks=rank if isinstance(rank, Mapping) else {"*": rank},
        modes=modes,
        include=include,
        exclude=exclude,
        reasons=reasons,
    )
    replacements: dict[nn.Module, nn.Module] = {
        module: TrainedCopy(module, requires_grad=False)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and module not in reasons
    }
    model.requires_grad_(False)
    replacements |= {layer: AdapterLayer(layer, update, scale) for layer, update in updates.items()}
    replacements |= {module: TrainedCopy(module) for module in trained.values()}
    replace_modules(model, replacements)
    return AdapterReport(
        rows=report.rows,
        trained=tuple(trained),
        trained_parameters=sum(p.numel() for m in trained.values() for p in m.parameters()),
    )


def merge_adapters_(model: nn.Module) -> None:
    """Take all updates into the weights, in place: plain torch layers with W + s C x_i U_i.

    Modules trained in full and statistics of batch norms stay as trained. All parameters stay
    frozen; `model.requires_grad_(True)` changes that.

    Args:
        model: A model with adapters.

    Raises:
        AdapterError: It has none.
    """
    adapted = _require(model)
    replace_modules(model, {module: module.merged() for module in adapted.values()})


def unload_adapters_(model: nn.Module) -> None:
    """Take all adapters away, in place: the model is what it was before, bit for bit, but frozen.

    Args:
        model: A model with adapters.

    Raises:
        AdapterError: It has none.
    """
    adapted = _require(model)
    replace_modules(model, {module: module.base for module in adapted.values()})


def save_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Store what adapters have beside the frozen network: updates, modules trained in full.

    Args:
        model: A model with adapters.
        path: The file, in the format of `tdlrt.save`.

    Raises:
        AdapterError: The model has no adapters.
        CheckpointError: See `tdlrt.save`.
    """
    _require(model)
    save(adapter_parts(model), path)


def load_adapters(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Take up what `save_adapters` stored, in place; updates take the ranks of the file.

    Everything is checked before anything is changed.

    Args:
        path: A file that `save_adapters` wrote.
        model: The same network with adapters on the same layers, of any ranks.

    Raises:
        AdapterError: The model has no adapters.
        CheckpointError: The file cannot be read, is damaged, or does not fit the model's adapters.
    """
    _require(model)
    load(path, adapter_parts(model))


def _require(model: nn.Module) -> dict[str, AdaptedModule]:
    adapted = adapted_modules(model)
    if not adapted:
        raise AdapterError(
            "model: got one without adapters, expected one on which tdlrt.add_adapters_ was called"
        )
    if "" in adapted:
        raise AdapterError(
            "model: got an adapted layer itself, which cannot be replaced in place; pass the "
            "model that add_adapters_ was called on"
        )
    return adapted


def _modules_to_train(model: nn.Module, train: Patterns | None) -> dict[str, nn.Module]:
    """The outermost modules whose name matches, by name."""
    found: dict[str, nn.Module] = {}
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in as_list(train):
        matches = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
        if not matches:
            raise NothingMatchedError(
                f"train: the pattern {pattern!r} matches no module, expected one that matches "
                f"some of {', '.join(named)}"
            )
        found |= matches
    trained = {
        name: module
        for name, module in found.items()
        if not any(name.startswith(f"{outer}.") for outer in found)
    }
    inside = {module for outer in trained.values() for module in outer.modules()}
    elsewhere = {
        parameter
        for module in model.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    }
    for name, module in trained.items():
        shared = [key for key, parameter in module.named_parameters() if parameter in elsewhere]
        if shared:
            raise AdapterError(
                f"train: {name}.{shared[0]} is shared with another module, which would keep the "
                "old one; train both, or neither"
            )
    return trained


def _update(layer: nn.Module, rank: RankSpec, modes: Modes) -> TuckerLayer:
    """A Tucker layer without bias, with random bases and a zero core, otherwise like the layer."""
    weight = layer.get_parameter("weight")
    model = copy.copy(layer)
    model._parameters = {"weight": nn.Parameter(torch.randn_like(weight)), "bias": None}
    if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0:
        rank = tuple(min(rank, n) if mode < 2 else n for mode, n in enumerate(weight.shape))
    update = build_layer(model, rank=rank, modes=modes)
    nn.init.zeros_(update.core)
    return update
