"""`summary`: ranks, parameters and multiply-adds of a model, next to its dense counterpart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import adapted_modules
from tdlrt.nn.calls import Inputs, LayerCall, calls_for
from tdlrt.nn.layer_types import dense_shape, is_registered
from tdlrt.nn.models import check_model
from tdlrt.nn.others import (
    RECURRENT,
    RECURRENT_TYPES,
    other_modules,
    other_reason,
    other_shape,
    other_size,
)
from tdlrt.nn.products import ProductsOutside
from tdlrt.paths import PathName, path_macs
from tdlrt.text_tables import format_shape, format_table

__all__ = ["LayerSummary", "ModelSummary", "metrics", "named_metrics", "summary"]


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One convolution or linear layer, or another module that holds weights.

    Attributes:
        name: Name in the model.
        kind: Class name.
        shape: Shape (n_1, ..., n_d) of the weight, or of the largest one; empty if it has none yet.
        ranks: (r_1, ..., r_d), or None for a dense layer.
        parameters: Number of parameters of the weight, without the bias.
        dense_parameters: Number of entries of the dense weight.
        plain_parameters: Number of weight parameters of the torch layers that `to_plain` makes.
        macs: Multiply-adds of one forward pass; None if no input size was given, and for modules
            that are neither convolutions nor linear layers, whose products are counted together.
        dense_macs: Multiply-adds of the dense layer; None as before.
        path: Forward path in inference at this input size; None for a dense layer, or if no input
            size was given.
        note: Why a module that is neither a convolution nor a linear layer has no Tucker format.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    parameters: int
    dense_parameters: int
    plain_parameters: int
    macs: int | None
    dense_macs: int | None
    path: PathName | None = None
    note: str = ""

    @property
    def compression(self) -> float:
        """1 - parameters / dense_parameters; 0 for a layer without a shape yet."""
        return 1 - self.parameters / self.dense_parameters if self.dense_parameters else 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model's size and cost; prints as a table.

    Attributes:
        rows: One per convolution or linear layer, then one per other module with weights.
        network_parameters: Number of all parameters of the model.
        frozen_beside: Number of frozen parameters beside adapters. The dense counterpart is the
            merged network, in which they are part of the merged weights.
        vector_parameters: Number of parameters in vectors, such as biases and the scales of norms,
            which have no row.
        macs_outside: Multiply-adds outside of the layers, such as those of queries with keys in
            attention; None if no input size was given.
    """

    rows: tuple[LayerSummary, ...]
    network_parameters: int
    frozen_beside: int = 0
    vector_parameters: int = 0
    macs_outside: int | None = None

    @property
    def _factorized(self) -> list[LayerSummary]:
        return [row for row in self.rows if row.ranks is not None]

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Ranks of the Tucker layers by name."""
        return {row.name: row.ranks for row in self.rows if row.ranks is not None}

    @property
    def parameters(self) -> int:
        """Number of weight parameters of the Tucker layers, without biases."""
        return sum(row.parameters for row in self._factorized)

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense weights of the same layers."""
        return sum(row.dense_parameters for row in self._factorized)

    @property
    def plain_parameters(self) -> int:
        """Number of weight parameters of the torch layers that `to_plain` makes.

        It may exceed `parameters` where kernel modes are factorised, because torch has no layer for
        them. Adapters count as separate layers here, although `to_plain` merges them.
        """
        return sum(row.plain_parameters for row in self._factorized)

    @property
    def compression(self) -> float:
        """1 - parameters / dense_parameters over all Tucker layers; 0 if there are none."""
        return 1 - self.parameters / self.dense_parameters if self._factorized else 0.0

    @property
    def network_dense_parameters(self) -> int:
        """Number of all parameters of the dense counterpart."""
        now = self.network_parameters - self.frozen_beside
        return now + self.dense_parameters - self.parameters

    @property
    def network_compression(self) -> float:
        """1 - network_parameters / network_dense_parameters; 0 for a model without parameters."""
        dense = self.network_dense_parameters
        return 1 - self.network_parameters / dense if dense else 0.0

    @property
    def macs(self) -> int | None:
        """Multiply-adds of all layers and outside of them; None if no input size was given."""
        return _total([*(row.macs for row in self.rows), self.macs_outside])

    @property
    def dense_macs(self) -> int | None:
        """Multiply-adds of the dense counterpart; None if no input size was given."""
        return _total([*(row.dense_macs for row in self.rows), self.macs_outside])

    def __str__(self) -> str:
        header = ["layer", "shape", "ranks", "parameters", "MACs", "compression"]
        header += ["path"] if self.macs is not None else []
        table = [
            [
                row.name,
                format_shape(row.shape),
                "-" if row.ranks is None else format_shape(row.ranks),
                f"{row.parameters:,}",
                "-" if row.macs is None else f"{row.macs:,}",
                "-" if row.ranks is None else f"{100 * row.compression:.1f}%",
                *([row.path or "-"] if self.macs is not None else []),
            ]
            for row in self.rows
        ]
        lines = [
            format_table(header, table),
            f"Tucker layers: {self.parameters:,} of {self.dense_parameters:,} weight parameters, "
            f"compression {100 * self.compression:.1f}%",
            f"network: {self.network_parameters:,} of {self.network_dense_parameters:,} "
            f"parameters, compression {100 * self.network_compression:.1f}%",
        ]
        if self.plain_parameters != self.parameters and not self.frozen_beside:
            kept = 1 - self.plain_parameters / self.dense_parameters
            lines.insert(
                -1,
                f"as plain torch layers: {self.plain_parameters:,} weight parameters, "
                f"compression {100 * kept:.1f}%",
            )
        if self.vector_parameters:
            lines.append(f"of them in vectors, such as biases: {self.vector_parameters:,}")
        if self.macs is not None and self.dense_macs:
            ratio = self.macs / self.dense_macs
            lines.append(f"MACs: {self.macs:,} of {self.dense_macs:,} ({100 * ratio:.1f}%)")
            if self.macs_outside:
                lines.append(f"of them outside of layers, as in attention: {self.macs_outside:,}")
        others = [f"{row.name} ({row.note})" for row in self.rows if row.note]
        if others:
            lines.append(f"no Tucker format: {', '.join(others)}")
        uncounted = [row.name for row in self.rows if row.note == RECURRENT]
        if uncounted and self.macs is not None:
            lines.append(f"not in the MACs: {', '.join(uncounted)}")
        return "\n".join(lines)


