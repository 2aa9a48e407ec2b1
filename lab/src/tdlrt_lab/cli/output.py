"""What commands print, and options on it. Nothing here needs torch, which takes long to import."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

__all__ = ["OUTPUT", "AsJson", "Debug", "empty_table", "shown_option"]

OUTPUT = "Output"


def shown_option(help: str, group: str, *names: str, **settings: Any) -> Any:
    """A typer option that is shown in a group of the help."""
    return typer.Option(*names, help=help, rich_help_panel=group, **settings)


AsJson = Annotated[bool, shown_option("Print one JSON object.", OUTPUT, "--json")]
Debug = Annotated[bool, shown_option("Show the traceback of an error.", OUTPUT, "--debug")]


def empty_table(
    texts: Sequence[str], codes: Sequence[str] = (), numbers: Sequence[str] = ()
) -> Table:
    """A table without rows.

    Args:
        texts: Titles of columns with text, which may wrap.
        codes: Titles of columns with text that does not wrap, such as shapes.
        numbers: Titles of columns with numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in texts:
        table.add_column(title, overflow="fold")
    for title in codes:
        table.add_column(title, no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table
