"""Progress displays of a run and of a sweep."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tdlrt.text_tables import format_shape
from tdlrt_lab.cli.output import empty_table
from tdlrt_lab.cli.screens import Screen
from tdlrt_lab.cli.terminal_tables import closing_line, layer_table
from tdlrt_lab.data import DATA_SETS, Data
from tdlrt_lab.measures import Measure, measure_of
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Observer
from tdlrt_lab.run.training import Training
from tdlrt_lab.spread import format_spread
from tdlrt_lab.sweep.attempts import Event
from tdlrt_lab.sweep.plan import SweepRun

__all__ = ["RunDisplay", "SweepDisplay", "rank_changes"]

SECONDS_PER_REFRESH = 0.1

MOST_NAMED = 3
"""Layers whose ranks fit on a line."""


class RunDisplay(Observer):
    """Shows progress and current ranks live, a line per epoch, and a table at the end.

    Args:
        screen: Where to show it.
        out: The run directory, as typed by the user.
    """

    def __init__(self, screen: Screen, out: str) -> None:
        self._screen = screen
        self._out = out
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),  # leaves room for the "^C" that terminals echo
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=None)
        self._last_refresh = 0.0
        self._ranks_before: dict[str, list[int]] = {}

    def loading(self, part: str, done: int, total: int) -> None:
        """Show the number of images that are decoded."""
        self._update_bar(f"reading {part} images", done, total)
        self._screen.live(lambda: self._progress)
        if done == total:
            self._screen.status(f"read {total:,} {part} images")

    def started(self, training: Training, data: Data) -> None:
        """Show the model, the data and the initial ranks."""
        config = training.config
        self._screen.line(f"{config.model} ({config.method}) on {config.data}: {data.description}")
        if training.step:
            self._screen.line(f"continuing after step {training.step} of {training.steps}")
        self._progress.reset(self._task)
        self._ranks_before = training.ranks
        self._show(training)

    def stepped(self, training: Training) -> None:
        """Show progress, loss and ranks, at most ten times per second."""
        if time.monotonic() - self._last_refresh > SECONDS_PER_REFRESH:
            self._show(training)

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Show the metrics of the epoch."""
        self._screen.event({"event": "epoch", "method": training.config.method, **asdict(metrics)})
        epochs = str(training.config.epochs)
        measure = measure_of(vars(metrics))
        quality = measure.text(getattr(metrics, measure.name), 6)
        skipped = f"  {metrics.skipped_steps} skipped" if metrics.skipped_steps else ""
        compression = f"  compression {100 * metrics.compression:5.1f} %" if training.layers else ""
        self._screen.line(
            f"epoch {metrics.epoch:>{len(epochs)}}/{epochs}  loss {metrics.loss:7.4f}"
            f"  {quality}{compression}  {metrics.seconds:6.1f} s{skipped}"
        )
        changes = rank_changes(self._ranks_before, metrics.ranks)
        if changes:
            self._screen.line(f"{'':{2 * len(epochs) + 6}}  ranks {changes}")
        self._ranks_before = metrics.ranks
        self._show(training)

    def warned(self, message: str) -> None:
        """Show the warning."""
        self._screen.event({"event": "warning", "message": message})
        self._screen.line(f"warning: {message}")

    def already_finished(self, directory: RunDirectory) -> None:
        """Say that the run is already finished."""
        self._screen.line(f"{directory.path}: already finished; nothing to train")

    def finished(self, summary: dict[str, Any]) -> None:
        """Replace the progress by the table of layers and the result."""
        self._screen.end_live()
        self._screen.event({"event": "summary", **summary})
        self._screen.table(layer_table(summary))
        self._screen.line(closing_line(summary))
        self._screen.line(f"results, plots and checkpoints in {self._out}")

    def _show(self, training: Training) -> None:
        self._last_refresh = time.monotonic()
        config = training.config
        epoch = min(training.epoch + 1, config.epochs)
        loss = f"  loss {training.loss:.4f}" if training.step % training.steps_per_epoch else ""
        description = f"{config.method}  epoch {epoch}/{config.epochs}{loss}"
        self._update_bar(description, training.step, training.steps)
        self._screen.live(lambda: self._ranks_and_bar(training.ranks))

    def _ranks_and_bar(self, ranks: dict[str, list[int]]) -> RenderableType:
        changed = "bold green"
        words = [
            Text.assemble(
                f"{name} ",
                (format_shape(now), changed if now != self._ranks_before.get(name) else "dim"),
            )
            for name, now in ranks.items()
        ]
        return Group(Columns(words, padding=(0, 3)), self._progress) if words else self._progress

    def _update_bar(self, description: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=description, completed=done, total=total)


