"""Who computes the steps of which layers: one process all of them, or several a share each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from tdlrt.optim.slot import LayerSlot, OptimizerState

__all__ = ["Team"]


class Team:
    """A process that does everything itself; `tdlrt.integrations.sharding` has the other kind."""

    def share(self, names: Collection[str]) -> Collection[str]:
        """Those of these layers whose steps this process computes."""
        return names

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Raise NonFiniteError on all processes if it is raised inside on one of them."""
        yield

    def exchange(
        self,
        slots: Sequence[LayerSlot],
        state: OptimizerState,
        curvatures: MutableMapping[str, Tensor],
    ) -> None:
        """Give every process the layers that the others have changed, and their state.

        Args:
            slots: The layers of the step.
            state: The optimiser's state, changed in place.
            curvatures: Mean squares of the gradients by layer, changed in place.
        """
