"""What is not in Tucker format: moved by the user's own optimiser, on the groups of `TDLRT`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PlainParameters"]


class PlainParameters:
    """The parameters of a model that are not in Tucker format, with their optimiser.

    Args:
        optimizer: A torch optimiser of all parameters of the model; its groups are set in every
            step, it checks the options and knows the defaults.
        tucker: Cores and bases, by id.
        capturable: Whether a step may read nothing on the host.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, tucker: Collection[int], *, capturable: bool
    ) -> None:
        self._optimizer, self._tucker, self._capturable = optimizer, tucker, capturable

    @property
    def defaults(self) -> dict[str, Any]:
        """Options of the optimiser, with torch's defaults."""
        return self._optimizer.defaults

    @property
    def optimizer_name(self) -> str:
        """Name of the optimiser's class."""
        return type(self._optimizer).__name__

    def among(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those of the parameters that are not in Tucker format."""
        return [parameter for parameter in parameters if id(parameter) not in self._tucker]

    def share_state(self, state: MutableMapping[Any, Any]) -> None:
        """Keep the state in this mapping."""
        self._optimizer.state = state  # type: ignore[assignment]

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
                    group["fused"] = True  # else SGD reads a tensor on the host
            elif group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # the same arithmetic in fewer operations
        self._optimizer.step()

    def move_if(self, accepted: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Take one step that changes nothing where it was not accepted, read nowhere.

        Args:
            accepted: A boolean on the device.
            groups: The param_groups of `TDLRT`.
        """
        everything = [parameter for group in groups for parameter in group["params"]]
        moved = [p for p in self.among(everything) if p.grad is not None]

        def state() -> list[Tensor]:
            own = [value for p in moved for value in self._optimizer.state.get(p, {}).values()]
            return [value for value in own if isinstance(value, Tensor)]

        # torch writes in place; state that the step makes is as good as none where it is zero.
        before = {id(t): t.clone() for t in (*moved, *state())}
        self.move(groups)
        for tensor in (*moved, *state()):
            old = before.get(id(tensor), torch.zeros_like(tensor))
            tensor.copy_(torch.where(accepted.to(tensor.device), tensor, old))
