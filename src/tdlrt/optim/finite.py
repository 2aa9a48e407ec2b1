"""Checks that all a step puts in place is finite, with one transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import NonFiniteError
from tdlrt.optim.composed import parts
from tdlrt.optim.shards import is_finite, is_sharded, norms
from tdlrt.optim.slot import OptimizerState
from tdlrt.optim.steps import Augmented, Iterate, Lifted

__all__ = [
    "Finite",
    "Given",
    "PlainAtRiskError",
    "WrittenElsewhereError",
    "sizes",
    "sizes_after",
]


def sizes_after(step: Iterate | Augmented | Lifted, stored: torch.dtype) -> Tensor:
    """`sizes` of all that a step puts in place.

    Below 1 they stay finite in a change of bases, too: projections make no norm larger, and second
    moments stay in their range.

    Args:
        step: Weights and state.
        stored: The type of the parameters that the weights are written to.

    Returns:
        One number for each tensor, in float64.
    """
    weights, state = step.weights(), step.state()
    if weights[0].dtype == stored:
        return sizes([*weights, *state], stored)
    return torch.cat([sizes(weights, stored), *([sizes(state, state[0].dtype)] if state else [])])


def sizes(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Norms of tensors, in units of half the largest number of a type.

    Below 1 every entry is finite. The other half is for rounding.

    Args:
        tensors: Tensors on one device.
        dtype: The type.

    Returns:
        One number for each tensor, in float64; NaN or infinite if an entry is.
    """
    found = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return torch.stack(list(found)) / (torch.finfo(dtype).max / 2)


class WrittenElsewhereError(Exception):
    """Weights were changed in a way that no version counter shows, such as by `parameter.data`."""


class PlainAtRiskError(Exception):
    """Plain parameters are so large that only their step can tell whether it is finite."""


class Given(NamedTuple):
    """Numbers on the device that describe the inputs of a step.

    Attributes:
        norms: Norms of the plain parameters that have a gradient, of their gradients and state.
        changes: Norms of the differences between the Tucker weights and the last step's results.
    """

    norms: Tensor
    changes: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> Given:
        """For a truncation that is no step: it uses no gradients, and weights of its own."""
        return cls(torch.zeros(0, device=device), torch.zeros(0, device=device))


class Finite:
    """Refuses steps with gradients, weights or results that are not finite.

    Args:
        names: Names of all parameters of the model.
        plain: The plain parameters among them.
        state: The optimiser's state.

    Attributes:
        largest_norm: Bound for plain parameters, their gradients and state within which they are
            finite after their step, too. Infinite if they have moved already.
    """

    def __init__(
        self, names: Mapping[Tensor, str], plain: Iterable[Tensor], state: OptimizerState
    ) -> None:
        self._names, self._plain, self._state = names, set(plain), state
        self.largest_norm = math.inf

    def given(self, device: torch.device, changes: Tensor | None = None) -> Given:
        """Describe the inputs of a step by numbers that are read together with its results.

        Args:
            device: Device of the numbers.
            changes: See `Given`; none by default.
        """
        none = torch.zeros(0, device=device)
        return Given(self._plain_norms(device), none if changes is None else changes)

    def _plain_norms(self, device: torch.device) -> Tensor:
        """Norms that are not finite if a plain parameter, its gradient or its state is not."""
        moved = [p for p in self._names if p in self._plain and p.grad is not None]
        tensors = [tensor for p in moved for _, tensor in self._tensors_of(p)]
        return norms(tensors, device)

    def check(
        self, given: Given, results: Iterable[Tensor], extra: Iterable[Tensor] = ()
    ) -> list[list[float]]:
        """Read the norms, together with other numbers, in one transfer to the host.

        Args:
            given: `given()`.
            results: See `sizes_after`.
            extra: Further tensors to read.

        Returns:
            The numbers of each further tensor, in a flat list.

        Raises:
            NonFiniteError: A gradient or a weight is not finite, or a result would not be.
            PlainAtRiskError: A plain parameter has too large a norm for its step.
            WrittenElsewhereError: The weights differ from those that the step started from.
        """
        device = given.norms.device
        found = torch.stack([(given.changes == 0).all(), *self._found(given, results)])
        parts = [part.to(device, torch.float64).flatten() for part in extra]
        same, good, right, *rest = torch.cat([found.double(), *parts]).tolist()
        if not same:
            raise WrittenElsewhereError
        if not (good and right):
            self._check_entries()
        if not right:
            raise NonFiniteError(
                "weight: the step would make it NaN or infinite, or the optimiser's state, "
                "expected finite values; nothing was changed. Lower lr"
            )
        if not good and self.largest_norm < math.inf:
            raise PlainAtRiskError
        numbers, begin = [], 0
        for part in parts:
            numbers.append(rest[begin : begin + len(part)])
            begin += len(part)
        return numbers

    def accepted(self, given: Given, results: Iterable[Tensor]) -> Tensor:
        """Whether everything is finite, as a boolean on the device: nothing is read on the host."""
        good, right = self._found(given, results)
        return good & right

    def _found(self, given: Given, results: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Whether inputs are within bounds, and whether results are finite; false for NaN."""
        found = torch.cat([*(of.to(given.norms.device) for of in results), given.norms[:0]])
        return (given.norms < self.largest_norm).all(), (found < 1).all()

    def _check_entries(self) -> None:
        """Check every entry, because a norm can overflow although all entries are finite."""
        has_moved = self.largest_norm == math.inf
        for parameter, name in self._names.items():
            if parameter.grad is None:
                continue
            for what, tensor in self._tensors_of(parameter):
                if not is_finite(tensor):
                    after = what != "gradient" and parameter in self._plain and has_moved
                    raise NonFiniteError(
                        f"{name}: its {what} has NaN or infinite entries"
                        f"{', or would have after the step' if after else ''}, expected finite "
                        "ones; nothing was changed. Lower lr, or check the loss"
                    )

    def _tensors_of(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What must be finite: the gradient and the value, and the state of a plain parameter."""
        if parameter.grad is not None:
            yield "gradient", _values(parameter.grad)
        yield "value", parameter.detach()
        if parameter in self._plain:
            for name, value in self._state.get(parameter, {}).items():
                if is_sharded(value):
                    continue
                for part in parts(value):
                    # Not the count of steps, which torch keeps on the host, nor numbers of 8 bits.
                    if part.is_floating_point() and part.element_size() > 1:
                        if part.ndim or part.shape == parameter.shape:
                            yield name, part


def _values(tensor: Tensor) -> Tensor:
    """The stored entries of a sparse tensor, or the tensor itself."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
