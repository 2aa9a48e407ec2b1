"""Which layers form a batch: as few batches as padding with zeros is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from tdlrt.optim.slot import LayerSlot

__all__ = ["partition", "work"]

# What one more batch costs on a CPU, in multiply-adds: some 200 small operations.
_BATCH_COST = 4e7

# Entries of padded stacks above which a batch on a GPU is not made larger.
_MOST_ENTRIES = 1 << 26

_Sizes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and ranks of a layer."""


def partition(
    slots: Sequence[LayerSlot], ranks_of: Callable[[LayerSlot], Sequence[int]]
) -> Iterator[list[LayerSlot]]:
    """Layers that may form one batch, in batches.

    On a GPU one, unless it gets too large. On a CPU layers of similar size: what padding adds to
    the arithmetic must not exceed what one batch less saves.
    """
    on_cpu = slots[0].layer.core.device.type == "cpu"
    sizes = {slot.name: (slot.layer.shape, tuple(ranks_of(slot))) for slot in slots}
    batch: list[LayerSlot] = []
    own: list[_Sizes] = []
    for slot in sorted(slots, key=lambda slot: (work([sizes[slot.name]]), sizes[slot.name])):
        size = sizes[slot.name]
        together = [*own, size]
        if on_cpu:
            good = work(together) <= work(own) + work([size]) + _BATCH_COST
        else:
            good = _entries(together) <= _MOST_ENTRIES
        if batch and not good:
            yield batch
            batch, own = [], []
        batch.append(slot)
        own.append(size)
    yield batch


def _room(members: Sequence[_Sizes]) -> tuple[list[int], list[int]]:
    """Rows and columns of the bases in a stack of these layers."""
    shapes, ranks = zip(*members, strict=True)
    return [max(of) for of in zip(*shapes, strict=True)], [
        max(of) for of in zip(*ranks, strict=True)
    ]


def work(members: Sequence[_Sizes]) -> float:
    """Multiply-adds of a step, roughly: some ten products of each basis and of the core."""
    if not members:
        return 0.0
    rows, columns = _room(members)
    core = math.prod(columns)
    moving = [
        (n, r)
        for i, (n, r) in enumerate(zip(rows, columns, strict=True))
        if any(shape[i] > ranks[i] for shape, ranks in members)
    ]
    return 10.0 * len(members) * sum(n * r**2 + core * r for n, r in moving)


def _entries(members: Sequence[_Sizes]) -> int:
    rows, columns = _room(members)
    bases = sum(n * r for n, r in zip(rows, columns, strict=True))
    return len(members) * (math.prod(columns) + bases)
