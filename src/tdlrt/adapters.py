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
from torch import Tensor, nn

from tdlrt.errors import AdapterError, NothingMatchedError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import (
    AdaptedModule,
    AdapterLayer,
    TrainedCopy,
    adapted_modules,
    adapter_parts,
)
from tdlrt.nn.layer_types import build_layer, can_store, dense_shape, dense_weight
from tdlrt.nn.reshape import Reshape
from tdlrt.nn.start import Modes
from tdlrt.ranks import RankSpec
from tdlrt.scalars import as_int, as_number
from tdlrt.serialization import load, save
from tdlrt.surgery import (
    FactorizationReport,
    Patterns,
    packed_attention,
    pattern_list,
    plan_surgery,
    replace_modules,
    reshaped_layers,
    split_attention,
    without_adapters,
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
        trained_parameters: Number of parameters of these modules.
    """

    trained: tuple[str, ...]
    trained_parameters: int

    _parameters_header: ClassVar[str] = "adapter"

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, in updates and in modules that are trained in full."""
        return sum(row.parameters for row in self.factorized) + self.trained_parameters

    @property
    def _total_line(self) -> str:
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
    reshape: Mapping[str, Reshape] | None = None,
    scale: float | None = None,
) -> AdapterReport:
    """Freeze a model and put a trainable Tucker update beside its weights, in place.

    y = layer(x) + s update(x), where the update has the weight C x_1 U_1 ... x_d U_d and no bias.
    At the start C is zero, so that all outputs stay bitwise equal, and the U_i are random.
    By default the scale of a layer is its gain relative to that of torch's initial weights,

        s = ||W|| / sqrt(n_1 / 3) ,

    W of n_1 x ... x n_d: E ||W||^2 = n_1 / 3 for the weights that torch draws. So a learning rate
    moves a layer relative to its norm, and a layer as torch makes it has s = 1. The step of Adam is
    s times as large as without a scale, that of SGD s^2 times.

    `tdlrt.TDLRT` trains the updates and finds their ranks. A `ParameterBudget` counts the cores and
    bases of the updates; its fraction refers to the dense weights of the adapted layers.

    Layers are selected as by `factorize_`, projections of torch's attention among them, which is
    split into layers until the adapters are merged or removed. All parameters are frozen, except
    those of the updates and of copies of the modules that `train` names, such as a new head. The
    running statistics of batch norms are preserved too: new statistics go to a copy whose
    parameters are frozen.

    Args:
        model: The model; changed in place.
        rank: Initial rank of the updates, for all layers or by name pattern. An int is the rank of
            both channel modes, clipped to the size of each, while kernel modes start at full rank;
            see `factorize_` for other values.
        modes: 'all', or 'channels' to leave kernel modes unfactorised (Tucker-2).
        include: Only layers whose name matches one of these patterns.
        exclude: No layer whose name matches one of these patterns.
        train: Name patterns of modules that are trained in full instead.
        reshape: Linear layers whose update is a tensor, with the modes of its rows and columns by
            name pattern; see `factorize_`.
        scale: s, one number for all layers; None for the default above (1 where W is zero).

    Returns:
        A report with a row per layer; prints as a table.

    Raises:
        AdapterError: The model already has adapters, a module to train in full shares a parameter
            with another module, or scale is not a finite number, or 0.
        NothingMatchedError: No layer can have an adapter, or a pattern matches nothing.
        RankError: A rank is not positive, or larger than its mode, or the sizes of a reshape do
            not multiply to those of the matrix.
        UnsupportedLayerError: The model is itself a layer, or a layer to reshape is not linear.
    """
    if adapted_modules(model):
        raise AdapterError(
            "model: got one with adapters, expected one without; call merge_adapters_ or "
            "unload_adapters_ first"
        )
    number = as_number(scale)
    if scale is not None and (number is None or not _is_scale(number)):
        raise AdapterError(
            f"scale: got {scale!r}, expected a finite number other than 0, with which the updates "
            "would act on nothing and not learn (in float32), or None for the gain of each layer"
        )
    trained = _modules_to_train(model, train)
    tensors = reshaped_layers(model, reshape)
    # An update can be merged only into a Parameter whose order of modes is known.
    reasons = {
        module: "stores its weight in another order"
        for module in model.modules()
        if not can_store(module)
    }
    reasons |= {
        inner: "trained in full" for module in trained.values() for inner in module.modules()
    }
    splits, obstacles = split_attention(model)
    splits = {attention: split for attention, split in splits.items() if attention not in reasons}
    report, updates = plan_surgery(
        model,
        lambda layer, spec: _update(layer, spec, modes, tensors.get(layer)),
        ranks=rank if isinstance(rank, Mapping) else {"*": rank},
        modes=modes,
        include=include,
        exclude=exclude,
        reasons=obstacles | reasons,
        splits=splits,
    )
    replacements: dict[nn.Module, nn.Module] = {
        module: TrainedCopy(module, requires_grad=False)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and module not in reasons
    }
    for parameter in model.parameters():
        parameter.requires_grad = False  # requires_grad_ refuses parameters without a shape yet
    adapters = {
        layer: AdapterLayer(layer, update, _gain(layer) if number is None else number)
        for layer, update in updates.items()
    }
    for attention, split in splits.items():
        if not adapters.keys().isdisjoint(split.modules()):
            for projection in split.projections().values():
                projection.requires_grad_(False)
            split.use(adapters)
            replacements[attention] = split
    replacements |= adapters
    replacements |= {module: TrainedCopy(module) for module in trained.values()}
    replace_modules(model, replacements)
    return AdapterReport(
        rows=report.rows,
        vectors=report.vectors,
        trained=tuple(trained),
        trained_parameters=sum(p.numel() for m in trained.values() for p in m.parameters()),
    )


