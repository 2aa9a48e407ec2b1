"""Output of the commands: none, JSON, plain lines, or a live display on a terminal."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

__all__ = ["JsonScreen", "LineScreen", "LiveScreen", "Screen", "choose_screen"]


class Screen(AbstractContextManager["Screen"]):
    """The interface of all screens; this one shows nothing."""

    def event(self, fields: Mapping[str, Any]) -> None:
        """Output an event for programs."""

    def line(self, text: str) -> None:
        """Print a line for readers."""

    def status(self, text: str) -> None:
        """Print a line whose content a live display shows anyway."""

    def table(self, table: Table) -> None:
        """Print a table for readers."""

    def live(self, draw: Callable[[], RenderableType]) -> None:
        """Replace the content of the live display."""

    def end_live(self) -> None:
        """Remove the live display."""

    def __exit__(self, *error: object) -> None:
        """Restore the terminal."""
        self.end_live()


class JsonScreen(Screen):
    """Prints events, one JSON object per line."""

    def event(self, fields: Mapping[str, Any]) -> None:
        """Print the event."""
        print(json.dumps(fields), flush=True)


class LineScreen(Screen):
    """Prints lines and tables, for pipes and files."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        """Print the line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """Print the line."""
        self.line(text)

    def table(self, table: Table) -> None:
        """Print the table."""
        self.console.print(table)


class LiveScreen(LineScreen):
    """Prints lines and tables above a live display."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "LiveScreen":
        """Start the live display."""
        self._live.start()
        return self

    def status(self, text: str) -> None:
        """Print nothing: the live display shows it."""

    def live(self, draw: Callable[[], RenderableType]) -> None:
        """Redraw the live display."""
        self._live.update(draw(), refresh=True)

    def end_live(self) -> None:
        """Remove the live display."""
        self._live.stop()


def choose_screen(*, as_json: bool = False, quiet: bool = False) -> Screen:
    """The screen for the options of a command: by default live on a terminal, else plain lines."""
    if as_json:
        return JsonScreen()
    if quiet:
        return Screen()
    console = Console()
    return LiveScreen(console) if console.is_terminal else LineScreen(console)
