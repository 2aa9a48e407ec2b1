"""Running mean squares of the gradients of the cores of a batch, by which a policy may weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor

from tdlrt.linalg import Layout
from tdlrt.optim.packing import scalars
from tdlrt.optim.slot import LayerSlot

__all__ = ["Curvatures"]

# Share of the past in the running mean.
_DECAY = 0.9


class Curvatures:
    """The curvatures of the layers of a batch, one tensor; those of all layers hold its entries.

    Args:
        slots: The layers.
        layout: Their true sizes.
        by_name: The curvatures of all layers, changed in place.
    """

    def __init__(
        self, slots: Sequence[LayerSlot], layout: Layout, by_name: MutableMapping[str, Tensor]
    ) -> None:
        self._slots, self._layout, self._by_name = slots, layout, by_name
        self.past = scalars([None] * len(slots), torch.float64, math.nan, layout.device)
        self.read()

    def read(self) -> None:
        """Read those that were written from outside, as by `load_state_dict`."""
        known = [self._by_name.get(slot.name) for slot in self._slots]
        if any(value is not None and value._base is not self.past for value in known):
            self.past = scalars(known, torch.float64, math.nan, self._layout.device)
            self._publish(n for n, value in enumerate(known) if value is not None)

    def _publish(self, places: Iterable[int]) -> None:
        for place in places:
            self._by_name[self._slots[place].name] = self.past[place]

    def after(self, gradients: Tensor) -> Tensor:
        """Running mean squares of the entries of grad_C L with these gradients, B numbers."""
        norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64)
        squares = norms.square() / self._layout.entries()
        return torch.lerp(squares, torch.where(self.past.isnan(), squares, self.past), _DECAY)

    def store(self, values: Tensor, places: Iterable[int], index: Tensor | None) -> None:
        """Keep the curvatures of some members."""
        if index is None:
            self.past.copy_(values)
        else:
            self.past.index_copy_(0, index, values)
        self._publish(p for p in places if self._slots[p].name not in self._by_name)
