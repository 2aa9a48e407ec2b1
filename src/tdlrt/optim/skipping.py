"""Counts of skipped steps, which change nothing because a number is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import NonFiniteError

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Counts skipped steps, on the host or on the device.

    Args:
        most: How many steps in a row may be skipped.
        device: Device on which steps are counted that read nothing on the host.

    Attributes:
        count: Number of steps skipped so far.
        in_a_row: Number of steps skipped since the last one that was taken.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.most, self.count, self.in_a_row = most, 0, 0
        self._on_device = torch.zeros(
            2, device=device
        )  # skipped in a row; skipped and not yet in count

    def state_dict(self) -> dict[str, int]:
        """The counts; waits for the device."""
        uncounted = int(self._on_device[1])
        return {"skipped_steps": self.count + uncounted, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from stored counts."""
        self.count = state.get("skipped_steps", 0)
        self.in_a_row = state.get("skipped_in_a_row", 0)
        self._on_device.zero_()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Count a NonFiniteError inside the block instead of raising it, up to the limit."""
        try:
            yield
        except NonFiniteError:
            if self.in_a_row >= self.most:
                raise
            self.in_a_row += 1
            self.count += 1
        else:
            self.in_a_row = 0

    def note(self, accepted: Tensor) -> None:
        """Count a step on the device.

        Args:
            accepted: Whether the step was taken, a boolean on the device.
        """
        wrong = (~accepted).float()
        in_a_row, count = self._on_device
        self._on_device.copy_(torch.stack([wrong * (in_a_row + 1), count + wrong]))

    def read(self) -> None:
        """Add the count on the device to `count`.

        Raises:
            NonFiniteError: Too many steps in a row were skipped.
        """
        in_a_row, count = map(int, self._on_device.tolist())
        self.count += count
        self._on_device[1] = 0
        if in_a_row > self.most:
            self._on_device.zero_()
            raise NonFiniteError(
                f"gradients: those of the last {in_a_row} steps were not finite, expected finite "
                "ones; these steps changed nothing. Lower lr, or check the loss"
            )

    def read_after_a_step(self) -> None:
        """Do the same after a step that was taken, which ends a row of skipped steps."""
        self.read()
        self._on_device[0] = 0