def summary(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    example_inputs: Inputs | None = None,
) -> ModelSummary:
    """Ranks, parameters and, given an input size or example inputs, multiply-adds of a model.

    Multiply-adds (MACs, half the floating-point operations) are counted for convolutions and linear
    layers, by one forward pass in evaluation mode, on zeros if only a size is given, and for all
    other matrix products of that pass, such as those of queries with keys in attention. Bias
    additions are not counted, nor is the folding of factors into the core, whose cost does not grow
    with the input, nor are recurrent layers. A Tucker layer is counted along the path that
    inference takes at this input size.

    An adapter has two rows, one for the frozen layer and one for the update.

    Args:
        model: Any model; not changed, nor is torch's random state.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32).
        example_inputs: Instead of input_size, what the model is called with: a tensor, a tuple of
            inputs or a dict of keyword arguments, for models that take token ids or several inputs.

    Returns:
        A summary; prints as a table.

    Raises:
        TypeError: input_size is not a sequence of ints, or example_inputs has another type.
        ValueError: A size is negative or far too large, the model does not take zeros of this size,
            or both arguments are given.
        UnsupportedLayerError: Inputs are given for a model with layers that have no shape yet, or
            the model is no module.
    """
    check_model(model)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TuckerLayer | nn.modules.conv._ConvNd | nn.Linear)
        or is_registered(module)
    }
    recurrent = [module for module in model.modules() if isinstance(module, RECURRENT_TYPES)]
    outside = ProductsOutside([*layers.values(), *recurrent])
    calls = calls_for(model, layers.values(), input_size, example_inputs, outside)
    costs = {module: _cost(module, made) for module, made in calls.items()}
    rows = [_row(name, module, costs.get(module)) for name, module in layers.items()]
    others = other_modules(model.named_modules(), layers.values())
    rows += [_other_row(name, module) for name, module in others.items()]
    sizes = [(one.numel(), one.ndim) for one in model.parameters() if not is_lazy(one)]
    beside = sum(module.replaced_parameters for module in adapted_modules(model).values())
    return ModelSummary(
        rows=tuple(rows),
        network_parameters=sum(size for size, _ in sizes),
        frozen_beside=beside,
        vector_parameters=sum(size for size, ndim in sizes if ndim < 2),
        macs_outside=None if input_size is None and example_inputs is None else outside.macs,
    )


