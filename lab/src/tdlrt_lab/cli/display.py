"""Showing a run while it happens: lines, a live display on a terminal, or JSON."""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from tdlrt.text_tables import format_shape
from tdlrt_lab.cli.terminal_tables import closing_line, layer_table
from tdlrt_lab.data import ImageData
from tdlrt_lab.run.results import EpochMetrics, RunDirectory
from tdlrt_lab.run.runner import Observer
from tdlrt_lab.run.training import Training

__all__ = ["JsonDisplay", "LineDisplay", "LiveDisplay", "SilentDisplay"]

SECONDS_PER_REFRESH = 0.1


class SilentDisplay(Observer, AbstractContextManager["SilentDisplay"]):
    """Shows nothing; what the other displays have in common."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""


class JsonDisplay(SilentDisplay):
    """One JSON object per line: each epoch, then the summary; a warning where there is one."""

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Print the metrics of the epoch."""
        self._print({"event": "epoch", "method": training.config.method, **asdict(metrics)})

    def warned(self, message: str) -> None:
        """Print the warning."""
        self._print({"event": "warning", "message": message})

    def finished(self, summary: dict[str, Any]) -> None:
        """Print the summary."""
        self._print({"event": "summary", **summary})

    def _print(self, fields: dict[str, Any]) -> None:
        print(json.dumps(fields), flush=True)


class LineDisplay(SilentDisplay):
    """A line per epoch and a closing table; for pipes and files."""

    def __init__(self, console: Console, out: str) -> None:
        self.console = console
        self.out = out

    def loading(self, part: str, done: int, total: int) -> None:
        """Say how many images were read."""
        if done == total:
            self._print(f"read {total:,} {part} images")

    def started(self, training: Training, data: ImageData) -> None:
        """Say what is about to be trained, and on what."""
        config = training.config
        self._print(
            f"{config.model} ({config.method}) on {config.data}: "
            f"{len(data.train_labels):,} training, {len(data.test_labels):,} {data.split} images "
            f"{format_shape(data.image_shape)}"
        )
        if training.step:
            self._print(f"continuing after step {training.step} of {training.steps}")

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Print the metrics of the epoch."""
        epochs = str(training.config.epochs)
        skipped = f"  {metrics.skipped_steps} skipped" if metrics.skipped_steps else ""
        compression = f"  compression {100 * metrics.compression:5.1f} %" if training.layers else ""
        self._print(
            f"epoch {metrics.epoch:>{len(epochs)}}/{epochs}  loss {metrics.loss:7.4f}"
            f"  accuracy {metrics.accuracy:6.2f} %{compression}  {metrics.seconds:6.1f} s{skipped}"
        )

    def warned(self, message: str) -> None:
        """Print the warning."""
        self._print(f"warning: {message}")

    def already_finished(self, directory: RunDirectory) -> None:
        """Say that there is nothing to do."""
        self._print(f"{directory.path}: finished before, nothing left to train")

    def finished(self, summary: dict[str, Any]) -> None:
        """Print the table of layers and the result."""
        self.console.print(layer_table(summary))
        self._print(closing_line(summary))
        self._print(f"results, plots and checkpoints in {self.out}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveDisplay(LineDisplay):
    """The same lines, and beneath them progress and the ranks of each layer as they move."""

    def __init__(self, console: Console, out: str) -> None:
        super().__init__(console, out)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),  # leaves room for the terminal's "^C" on the line
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None)
        self._live = Live(self._progress, console=console, transient=True, auto_refresh=False)
        self._shown = 0.0
        self._ranks_before: dict[str, list[int]] = {}

    def __enter__(self) -> "LiveDisplay":
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._live.stop()

    def loading(self, part: str, done: int, total: int) -> None:
        """Move the bar."""
        self._move(f"reading {part} images", done, total)
        self._live.refresh()

    def started(self, training: Training, data: ImageData) -> None:
        """Say what is about to be trained, and show the ranks it starts with."""
        super().started(training, data)
        self._progress.reset(self._task)
        self._ranks_before = training.ranks
        self._show(training)

    def stepped(self, training: Training) -> None:
        """Move the bar and show loss and ranks, a few times per second."""
        if time.monotonic() - self._shown > SECONDS_PER_REFRESH:
            self._show(training)

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Print the metrics of the epoch."""
        super().epoch_ended(training, metrics)
        self._ranks_before = metrics.ranks
        self._show(training)

    def finished(self, summary: dict[str, Any]) -> None:
        """Print the table of layers and the result in place of the progress."""
        self._live.stop()
        super().finished(summary)

    def _show(self, training: Training) -> None:
        self._shown = time.monotonic()
        config = training.config
        epoch = min(training.epoch + 1, config.epochs)
        loss = f"  loss {training.loss:.4f}" if training.step % training.steps_per_epoch else ""
        description = f"{config.method}  epoch {epoch}/{config.epochs}{loss}"
        self._move(description, training.step, training.steps)
        self._live.update(self._picture(training.ranks), refresh=True)

    def _picture(self, ranks: dict[str, list[int]]) -> RenderableType:
        moved = "bold green"
        words = [
            Text.assemble(
                f"{name} ",
                (format_shape(now), moved if now != self._ranks_before.get(name) else "dim"),
            )
            for name, now in ranks.items()
        ]
        return Group(Columns(words, padding=(0, 3)), self._progress) if words else self._progress

    def _move(self, description: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=description, completed=done, total=total)
