"""Second moments of the inputs that the layers of a trained network get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.errors import NothingMatchedError
from tdlrt.nn.calls import evaluating
from tdlrt.nn.layer_types import dense_shape, is_registered
from tdlrt.nn.models import check_model

__all__ = ["input_covariances"]


def input_covariances(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Sigma = mean of x x^T over the inputs of each layer, for `factorize_(covariances=...)`.

    x is the vector of features of a linear layer, or of channels of a convolution at one position
    of the image. Padding, stride and correlations between positions are ignored. The model runs in
    evaluation mode and without gradients, and is not changed.

    Args:
        model: A trained network.
        batches: A few batches of inputs: tensors, tuples such as (inputs, labels) of which only
            the first entry is used, or mappings of keyword arguments.

    Returns:
        Sigma, of shape n x n in float64, for each Conv1d/2d/3d, Linear and layer of a registered
        type by name.

    Raises:
        NothingMatchedError: There are no batches, or no layer was called.
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    names = {module: name for name, module in model.named_modules() if is_registered(module)}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names.values(), 0)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = _rows(module, inputs[0]).double()
        name = names[module]
        moments = rows.mT @ rows
        sums[name] = sums[name] + moments if name in sums else moments
        counts[name] += len(rows)

    hooks = [module.register_forward_pre_hook(add) for module in names]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise NothingMatchedError(
            "batches: got none that reaches a Conv1d/2d/3d or Linear, expected a few batches of "
            "inputs; pass new batches, since an iterator that was used before is empty"
        )
    return {name: total / counts[name] for name, total in sums.items()}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, tuple | list) else batch)


def _rows(module: nn.Module, input: Tensor) -> Tensor:
    """Inputs as rows: one per position, with the features or channels as columns."""
    spatial = len(dense_shape(module)) - 2
    if not spatial:
        return input.flatten(0, -2) if input.ndim > 1 else input[None]
    return input.movedim(-spatial - 1, -1).flatten(0, -2)
