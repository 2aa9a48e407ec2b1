"""The initial core and bases of a Tucker layer, from a dense weight."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdlrt.errors import NonFiniteError, RankError
from tdlrt.linalg import (
    TuckerTensor,
    polish_basis,
    truncate,
    truncate_weighted,
)
from tdlrt.nn.reshape import Reshape, tensor_shape
from tdlrt.ranks import (
    RankSpec,
    RelativeTolerance,
    explicit_ranks,
    initial_cutoff,
    starting_ranks,
)
from tdlrt.scalars import as_number

__all__ = [
    "Modes",
    "Start",
    "auto_scale",
    "initial_tensor",
    "learned_modes",
    "parameter_obstacle",
    "weight_obstacle",
    "weighted_start",
]

Modes: TypeAlias = Literal["all", "channels"]
Start: TypeAlias = RankSpec | TuckerTensor

_LARGEST_SCALE = 1.5

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_obstacle(layer: nn.Module) -> str | None:
    """Why the weight of a dense layer cannot be put in Tucker format, or None."""
    return parameter_obstacle(layer._parameters.get("weight"))


def parameter_obstacle(weight: nn.Parameter | None) -> str | None:
    """Why a parameter, or None for one that is missing, cannot be put in Tucker format, or None."""
    if weight is None:
        return "weight computed from other parameters"
    if is_lazy(weight):
        return "has no shape yet; run a batch first"
    if type(weight) is not nn.Parameter:  # quantised, sharded: arithmetic of its own
        return f"weight is a special tensor ({type(weight).__name__})"
    if weight.dtype not in _TYPES:
        return f"weight of type {str(weight.dtype).removeprefix('torch.')}"
    return None


def learned_modes(modes: Modes, order: int) -> tuple[int, ...]:
    """The modes that get a basis: all of them, or the first two (output and input channels).

    Raises:
        RankError: modes is neither 'all' nor 'channels'.
    """
    if modes not in ("all", "channels"):
        raise RankError(f"modes: got {modes!r}, expected 'all' or 'channels'")
    return tuple(range(order if modes == "all" else 2))


@torch.no_grad()
def auto_scale(
    weight: Tensor, rank: RankSpec, modes: Modes = "all", reshape: Reshape | None = None
) -> float | None:
    """Norm of a start relative to that of a weight W, from 1 to 1.5: rho^(-1/2), within He's norm.

    rho is the part of a random gradient G that a step at ranks r_i can follow, the dimension of the
    tangent space over that of the weight:

        rho = E ||P(G)||^2 / ||G||^2 = (prod r_i + sum (n_i - r_i) r_i) / prod n_i.

    One step lowers the loss by about lr ||P(G)||^2, and scaling a layer by s scales the gradients
    of its neighbours by s. So s = rho^(-1/2) makes up for the part that is lost; without it, deep
    networks that have no normalisation start slower than dense (docs/algorithm.md). Beyond
    ||W||^2 = 2 n_1, at which a layer followed by ReLU keeps the size of its signal, such networks
    would amplify it, so a start is not scaled beyond that norm.

    Args:
        weight: W, of shape n_1 x ... x n_d.
        rank: The initial rank, see `factorize_`.
        modes: See `factorize_`.
        reshape: Modes of the rows and columns of a matrix, see `TuckerLinear`.

    Returns:
        The norm; None, for the norm of the truncated weight, if the rank asks to keep the network:
        'full' or a tolerance.

    Raises:
        RankError: The rank is not positive, or larger than its mode.

    Source: He et al., arXiv:1502.01852, for the norm of a layer that keeps its signal.
    """
    if isinstance(rank, RelativeTolerance | str):  # explicit_ranks refuses other words
        return None
    shape = tensor_shape(weight.shape, reshape)
    learned = learned_modes(modes, len(shape))
    channels = 2 if reshape is None else len(shape)
    ranks = starting_ranks(explicit_ranks(rank, shape, channels), shape, learned)
    directions = math.prod(ranks) + sum((shape[m] - ranks[m]) * ranks[m] for m in learned)
    scale = min(_LARGEST_SCALE, math.sqrt(weight.numel() / directions))
    if weight.is_meta:
        return scale
    norm = float(torch.linalg.vector_norm(weight.double()))
    return max(1.0, min(scale, math.sqrt(2 * len(weight)) / norm)) if norm > 0 else scale


@torch.no_grad()
def initial_tensor(
    weight: Tensor, rank: Start, learned: Collection[int], init_scale: float | None
) -> TuckerTensor:
    """Core and bases for a weight W: its truncated HOSVD, or a given Tucker tensor.

    The core is scaled so that ||C|| = init_scale ||W||. The basis of a mode that is not learned is
    the identity. On the meta device, where nothing has values, only the ranks count.

    Args:
        weight: W, of shape n_1 x ... x n_d.
        rank: The ranks, or a `TuckerTensor`, whose core and bases are copied unchanged.
        learned: Modes that are factorised.
        init_scale: Norm of the result relative to that of W; None keeps the norm of the truncated
            weight.

    Returns:
        C and U_i with the type and on the device of W.

    Raises:
        RankError: The rank is not positive, or larger than its mode, or a tolerance for a weight
            on the meta device, or init_scale is not a positive number, or takes the weight beyond
            the range of its type.
        NonFiniteError: The weight is not finite.
    """
    if isinstance(rank, TuckerTensor):
        return _copied_like(weight, *rank)
    scale = as_number(init_scale)
    if init_scale is not None and (scale is None or not 0 < scale < sys.float_info.max):
        raise RankError(f"init_scale: got {init_scale!r}, expected a positive number or None")
    if weight.is_meta:
        return _without_values(weight, rank, learned)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(
            "weight: got NaN or infinite values, expected finite ones; the layer cannot be "
            "factorised"
        )
    # torch has no QR and no eigenvalues of half-precision types on a CPU.
    tensor = weight if weight.dtype == torch.float64 else weight.float()
    norm = torch.linalg.vector_norm(tensor)
    core, projections = truncate(tensor, initial_cutoff(rank, weight.shape), learned)
    if scale is not None:
        kept = torch.linalg.vector_norm(core)
        core = core * torch.where(kept > 0, scale * norm / kept, 1.0)
        if not torch.isfinite(core.to(weight.dtype)).all():
            raise RankError(
                f"init_scale: got {init_scale!r}, which makes the weight overflow {weight.dtype}; "
                "lower it"
            )
    factors = tuple(
        torch.eye(size, dtype=tensor.dtype, device=tensor.device)
        if projection is None
        else polish_basis(projection)
        for size, projection in zip(weight.shape, projections, strict=True)
    )
    return _copied_like(weight, core, factors)


def _without_values(weight: Tensor, rank: RankSpec, learned: Collection[int]) -> TuckerTensor:
    """Core and bases on the meta device, with the ranks that a generic weight would get."""
    cutoff = initial_cutoff(rank, weight.shape)
    if cutoff.tau > 0:
        raise RankError(
            f"rank: got {rank!r} for a weight on the meta device, which has no values to measure; "
            "expected a fraction, an int, a tuple or 'full', or move the model to a device first"
        )
    ranks = starting_ranks(cutoff.limits, weight.shape, learned)
    factors = [weight.new_empty(size, rank) for size, rank in zip(weight.shape, ranks, strict=True)]
    return TuckerTensor(weight.new_empty(ranks), tuple(factors))


@torch.no_grad()
def weighted_start(
    weight: Tensor, rank: RankSpec, modes: Modes, covariance: Tensor
) -> TuckerTensor:
    """Core and bases whose outputs are close to those of W for inputs with a given covariance.

    Args:
        weight: W; the inputs belong to its second mode.
        rank: The rank, see `factorize_`. A tolerance bounds the error of the outputs.
        modes: See `factorize_`.
        covariance: Second moments of the inputs, of shape n_2 x n_2.

    Raises:
        RankError: The rank is not positive, or larger than its mode, or the covariance does not
            fit.
        NonFiniteError: The weight or the covariance is not finite.
    """
    expected = (weight.shape[1],) * 2
    if tuple(covariance.shape) != expected:
        raise RankError(
            f"covariances: got one of shape {tuple(covariance.shape)} for a layer with "
            f"{expected[0]} inputs, expected shape {expected}"
        )
    for name, tensor in (("weight", weight), ("covariances", covariance)):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name}: got NaN or infinite values, expected finite ones")
    cutoff = initial_cutoff(rank, weight.shape)
    learned = learned_modes(modes, weight.ndim)
    return truncate_weighted(weight, covariance.to(weight.device), 1, cutoff, learned)


def _copied_like(weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> TuckerTensor:
    """Copies of a core and factors, with the type and device of a weight."""
    parts = [part.to(weight, copy=True).contiguous() for part in (core, *factors)]
    return TuckerTensor(parts[0], tuple(parts[1:]))