def metrics(model: nn.Module) -> dict[str, float]:
    """Scalars for a logger: ranks, parameters and compression of the Tucker layers.

    They follow from shapes alone, so reading them does not wait for the device.

    Args:
        model: Any model; not changed.

    Returns:
        `tdlrt/rank/<layer>/<mode>`, `tdlrt/parameters` and `tdlrt/compression` (see `summary`).

    >>> from tdlrt.nn import TuckerLinear
    >>> for name, value in metrics(nn.Sequential(TuckerLinear(10, 10, rank=2))).items():
    ...     print(name, value)
    tdlrt/rank/0/0 2.0
    tdlrt/rank/0/1 2.0
    tdlrt/parameters 44.0
    tdlrt/compression 0.56
    """
    size = summary(model)
    return named_metrics(size.ranks, size.parameters, size.compression)


def named_metrics(
    ranks: Mapping[str, Sequence[int]], parameters: int, compression: float
) -> dict[str, float]:
    """The scalars of `metrics`, from numbers that are already known."""
    scalars = {
        f"tdlrt/rank/{layer}/{mode}": float(rank)
        for layer, modes in ranks.items()
        for mode, rank in enumerate(modes)
    }
    return {
        **scalars,
        "tdlrt/parameters": float(parameters),
        "tdlrt/compression": compression,
    }


class _Cost(NamedTuple):
    macs: int
    dense_macs: int
    path: PathName | None


def _row(name: str, module: nn.Module, cost: _Cost | None) -> LayerSummary:
    shape = dense_shape(module)
    dense, tucker = (
        math.prod(shape) if shape else 0,
        module if isinstance(module, TuckerLayer) else None,
    )
    return LayerSummary(
        name=name,
        kind=type(module).__name__,
        shape=shape,
        ranks=tucker.ranks if tucker is not None else None,
        parameters=tucker.weight_parameters if tucker is not None else dense,
        dense_parameters=dense,
        plain_parameters=tucker.plain_parameters if tucker is not None else dense,
        macs=cost and cost.macs,
        dense_macs=cost and cost.dense_macs,
        path=cost and cost.path,
    )


def _other_row(name: str, module: nn.Module) -> LayerSummary:
    size = other_size(module)
    return LayerSummary(
        name=name,
        kind=type(module).__name__,
        shape=other_shape(module),
        ranks=None,
        parameters=size,
        dense_parameters=size,
        plain_parameters=size,
        macs=None,
        dense_macs=None,
        note=other_reason(module),
    )


def _cost(module: nn.Module, calls: Sequence[LayerCall]) -> _Cost:
    """Multiply-adds of the layer and of its dense form over all calls, and the last call's path."""
    costs = [_call_cost(module, call) for call in calls]
    path = costs[-1].path if costs else None
    return _Cost(sum(one.macs for one in costs), sum(one.dense_macs for one in costs), path)


def _call_cost(module: nn.Module, call: LayerCall) -> _Cost:
    if isinstance(module, TuckerLayer):
        planned = module.plan_shape(call.input.shape, channels_last=call.channels_last)
        path = module.planned_path(planned, "inference")
        return _Cost(path_macs(path, planned), path_macs("dense", planned), path)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    positions = call.input.numel() if transposed else math.prod(call.output)
    dense = positions * math.prod(dense_shape(module)[1:])
    return _Cost(dense, dense, None)


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
