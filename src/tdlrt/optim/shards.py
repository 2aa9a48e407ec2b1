"""Parameters of which each process holds a part: torch's DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing DTensor takes long, and most models have none
    from torch.distributed.tensor import DTensor

__all__ = ["is_finite", "is_sharded", "norms", "own_part"]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of the tensor only."""
    return type(tensor).__name__ == "DTensor"


def own_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; the tensor itself if it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. If the tensor is sharded, all processes must ask."""
    finite = torch.isfinite(tensor).all()
    return bool(finite.full_tensor() if is_sharded(finite) else finite)


@torch.no_grad()
def norms(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Euclidean norms of whole tensors, ||T||^2 = sum_p ||T_p||^2 over the parts of a sharded one.

    The parts of all sharded tensors are added in one message, so every process gets the same
    numbers. All processes must call it.

    Args:
        tensors: Tensors of any type, whole or sharded.
        device: Where the norms are to be.
        dtype: Type in which the squares of one tensor are added; by default its own.

    Returns:
        The norms in float64, in an order that depends on the types alone.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        spread = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None
        alike.setdefault((spread, tensor.dtype, tensor.device), []).append(tensor)
    found = [torch.zeros(0, dtype=torch.float64, device=device)]
    for of in alike.values():
        own = torch.stack(torch._foreach_norm([own_part(t) for t in of], 2, dtype=dtype)).double()
        found.append(_over_processes(own, of[0]).to(device))
    return torch.cat(found)


def _over_processes(own: Tensor, like: Tensor) -> Tensor:
    """Norms of tensors that are sharded alike from those of the parts of this process."""
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor, Partial

    placements = [Partial() if place.is_shard() else place for place in like.placements]
    squares = DTensor.from_local(own.square(), like.device_mesh, placements, run_check=False)
    return squares.full_tensor().sqrt()
