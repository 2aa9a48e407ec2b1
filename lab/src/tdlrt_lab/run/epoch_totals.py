"""Sums over the steps of an epoch, from which its metrics are computed."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from tdlrt_lab.run.processes import is_first, total

__all__ = ["EpochTotals"]


class EpochTotals:
    """Loss, correct predictions and time of the steps of an epoch that were not skipped.

    Attributes:
        labels: Labels in these steps, over all processes: one per image, or per character.
        seconds: Duration of the epoch so far.
        rank_changes: Changes of ranks in these steps (`EpochMetrics.rank_changes`).
    """

    def __init__(self, device: torch.device) -> None:
        self.labels = 0
        self.seconds = 0.0
        self.rank_changes: list[list[Any]] = []
        self._since = time.perf_counter()
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def mean_loss(self) -> float:
        """Mean loss per label; NaN if all steps were skipped."""
        return float(self._loss) / self.labels if self.labels else math.nan

    @property
    def train_accuracy(self) -> float:
        """Percentage of the labels that were predicted."""
        return 100 * int(self._correct) / self.labels

    def add(self, loss: Tensor, correct: Tensor, labels: int) -> None:
        """Add a step.

        Args:
            loss: Sum of the losses, for the labels of this process.
            correct: Number of correct predictions, for the labels of this process.
            labels: Number of labels, over all processes.
        """
        self._loss += loss
        self._correct += correct
        self.labels += labels

    def start_clock(self) -> None:
        """Leave the time since the last call of `lap` out of `seconds`."""
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Add the time since the last call of `lap` or `start_clock` to `seconds`."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def sum_over_processes(self) -> None:
        """Give every process the sums over all processes; every process must call it."""
        self._loss, self._correct = total(self._loss), total(self._correct)

    def state_dict(self) -> dict[str, Any]:
        """The sums over all processes; every process must call it."""
        return {
            "loss_sum": total(self._loss),
            "correct": total(self._correct),
            "seen": self.labels,
            "seconds": self.seconds,
            "rank_changes": list(self.rank_changes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums; the first process gets all of them, the others zeros."""
        self.labels, self.seconds = state["seen"], state["seconds"]
        self.rank_changes = list(state["rank_changes"])
        self._loss.copy_(state["loss_sum"])
        self._correct.copy_(state["correct"])
        if not is_first():
            self._loss.zero_()
            self._correct.zero_()
