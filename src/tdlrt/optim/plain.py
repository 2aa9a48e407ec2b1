"""The plain parameters, which torch's own optimiser moves with the options of `TDLRT`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PlainParameters"]


class PlainParameters:
    """The parameters of a model that are not in Tucker format, with their optimiser.

    Args:
        optimizer: A torch optimiser of all parameters of the model. It checks the options and has
            their defaults; its param_groups are set in every step.
        tucker: Ids of the cores and bases.
        capturable: Whether a step must not read anything on the host.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, tucker: Collection[int], *, capturable: bool
    ) -> None:
        self._optimizer, self._tucker, self._capturable = optimizer, tucker, capturable

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the optimiser, torch's defaults included."""
        return self._optimizer.defaults

    @property
    def optimizer_name(self) -> str:
        """Name of the optimiser's class."""
        return type(self._optimizer).__name__

    def among(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The given parameters without cores and bases."""
        return [parameter for parameter in parameters if id(parameter) not in self._tucker]

    def share_state(self, state: MutableMapping[Any, Any]) -> None:
        """Store the optimiser's state in a mapping that `TDLRT` has, too."""
        self._optimizer.state = state  # type: ignore[assignment]

    def copied(self, tucker: Collection[int], memo: dict[int, Any]) -> PlainParameters:
        """A copy for a copied model, of whose cores and bases the ids are given."""
        optimizer = copy.deepcopy(self._optimizer, memo)
        return PlainParameters(optimizer, tucker, capturable=self._capturable)

    def move(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take one step.

        Args:
            groups: The param_groups of `TDLRT`.
        """
        own = [{**group, "params": self.among(group["params"])} for group in groups]
        self._optimizer.param_groups = own
        for group in own:
            if isinstance(group["lr"], Tensor):
                if self._capturable and group["lr"].device.type != "cpu" and "fused" in group:
                    group["fused"] = True  # otherwise SGD reads lr on the host
            elif group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # the same arithmetic in fewer operations
        self._optimizer.step()

    def move_if(self, accepted: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Take one step that changes nothing unless it is accepted, without reading on the host.

        Args:
            accepted: Whether the step counts, a boolean on the device.
            groups: The param_groups of `TDLRT`.
        """
        everything = [parameter for group in groups for parameter in group["params"]]
        moved = [p for p in self.among(everything) if p.grad is not None]

        def state() -> list[Tensor]:
            own = [value for p in moved for value in self._optimizer.state.get(p, {}).values()]
            return [value for value in own if isinstance(value, Tensor)]

        # torch writes in place, so copies are kept. State that this step creates is set to zero if
        # the step is not accepted, which is equivalent to no state.
        before = {id(t): t.clone() for t in (*moved, *state())}
        self.move(groups)
        for tensor in (*moved, *state()):
            old = before.get(id(tensor), torch.zeros_like(tensor))
            tensor.copy_(torch.where(accepted.to(tensor.device), tensor, old))
