"""Layers of different sizes in zero-padded stacks: making them, the part of each, writing there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdlrt.linalg import Layout

__all__ = ["member_views", "put", "scalars", "zero_stacks"]


def zero_stacks(
    layout: Layout, dtype: torch.dtype, *, core_alone: bool = False
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Stacks of zeros for the cores and the learned bases, and each member's views of them."""
    shapes: list[tuple[int, ...]] = [layout.columns]
    if not core_alone:
        shapes += [(layout.rows[i], layout.columns[i]) for i in layout.modes]
    stacks = [
        torch.zeros(len(layout), *shape, dtype=dtype, device=layout.device) for shape in shapes
    ]
    places = range(len(layout))
    return stacks, [member_views(stacks, layout, place, layout.ranks[place]) for place in places]


def scalars(
    values: Sequence[Tensor | None], dtype: torch.dtype, missing: float, device: torch.device
) -> Tensor:
    """A tensor with one number for each member."""
    blank = torch.full((), missing, dtype=dtype, device=device)
    return torch.stack([blank if value is None else value.to(blank) for value in values])


def member_views(
    stacks: Sequence[Tensor],
    layout: Layout,
    place: int,
    ranks: Sequence[int],
    number: int | None = None,
) -> list[Tensor]:
    """A member's part of stacks of cores and of bases, or of cores alone."""
    core, *bases = (stack[place if number is None else number] for stack in stacks)
    views = [core[tuple(slice(0, rank) for rank in ranks)]]
    for mode, basis in zip(layout.modes, bases, strict=False):
        views.append(basis[: layout.sizes[place][mode], : ranks[mode]])
    return views


def put(stacks: Sequence[Tensor], values: Sequence[Tensor], index: Tensor | None) -> None:
    """Write values into stacks, in the places of an index or in all."""
    if index is None:
        torch._foreach_copy_(list(stacks), list(values))
    else:
        for stack, value in zip(stacks, values, strict=True):
            stack.index_copy_(0, index, value)
