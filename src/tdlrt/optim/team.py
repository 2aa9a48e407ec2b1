"""The assignment of layers to processes: a *team* computes the steps of all layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from tdlrt.optim.slot import LayerSlot, OptimizerState

__all__ = ["Team"]


class Team:
    """A single process that computes all steps; `ShardedTeam` shares them between processes."""

    def share(self, names: Collection[str]) -> Collection[str]:
        """The names of those layers whose steps this process computes."""
        return names

    def owners(self) -> Mapping[str, int]:
        """Number of the process that computes the steps of each layer; empty if all are of one."""
        return {}

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
        """Send every process the weights and state of the layers that other processes computed.

        Args:
            slots: The layers of the step.
            state: The optimiser's state, changed in place.
            curvatures: Mean squares of the gradients by layer, changed in place.
        """