def rank_changes(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> str:
    """The layers whose ranks changed, with their new ranks; of many, only how many they are.

    >>> rank_changes({"conv": [4, 3], "fc": [9, 9]}, {"conv": [4, 3], "fc": [7, 8]})
    'fc 7x8'
    """
    changed = [name for name in now if now[name] != before.get(name)]
    if len(changed) > MOST_NAMED:
        return f"of {len(changed)} of {len(now)} layers changed"
    return ", ".join(f"{name} {format_shape(now[name])}" for name in changed)


class SweepDisplay:
    """Shows a table of all runs, live and at the end, or a line per start and end of a run.

    Args:
        screen: Where to show it.
        runs: All runs of the sweep.
    """

    def __init__(self, screen: Screen, runs: Sequence[SweepRun]) -> None:
        self._screen = screen
        self._runs = runs
        self._last: dict[str, Event] = {}
        screen.live(self._table)

    @property
    def failed(self) -> list[str]:
        """Names of the runs that failed."""
        return [name for name, event in self._last.items() if event["event"] == "failed"]

    def show(self, event: Event) -> None:
        """Show an event; epochs appear only in the table."""
        self._last[event["run"]] = event
        self._screen.event(event)
        if event["event"] != "epoch":
            show = self._screen.line if event["event"] == "failed" else self._screen.status
            number = 1 + [run.name for run in self._runs].index(event["run"])
            show(f"[{number}/{len(self._runs)}] {event['run']}: {_sentence(event)}")
        self._screen.live(self._table)

    def close(self, hint: str) -> None:
        """End the live display, and print the final table and a hint below it."""
        self._screen.end_live()
        ends = [event["event"] for event in self._last.values()]
        counts = {end: ends.count(end) for end in ("finished", "failed", "busy")}
        self._screen.event({"event": "sweep", "runs": len(self._runs), **counts})
        self._screen.table(self._table())
        self._screen.line(hint)

    def _table(self) -> Table:
        """One line per row of the sweep: the state of its runs and their results."""
        measures = list(dict.fromkeys(DATA_SETS[run.config.data].measure for run in self._runs))
        titles = [*(measure.title for measure in measures), "compression (%)", "seconds"]
        shown = empty_table(["row", "state"], numbers=titles)
        rows: dict[str, list[Event | None]] = {}
        for run in self._runs:
            rows.setdefault(run.row, []).append(self._last.get(run.name))
        for row, events in rows.items():
            done = [event for event in events if event and event["event"] == "finished"]
            numbers = [
                *(_spread(done, measure) for measure in measures),
                format_spread([100 * event["compression"] for event in done], 1),
                format_spread([event["seconds"] for event in done], 1),
            ]
            shown.add_row(row, _state(events), *numbers)
        return shown


def _spread(events: Sequence[Event], measure: Measure) -> str:
    values = [event[measure.name] for event in events if measure_of(event) == measure]
    return format_spread(values, measure.digits)


def _sentence(event: Event) -> str:
    kind = event["event"]
    if kind == "finished":
        measure = measure_of(event)
        return (
            f"{measure.text(event[measure.name])}, compression {100 * event['compression']:.1f} %, "
            f"{event['seconds']:.1f} s"
        )
    if kind == "started":
        return f"continued after epoch {event['epoch']}" if event["epoch"] else "started"
    return f"failed: {event['error']}" if kind == "failed" else "running in another process"


def _state(events: Sequence[Event | None]) -> str:
    """How many runs of a row are done, and the states of the others."""
    kinds = [event["event"] if event else "waiting" for event in events]
    words = [f"{kinds.count('finished')}/{len(events)} done"]
    for event in events:
        if event and event["event"] in ("started", "epoch"):
            words.append(f"epoch {event['epoch']}/{event['epochs']}")
    words += [f"{kinds.count(kind)} {kind}" for kind in ("failed", "busy") if kind in kinds]
    return ", ".join(words)