def merge_adapters_(model: nn.Module) -> None:
    """Merge all updates into the weights, in place: plain torch layers with W + s C x_i U_i.

    Modules trained in full and the statistics of batch norms keep their trained values. All
    parameters stay frozen; `model.requires_grad_(True)` changes that.

    Args:
        model: A model with adapters.

    Raises:
        AdapterError: The model has no adapters.
    """
    _require(model)
    without_adapters(model)


def unload_adapters_(model: nn.Module) -> None:
    """Remove all adapters, in place: the original model, bit for bit, except that it is frozen.

    Args:
        model: A model with adapters.

    Raises:
        AdapterError: The model has no adapters.
    """
    adapted = _require(model)
    replace_modules(model, {module: module.base for module in adapted.values()})
    packed_attention(model)


def save_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Store the updates and the modules trained in full, without the frozen network.

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
    """Load what `save_adapters` stored, in place; the updates get the ranks of the file.

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
            "model on which add_adapters_ was called"
        )
    return adapted


def _modules_to_train(model: nn.Module, train: Patterns | None) -> dict[str, nn.Module]:
    """The modules whose name matches a pattern, by name, without those inside another match."""
    found: dict[str, nn.Module] = {}
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in pattern_list(train, "train"):
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
                "untrained parameter; train both modules or neither"
            )
    return trained


def _is_scale(number: float) -> bool:
    """Whether a number is finite and not zero as a layer stores it, in float32."""
    stored = abs(float(torch.tensor(float(number), dtype=torch.float32)))
    return 0 < stored < math.inf


def _gain(layer: nn.Module) -> Tensor:
    """||W|| / sqrt(n_1 / 3), 1 where W is zero; a tensor, because W may be on the meta device."""
    weight = dense_weight(layer).detach()
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.where(norm > 0, norm / math.sqrt(len(weight) / 3), 1.0)


def _update(layer: nn.Module, rank: RankSpec, modes: Modes, reshape: Reshape | None) -> TuckerLayer:
    """A Tucker layer with the options of a layer, random bases, a zero core and no bias."""
    weight = layer.get_parameter("weight")
    model = copy.copy(layer)
    model._parameters = {"weight": nn.Parameter(torch.randn_like(weight)), "bias": None}
    whole = as_int(rank)
    if reshape is None and whole is not None and whole > 0:
        shape = dense_shape(layer)
        rank = tuple(min(whole, n) if mode < 2 else n for mode, n in enumerate(shape))
    update = build_layer(model, rank=rank, modes=modes, reshape=reshape)
    nn.init.zeros_(update.core)
    return update
