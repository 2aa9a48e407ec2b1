"""The layers of a batch that take part in a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from tdlrt.linalg import Factorization, Layout, TangentSpace, TangentVector
from tdlrt.optim.batch import Batch
from tdlrt.optim.finite import sizes_after
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.steps import Augmented, Iterate, Lifted

__all__ = ["Members", "members_of"]


@dataclass(frozen=True)
class Members:
    """Layers of one batch that take part in a step.

    Attributes:
        batch: The batch.
        places: Their places in it.
        index: The same as a tensor; None for all of them.
    """

    batch: Batch
    places: tuple[int, ...]
    index: Tensor | None

    @property
    def slots(self) -> list[LayerSlot]:
        """The layers."""
        return [self.batch.slots[place] for place in self.places]

    @property
    def layout(self) -> Layout:
        """Their true sizes."""
        layout = self.batch.layout
        return layout if self.index is None else layout.take(self.places)

    def iterate(self) -> Iterate:
        """Their weights and state at rest."""
        whole = self.batch.iterate()
        if self.index is None:
            return whole
        space, layout = whole.space, self.layout
        factors = [f if f is None else f[self.index] for f in space.factors]
        factorizations = {
            mode: Factorization(*(tensor[self.index] for tensor in of))
            for mode, of in space.factorizations.items()
        }
        taken = TangentSpace(space.core[self.index], factors, layout, factorizations)
        moments = {name: self._taken(moment) for name, moment in whole.moments.items()}
        return Iterate(taken, moments, whole.steps[self.index])

    def lifted(self) -> Lifted:
        """Their weights and the core's state, for a step on the core alone."""
        core, factors, ranks, moments, steps = self.batch.lifted()
        if self.index is None:
            return Lifted(core, factors, ranks, moments, steps)
        taken = {name: moment[self.index] for name, moment in moments.items()}
        factors = [f if f is None else f[self.index] for f in factors]
        return Lifted(core[self.index], factors, ranks[self.index], taken, steps[self.index])

    def core_gradient(self) -> Tensor:
        """grad_C L, as autograd left it."""
        core = self.batch.gradients(self.places, core_alone=True).core
        return core if self.index is None else core[self.index]

    def gradients(self) -> TangentVector:
        """grad_C L and grad_{U_i} L, as autograd left them."""
        gradients = self.batch.gradients(self.places)
        return gradients if self.index is None else self._taken(gradients)

    def _taken(self, vector: TangentVector) -> TangentVector:
        parts = {mode: part[self.index] for mode, part in vector.parts.items()}
        return TangentVector(vector.core[self.index], parts)

    def sizes_after(self, step: Iterate | Augmented | Lifted) -> Tensor:
        """See `tdlrt.optim.finite.sizes_after`."""
        return sizes_after(step, self.slots[0].layer.core.dtype)

    def curvature(self, *, observed: bool) -> Tensor:
        """See `Batch.curvature`."""
        curvature = self.batch.curvature(observed=observed)
        return curvature if self.index is None else curvature[self.index]

    def set_curvature(self, curvature: Tensor) -> None:
        """See `Curvatures.store`."""
        self.batch.curvatures.store(curvature, self.places, self.index)


def members_of(batch: Batch, names: Collection[str]) -> Members | None:
    """Those of these layers that are in the batch; None where none is."""
    places = tuple(place for place, slot in enumerate(batch.slots) if slot.name in names)
    return Members(batch, places, batch.index_of(places)) if places else None
