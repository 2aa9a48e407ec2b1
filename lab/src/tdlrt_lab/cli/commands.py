"""The commands of `tdlrt`, each imported when it is used, since torch takes seconds to import."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from tdlrt_lab.cli.examples import examples_of
from tdlrt_lab.cli.interrupts import interrupts_end_the_process

__all__ = ["COMMANDS", "Commands"]

COMMANDS = {
    "demo": "Train a small network on digits beside the dense one, and compare their files.",
    "train": "Train a network and write a run directory.",
    "plan": "Show the forward path of each Tucker layer and its cost relative to dense.",
    "bench": "Compare time and size of a network in Tucker format and the dense network.",
    "export": "Export the network of a finished run to a file that runs without tdlrt.",
    "compare": "Train all combinations of methods, sizes and seeds.",
    "report": "Write tables and figures of all runs below a folder.",
    "doctor": "Check the installation, and show what each missing extra would enable.",
}
"""The commands in the order of the help, and the first sentence of the help of each.

A command is the function of its name in the file of its name in this folder.
"""


class Commands(TyperGroup):
    """The group of all commands; a list of them imports none."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None; while commands are listed, its sentence alone."""
        if cmd_name not in COMMANDS:
            return None
        if self._listing:
            return _command(cmd_name, _nothing, help=COMMANDS[cmd_name])
        with interrupts_end_the_process():
            function = getattr(import_module(f"tdlrt_lab.cli.{cmd_name}"), cmd_name)
        return _command(cmd_name, function, epilog=examples_of(cmd_name))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the list of commands."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _command(name: str, function: Any, **settings: Any) -> Any:
    app = typer.Typer(
        rich_markup_mode="rich",
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(name, **settings)(function)
    return typer.main.get_command(app)


def _nothing() -> None:
    """Stand for a command that is listed."""
