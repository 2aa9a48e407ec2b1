"""Checks that gradients, weights and results are finite, with one transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import NonFiniteError

__all__ = ["Finite", "Given", "WrittenElsewhereError", "core_norms"]


def core_norms(core: Tensor) -> Tensor:
    """||C|| of each member of a stack, B numbers in float64; not finite if an entry is not."""
    norms: Tensor = torch.linalg.vector_norm(core.flatten(1), dim=1, dtype=torch.float64)
    return norms


class WrittenElsewhereError(Exception):
    """Weights were changed in a way that no version counter shows, such as by `parameter.data`."""


class Given(NamedTuple):
    """Numbers on the device that describe the inputs of a step.

    Attributes:
        norms: Norms of the plain parameters that have a gradient, and of their gradients.
        changes: Norms of the differences between the Tucker weights and the last step's results.
    """

    norms: Tensor
    changes: Tensor


class Finite:
    """Refuses steps with gradients, weights or results that are not finite.

    Args:
        names: Names of all parameters of the model.
        plain: The plain parameters among them.
    """

    def __init__(self, names: Mapping[Tensor, str], plain: Iterable[Tensor]) -> None:
        self._names, self._plain = names, list(plain)

    def given(self, device: torch.device, changes: Tensor | None = None) -> Given:
        """Describe the inputs of a step by numbers that are read together with its results.

        Args:
            device: Device of the numbers.
            changes: See `Given`; none by default.
        """
        none = torch.zeros(0, device=device)
        return Given(self._plain_norms(device), none if changes is None else changes)

    def _plain_norms(self, device: torch.device) -> Tensor:
        """Norms that are not finite if a plain gradient or its parameter is not."""
        moved = [p for p in self._plain if p.grad is not None]
        tensors = [p.detach() for p in moved if p.is_floating_point() or p.is_complex()]
        tensors += [_values(p.grad) for p in moved if p.grad is not None]
        if not tensors:
            return torch.zeros(0, dtype=torch.float64, device=device)
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        norms = [torch.stack(list(torch._foreach_norm(of, 2))) for of in alike.values()]
        return torch.cat([norm.to(device, torch.float64) for norm in norms])

    def check(
        self, given: Given, results: Iterable[Tensor], extra: Iterable[Tensor] = ()
    ) -> list[list[float]]:
        """Read the norms, together with other numbers, in one transfer to the host.

        Args:
            given: `given()`.
            results: Norms of the results of a step, see `core_norms`.
            extra: Further tensors to read.

        Returns:
            The numbers of each further tensor, in a flat list.

        Raises:
            NonFiniteError: A gradient or a weight is not finite, or a result would not be.
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
                "weight: the step would make it NaN or infinite, expected finite values; nothing "
                "was changed. Lower lr"
            )
        numbers, begin = [], 0
        for part in parts:
            numbers.append(rest[begin : begin + len(part)])
            begin += len(part)
        return numbers

    def accepted(self, given: Given, results: Iterable[Tensor]) -> Tensor:
        """Whether everything is finite, as a boolean on the device: nothing is read on the host."""
        good, right = self._found(given, results)
        return good & right

    @staticmethod
    def _found(given: Given, results: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Whether the inputs are finite, and whether the results are; false for NaN."""
        norms = [norm.to(given.norms.device).flatten() for norm in results]
        found = torch.cat([*norms, given.norms[:0]])
        return (given.norms < math.inf).all(), (found < math.inf).all()

    def _check_entries(self) -> None:
        """Check every entry, because a norm can overflow although all entries are finite."""
        for parameter, name in self._names.items():
            if parameter.grad is None:
                continue
            for what, tensor in (("gradient", parameter.grad), ("value", parameter.detach())):
                if not torch.isfinite(_values(tensor)).all():
                    raise NonFiniteError(
                        f"{name}: its {what} has NaN or infinite entries, expected finite ones; "
                        "nothing was changed. Lower lr, or check the loss"
                    )


def _values(tensor: Tensor) -> Tensor:
    """The stored entries of a sparse tensor, or the tensor itself."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
