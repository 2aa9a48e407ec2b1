"""Tucker layers under `torch.compile` while their ranks change."""

from __future__ import annotations

import torch
from torch import nn

from tdlrt.nn.models import tucker_layers

__all__ = ["mark_dynamic_ranks_"]


def mark_dynamic_ranks_(model: nn.Module) -> None:
    """Let `torch.compile` make one graph of a model for all ranks of its Tucker layers.

    Call it before the first forward pass of the compiled model, and set
    `torch._dynamo.config.force_parameter_static_shapes = False`: otherwise torch takes the sizes of
    parameters as fixed, and compiles at every change of ranks. A rank of 1 still gets a graph of
    its own. A layer whose path is 'auto' follows 'three_stage' in such a graph.

    Args:
        model: A model with Tucker layers. Only marks that torch reads are set on cores and bases.

    Raises:
        NothingMatchedError: The model has no Tucker layer.
    """
    for layer in tucker_layers(model).values():
        for mode in layer.learned_modes:
            torch._dynamo.maybe_mark_dynamic(layer.core, mode)
            torch._dynamo.maybe_mark_dynamic(layer.factors[mode], 1)
