"""`factorize_`: puts the layers of a model in Tucker format."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from tdlrt.errors import NothingMatchedError, RankError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.calls import random_state_kept
from tdlrt.nn.layer_types import build_layer, dense_weight
from tdlrt.nn.models import check_model
from tdlrt.nn.reshape import Reshape
from tdlrt.nn.start import Modes, auto_scale, weighted_start
from tdlrt.ranks import RankSpec
from tdlrt.surgery.attention import named_parts, split_attention
from tdlrt.surgery.factorization_report import FactorizationReport
from tdlrt.surgery.reshaping import reshaped_layers
from tdlrt.surgery.selection import Patterns, plan_surgery
from tdlrt.surgery.swap import replace_modules

__all__ = ["factorize_"]


def factorize_(
    model: nn.Module,
    *,
    rank: RankSpec | Mapping[str, RankSpec] = 0.5,
    modes: Modes = "all",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    init_scale: float | Literal["auto"] | None = "auto",
    covariances: Mapping[str, Tensor] | None = None,
    reshape: Mapping[str, Reshape] | None = None,
    dry_run: bool = False,
) -> FactorizationReport:
    """Put the convolutions and linear layers of a model in Tucker format, in place.

    Layers whose type is exactly Conv1d/2d/3d or Linear are factorised, and those of types that were
    registered with `tdlrt.surgery.register_layer`, such as Conv1D of transformers. The projections
    of torch.nn.MultiheadAttention are factorised under the names q_proj, k_proj, v_proj and
    out_proj: a `tdlrt.nn.SplitAttention` takes its place. These are left dense, with the reason in
    the report: the output head (a Linear registered last), frozen layers and, where the rank is a
    fraction below 1, layers of at most 4 inputs or outputs in all (docs/algorithm.md), unless
    `include` names them; grouped and transposed convolutions, layers that would not be smaller even
    at rank 1, tied weights, weights that are complex, quantised or without a shape yet, and layers
    with hooks. The report also lists other modules with weights, such as embeddings. On the meta
    device layers get their ranks, to be filled from a file later. Shared modules stay shared, and
    biases stay the same Parameters. Everything is validated and computed before anything is
    changed.

    Args:
        model: The model; changed in place unless dry_run is set.
        rank: Initial rank, for all layers or by name pattern. The first pattern that matches
            counts, and layers that no pattern matches stay dense. A rank is a fraction in (0, 1] of
            the channel modes, an int, a tuple with one rank per mode, 'full' or a
            `RelativeTolerance`. Where a fraction below 1 would make a layer larger than dense, its
            ranks are lowered until it is not, and the first of several layers keeps as many of at
            most 64 input channels as its dense size allows. Other ranks stay as typed. The report
            says so.
        modes: 'all', or 'channels' to leave kernel modes unfactorised (Tucker-2).
        include: Only layers whose name matches one of these patterns (`*`, `?`, `[..]`) are
            factorised, including the output head, frozen layers and those of few inputs or outputs
            if they match. Without it, frozen layers stay dense, unless all layers that could be
            factorised are frozen.
        exclude: Layers whose name matches one of these patterns stay dense.
        init_scale: Norm of the initial weight relative to the dense layer's; None keeps the norm of
            the truncated weight. 'auto' is None if the rank asks to keep the network ('full' or a
            tolerance). Otherwise it is 1 to 1.5, the more the lower the ranks, so that a network
            without normalisation learns as fast as the dense one (docs/algorithm.md).
        covariances: Second moments of the inputs by layer name, from `input_covariances`, for a
            trained network. The truncation then minimises the error of the outputs for such inputs,
            which a tolerance bounds, and init_scale must stay 'auto', which is None here. Layers
            without a covariance are truncated in the usual way.
        reshape: Linear layers whose matrix is read as a tensor, by name pattern, each with the
            sizes of the modes of its rows and of its columns, see `TuckerLinear`.
            {'fc1': ((500,), (50, 4, 4))} suits a layer behind a flattened map of 50 x 4 x 4
            features; `flattened_modes` finds such layers. The first pattern that matches counts.
        dry_run: Only report what would be done; torch's random state does not change either.

    Returns:
        A report with a row per layer; prints as a table. It says how far the start is from each
        weight, which a `RelativeTolerance` as rank bounds, to keep a trained network.

    Raises:
        NothingMatchedError: No layer can be factorised, or a pattern matches no layer or is no name
            pattern.
        RankError: A rank is not positive, or larger than its mode, or a covariance does not fit its
            layer or is given together with an init_scale or a reshape, or the sizes of a reshape do
            not multiply to those of the matrix.
        UnsupportedLayerError: The model is itself a layer, for which there is for example
            TuckerConv2d.from_conv, or no module, or a layer to reshape is not linear.
        NonFiniteError: A weight is not finite.
    """
    check_model(model)
    ranks = rank if isinstance(rank, Mapping) else {"*": rank}
    weighted = {} if covariances is None else _by_layer(model, covariances)
    if weighted and init_scale != "auto":
        raise RankError(
            f"init_scale: got {init_scale} together with covariances, which preserve the outputs; "
            "leave init_scale out"
        )
    tensors = reshaped_layers(model, reshape)
    if weighted.keys() & tensors.keys():
        raise RankError(
            "reshape: got a layer with a covariance of its inputs, which belongs to the columns "
            "of its matrix; leave the layer out of reshape or of covariances"
        )

    def build(module: nn.Module, spec: RankSpec) -> TuckerLayer:
        if module in weighted:
            weight = dense_weight(module).detach()
            start = weighted_start(weight, spec, modes, weighted[module])
            return build_layer(module, rank=start, modes=modes)
        tensor_modes, scale = tensors.get(module), init_scale
        if scale == "auto":
            scale = auto_scale(dense_weight(module).detach(), spec, modes, tensor_modes)
        return build_layer(module, rank=spec, modes=modes, init_scale=scale, reshape=tensor_modes)

    splits, reasons = split_attention(model)
    with random_state_kept(model) if dry_run else nullcontext():
        report, layers = plan_surgery(
            *(model, build),
            ranks=ranks,
            modes=modes,
            include=include,
            exclude=exclude,
            reasons=reasons,
            splits=splits,
            leave_frozen=include is None,
            keep_inputs=True,
        )
        parts = dict(named_parts(model, splits))
        changes = {
            name: _change(part, layers[part]) for name, part in parts.items() if part in layers
        }
    left = tensors.keys() - layers
    rows = [
        replace(
            row,
            change=changes.get(row.name),
            note=f"{row.note}; reshape has no effect" if parts.get(row.name) in left else row.note,
        )
        for row in report.rows
    ]
    report = replace(report, rows=tuple(rows))
    if not dry_run:
        replacements: dict[nn.Module, nn.Module] = dict(layers)
        for attention, split in splits.items():
            if not layers.keys().isdisjoint(split.modules()):
                split.use(layers)
                replacements[attention] = split
        replace_modules(model, replacements)
    return report


def _by_layer(model: nn.Module, covariances: Mapping[str, Tensor]) -> dict[nn.Module, Tensor]:
    modules = dict(model.named_modules())
    unknown = [name for name in covariances if name not in modules]
    if unknown:
        raise NothingMatchedError(
            f"covariances: got {unknown[0]!r}, which is not a layer of the model; pass what "
            "tdlrt.input_covariances(model, batches) returns"
        )
    return {modules[name]: covariance for name, covariance in covariances.items()}


@torch.no_grad()
def _change(dense: nn.Module, tucker: TuckerLayer) -> float | None:
    """||W - W'|| / ||W||, which is 0 for W = 0; None without values."""
    weight, start = dense_weight(dense), tucker.dense_weight()
    if weight.is_meta:
        return None
    before = weight if weight.dtype == torch.float64 else weight.float()
    norm, difference = before.norm(), (before - start.reshape(before.shape)).norm()
    return float(difference / norm) if norm > 0 else 0.0
