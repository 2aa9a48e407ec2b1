"""Where the commands show what they do: nowhere, as JSON, as lines, or live on a terminal."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

__all__ = ["JsonScreen", "LineScreen", "LiveScreen", "Screen", "choose_screen"]


class Screen(AbstractContextManager["Screen"]):
    """Shows nothing; what the other screens have in common."""

    def fact(self, fields: Mapping[str, Any]) -> None:
        """Tell a program what happened."""

    def line(self, text: str) -> None:
        """Tell a reader what happened."""

    def news(self, text: str) -> None:
        """Tell a reader what the picture would show as well."""

    def table(self, table: Table) -> None:
        """Show a table to a reader."""

    def picture(self, draw: Callable[[], RenderableType]) -> None:
        """Show a reader how things stand, in place of the picture before."""

    def end_picture(self) -> None:
        """Take the picture away: what follows is shown for good."""

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        self.end_picture()


class JsonScreen(Screen):
    """One JSON object per line."""

    def fact(self, fields: Mapping[str, Any]) -> None:
        """Print it."""
        print(json.dumps(fields), flush=True)


class LineScreen(Screen):
    """Lines and tables; for pipes and files."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        """Print it."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def news(self, text: str) -> None:
        """Print it."""
        self.line(text)

    def table(self, table: Table) -> None:
        """Print it."""
        self.console.print(table)


class LiveScreen(LineScreen):
    """Lines and tables, and beneath them a picture that moves."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "LiveScreen":
        """Begin to draw."""
        self._live.start()
        return self

    def news(self, text: str) -> None:
        """Leave it to the picture."""

    def picture(self, draw: Callable[[], RenderableType]) -> None:
        """Draw it anew."""
        self._live.update(draw(), refresh=True)

    def end_picture(self) -> None:
        """Take the picture away."""
        self._live.stop()


def choose_screen(*, as_json: bool = False, quiet: bool = False) -> Screen:
    """The screen that was asked for; else a live one on a terminal, lines elsewhere."""
    if as_json:
        return JsonScreen()
    if quiet:
        return Screen()
    console = Console()
    return LiveScreen(console) if console.is_terminal else LineScreen(console)
