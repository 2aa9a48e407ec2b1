"""TensorBoard event files of a run."""

from contextlib import AbstractContextManager
from typing import Any

from tdlrt.extras import needs_extra
from tdlrt.report import named_metrics
from tdlrt_lab.data import Data
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Observer
from tdlrt_lab.run.training import Training

__all__ = ["TensorBoardLog"]


class TensorBoardLog(Observer, AbstractContextManager["TensorBoardLog"]):
    """Writes scalars of each epoch to OUT/tensorboard/METHOD, for the run and its baseline.

    When a training starts or continues, existing events are replaced by its history so far, so that
    an interrupted run has neither gaps nor duplicate points.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, out: str) -> None:
        with needs_extra("log", "--tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._directory = RunDirectory(out)
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def __exit__(self, *error: object) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def started(self, training: Training, data: Data) -> None:
        """Start a new event file with the epochs so far."""
        self.__exit__()
        method = training.config.method
        self._directory.clear_events(method)
        # purge_step makes a running TensorBoard discard the events that it has read.
        folder = str(self._directory.tensorboard / method)
        self._writer = self._open(folder, purge_step=0)
        for metrics in training.history:
            self.epoch_ended(training, metrics)

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Write the metrics of the epoch."""
        writer: Any = self._writer
        scalars = {
            "loss/train": metrics.loss,
            "accuracy/train": metrics.train_accuracy,
            f"accuracy/{metrics.split}": metrics.accuracy,
            "lr": metrics.lr,
        }
        if metrics.bits_per_character is not None:
            scalars[f"bits_per_character/{metrics.split}"] = metrics.bits_per_character
        if metrics.ranks:
            scalars |= named_metrics(metrics.ranks, metrics.parameters, metrics.compression)
        for name, value in scalars.items():
            writer.add_scalar(name, value, metrics.epoch)
        writer.flush()
