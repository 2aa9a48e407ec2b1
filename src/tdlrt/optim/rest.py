"""Plain parameters that optimisers of the user's own move (`rest=` of `TDLRT`)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError, UnsupportedOptimizerError
from tdlrt.optim.composed import copies_by_id
from tdlrt.optim.plain import Before, PlainParameters
from tdlrt.optim.rules import Rule

__all__ = ["Rest", "RestParameters", "rest_of"]

Rest: TypeAlias = Callable[
    [list[Tensor]], "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]"
]
"""A function from the plain parameters to their optimiser, or to several that share them out."""


def rest_of(
    rest: Rest, parameters: Sequence[Tensor], names: Mapping[Tensor, str]
) -> list[torch.optim.Optimizer]:
    """The optimisers that a function makes of the plain parameters.

    Raises:
        UnsupportedOptimizerError: rest is no function, or returns something else, or an optimiser
            that cannot take a step without a closure.
        ValueError: A parameter is in none of the optimisers, or in two, or is none of the given.
    """
    if not callable(rest):
        raise UnsupportedOptimizerError(
            f"rest: got {rest!r}, expected a function of a list of parameters, such as "
            "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
        )
    made = rest(list(parameters)) if parameters else []
    optimizers: list[Any] = list(made) if isinstance(made, list | tuple) else [made]
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UnsupportedOptimizerError(
                f"rest: got a function that returns {optimizer!r}, expected one that returns a "
                "torch.optim.Optimizer or a list of them"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UnsupportedOptimizerError(
                f"rest: got {type(optimizer).__name__}, whose step asks for a closure; expected an "
                "optimiser that takes a step from the gradients there are"
            )
    taken = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    numbers = list(map(id, taken))
    wrong = {
        "in none of its optimisers": [p for p in parameters if id(p) not in set(numbers)],
        "twice": [p for n, p in enumerate(taken) if id(p) in numbers[:n]],
        "not given to it": [p for p in taken if id(p) not in set(map(id, parameters))],
    }
    for what, found in wrong.items():
        if found:
            name = names.get(found[0], f"one of shape {tuple(found[0].shape)}")
            raise ValueError(
                f"rest: got a function with a parameter {what} ({name}), expected optimisers that "
                "hold each of the given parameters once"
            )
    return optimizers


class RestParameters(PlainParameters):
    """The parameters that are not in Tucker format, with optimisers of the user's own.

    Args:
        optimizer: An optimiser of the class that the Tucker layers follow; it has the options.
        tucker: Ids of the cores and bases.
        optimizers: What `rest_of` returns.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tucker: Collection[int],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        super().__init__(optimizer, tucker, capturable=False)
        self._optimizers = list(optimizers)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """See `PlainParameters.groups`."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """See `PlainParameters.state`."""
        return _States(self._optimizers)

    def copied(self, tucker: Collection[int], memo: dict[int, Any]) -> RestParameters:
        """See `PlainParameters.copied`."""
        optimizers = [_copied(optimizer, memo) for optimizer in self._optimizers]
        return RestParameters(copy.deepcopy(self._optimizer, memo), tucker, optimizers)

    def move(self, groups: Sequence[dict[str, Any]]) -> None:
        """See `PlainParameters.move`."""
        for optimizer in self._optimizers:
            optimizer.step()

    def largest_norm(
        self, groups: Sequence[dict[str, Any]], rule_of: Callable[[int], Rule]
    ) -> float:
        """Zero, as nothing is known of these optimisers."""
        return 0.0

    @contextmanager
    def moved(self, groups: Sequence[dict[str, Any]]) -> Iterator[Before]:
        """See `PlainParameters.moved`. Options in the groups of the optimisers come back, too."""
        options = [copy.deepcopy(_options(group)) for group in self.groups]
        before = Before([p for group in self.groups for p in group["params"]], self.state)
        try:
            self.move(groups)
            yield before
        except BaseException:
            before.restore()
            for group, old in zip(self.groups, options, strict=True):
                parameters = group["params"]
                group.clear()
                group.update(old, params=parameters)
            raise

    def state_dict(self) -> dict[str, Any]:
        """See `PlainParameters.state_dict`."""
        return {"rest": [optimizer.state_dict() for optimizer in self._optimizers]}

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """See `PlainParameters.check_state`. Copies of the optimisers load the state."""
        self._load(stored, [self._without_copies(of) for of in self._optimizers])

    def _without_copies(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """A copy with a state of its own, and the same parameters."""
        shared: dict[int, Any] = {
            id(p): p for group in optimizer.param_groups for p in group["params"]
        }
        return _copied(optimizer, shared)

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """See `PlainParameters.load_state_dict`."""
        self._load(stored, self._optimizers)

    def _load(self, stored: Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        states = stored.get("rest")
        if not isinstance(states, list) or len(states) != len(optimizers):
            got = f"{len(states)} states" if isinstance(states, list) else repr(states)
            raise IntegratorStateError(
                f"state_dict['tdlrt']: got rest={got}, expected {len(optimizers)} of the "
                "optimisers that rest= makes; construct TDLRT with the same rest"
            )
        for state, optimizer in zip(states, optimizers, strict=True):
            name = type(optimizer).__name__
            try:
                copies = copies_by_id(state["state"].values())
                optimizer.load_state_dict(copy.deepcopy(state, copies))
            except Exception as error:  # whatever the optimiser raises where a state is damaged
                raise IntegratorStateError(
                    f"state_dict['tdlrt']: got a state in rest that {name} cannot load "
                    f"({type(error).__name__}: {error}); construct TDLRT with the same rest, or "
                    "load another state"
                ) from error


class _States(MutableMapping[Any, Any]):
    """The state of several optimisers by parameter."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._owners = {
            p: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def __getitem__(self, parameter: Tensor) -> Any:
        state = self._owners[parameter].state
        if parameter not in state:
            raise KeyError(parameter)
        return state[parameter]

    def __setitem__(self, parameter: Tensor, entries: Any) -> None:
        self._owners[parameter].state[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owners[parameter].state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p, optimizer in self._owners.items() if p in optimizer.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """copy.deepcopy, and the attributes that torch leaves out: all but groups and state."""
    memo.update(copies_by_id(optimizer.state.values()))
    copied = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name != "step" and name not in vars(copied):  # a scheduler wraps the step of an instance
            vars(copied)[name] = copy.deepcopy(value, memo)
    return copied


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
