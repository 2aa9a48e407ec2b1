"""Penalties on the weights of Tucker layers that are added to a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdlrt.linalg import unfold
from tdlrt.nn.models import tucker_layers

__all__ = ["spectral_penalty"]


def spectral_penalty(model: nn.Module) -> Tensor:
    """Penalty on unequal singular values of the cores, which makes networks more robust.

        R = sum over layers and modes i of || Mat_i(C) Mat_i(C)^T - ||C||^2 / r_i I ||_F

    R is zero when in every factorised mode the r_i singular values of Mat_i(C), which are those of
    Mat_i(W), are equal. A small R bounds the condition number of the weight. R does not depend on
    the bases. The penalty works against truncation, which needs unequal singular values, so add it
    only while ranks are fixed or frozen, as `loss + weight * spectral_penalty(model)`.

    Args:
        model: A model with Tucker layers.

    Returns:
        A differentiable scalar in units of W^2.

    Raises:
        NothingMatchedError: The model has no Tucker layer.

    Source: arXiv:2505.08022, for matrices.
    """
    layers = tucker_layers(model).values()
    terms = [_spread(layer.core, mode) for layer in layers for mode in layer.learned_modes]
    return torch.stack(terms).sum()


def _spread(core: Tensor, mode: int) -> Tensor:
    """Frobenius distance of the Gram matrix from the multiple of I that has the same trace."""
    rows = unfold(core, mode)
    gram = rows @ rows.mT
    level = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    spread: Tensor = torch.linalg.matrix_norm(gram - level * eye)
    return spread
