"""The plain parameters, which torch's own optimiser moves with the options of `TDLRT`."""

from __future__ import annotations

import copy
import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.optim.composed import parts
from tdlrt.optim.rules import Rule
from tdlrt.optim.shards import own_part

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
        # torch's classes look at the state of what is in their groups, and what cores and bases
        # have in the state that `share_state` shares is not torch's.
        optimizer.param_groups = self._own(optimizer.param_groups)

    def _own(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**group, "params": self.among(group["params"])} for group in groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the optimiser, torch's defaults included."""
        return self._optimizer.defaults

    @property
    def optimizer_name(self) -> str:
        """Name of the optimiser's class."""
        return type(self._optimizer).__name__

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Param_groups of other optimisers than that of `TDLRT`: none here."""
        return []

    def others(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The given groups without these."""
        own = set(map(id, self.groups))
        return [group for group in groups if id(group) not in own]

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """The optimiser's state, by parameter."""
        return self._optimizer.state

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

    def state_dict(self) -> dict[str, Any]:
        """The state that is not in that of `TDLRT`: none here."""
        return {}

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` could not load.

        Args:
            stored: The entry of `TDLRT` in its state_dict.

        Raises:
            IntegratorStateError: It cannot be loaded.
        """
        if "rest" in stored:
            raise IntegratorStateError(
                "state_dict['tdlrt']: got the state of optimisers that rest= made, expected none; "
                "construct TDLRT with the same rest"
            )

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, see `check_state`."""

    def move(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take one step.

        Args:
            groups: The param_groups of `TDLRT`.
        """
        own = self._optimizer.param_groups = self._own(groups)
        for group in own:
            if isinstance(group["lr"], Tensor):
                if self._capturable and group["lr"].device.type != "cpu" and "fused" in group:
                    group["fused"] = True  # otherwise SGD reads lr on the host
            elif group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # the same arithmetic in fewer operations
        # torch adds Nesterov momentum to the gradients themselves, which are the user's.
        nesterov = [p.grad for group in own if group.get("nesterov") for p in group["params"]]
        gradients = [g for g in nesterov if g is not None and not g.is_sparse]
        copies = _copies(gradients)
        try:
            self._optimizer.step()
        finally:
            _copy_back(gradients, copies)

    def largest_norm(
        self, groups: Sequence[dict[str, Any]], rule_of: Callable[[int], Rule]
    ) -> float:
        """The smallest `Rule.largest_norm` of the parameters that move in the next step.

        Args:
            groups: The param_groups of `TDLRT`.
            rule_of: The rule of a group, by its number.
        """
        bounds = [math.inf]
        for number, group in enumerate(groups):
            moving = [(p, p.grad) for p in self.among(group["params"]) if p.grad is not None]
            rule = rule_of(number)
            for dtype, sparse in {(p.dtype, gradient.is_sparse) for p, gradient in moving}:
                bounds.append(rule.largest_norm(dtype, sparse=sparse))
        return min(bounds)

    @contextmanager
    def moved(self, groups: Sequence[dict[str, Any]]) -> Iterator[Before]:
        """Take one step for the block, and take it back if the block raises an error.

        Args:
            groups: The param_groups of `TDLRT`.
        """
        everything = [parameter for group in groups for parameter in group["params"]]
        moving = [p for p in self.among(everything) if p.grad is not None]
        before = Before(moving, self.state)
        try:
            self.move(groups)
            yield before
        except BaseException:
            before.restore()
            raise


class Before:
    """Copies of parameters and their state, which torch's optimisers change in place.

    Args:
        parameters: The parameters.
        state: The optimiser's state.
    """

    def __init__(self, parameters: Sequence[Tensor], state: MutableMapping[Any, Any]) -> None:
        self._parameters, self._state = parameters, state
        self._entries = {p: _kept(state[p]) for p in parameters if p in state}
        self._tensors = self._present()
        self._copies = _copies(self._tensors)

    def _present(self) -> list[Tensor]:
        own = [value for p in self._parameters for value in self._state.get(p, {}).values()]
        state = [part for value in own for part in parts(value)]
        return [*(own_part(parameter) for parameter in self._parameters), *state]

    def restore(self) -> None:
        """Bring everything back."""
        _copy_back(self._tensors, self._copies)
        for parameter in self._parameters:
            if parameter in self._entries:
                self._state[parameter].clear()
                self._state[parameter].update(self._entries[parameter])
            else:
                self._state.pop(parameter, None)

    def restore_unless(self, accepted: Tensor) -> None:
        """Bring everything back where a boolean on the device is false, without reading it.

        State that the step has created becomes zero then, which is equivalent to no state.
        """
        copies = dict(zip(map(id, self._tensors), self._copies, strict=True))
        for tensor in self._present():
            old = copies.get(id(tensor), torch.zeros_like(tensor))
            tensor.copy_(torch.where(accepted.to(tensor.device), tensor, old))


def _kept(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a parameter; what is no tensor, copied."""
    return {
        name: value if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in entries.items()
    }


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    own = [own_part(tensor) for tensor in tensors]
    copies = [torch.empty_like(part) for part in own]
    _copy_back(copies, own)
    return copies


def _copy_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_([own_part(tensor) for tensor in tensors], list(copies))
