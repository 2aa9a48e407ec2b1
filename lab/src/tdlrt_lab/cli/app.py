"""The application `tdlrt`: its commands, error messages and exit codes."""

import re
import shlex
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer

from tdlrt_lab.cli.commands import Commands
from tdlrt_lab.cli.examples import EXAMPLES
from tdlrt_lab.cli.interrupts import STOPPED

__all__ = ["app", "run_app"]

# click's UsageError, from the private copy of click inside typer.
UsageError: Any = typer.BadParameter.__base__

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_app(arguments: list[str]) -> int:
    """Run a command; an error is printed as one line on stderr and sets the exit code.

    Args:
        arguments: The command line without the name of the program.

    Returns:
        The exit code: 0 for success, 1 for a failed run, 2 for bad arguments, 130 if Ctrl-C
        stopped the command at once.
    """
    try:
        return app(arguments, prog_name="tdlrt", standalone_mode=False) or DONE
    except UsageError as error:
        # The message is empty if the help was printed because there were no arguments.
        if error.format_message():
            _print_error(f"{error.format_message()} See --help.")
        return BAD_ARGUMENTS
    except (KeyboardInterrupt, typer.Abort):  # which one depends on the version of typer
        return STOPPED
    except Exception as error:
        return _explain(error, arguments)


def _explain(error: Exception, arguments: list[str]) -> int:
    """Print an error of ours or of the system as one line; any other is raised again.

    Returns:
        The exit code.
    """
    # Not imported above, so that the help does not wait for torch.
    from tdlrt.errors import TdlrtError
    from tdlrt_lab.run.runner import Interrupted

    if not isinstance(error, TdlrtError | OSError):
        raise error
    if "--debug" in arguments:
        traceback.print_exception(error)
    _print_error(_name_options_as_typed(str(error), arguments))
    if isinstance(error, Interrupted):
        print(f"continue with: {_resume_command(arguments)}", file=sys.stderr)
    # Errors in the arguments derive from ValueError or TypeError, failures of a run do not.
    return BAD_ARGUMENTS if isinstance(error, ValueError | TypeError) else FAILED


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _name_options_as_typed(message: str, arguments: list[str]) -> str:
    """Replace names of options before the first colon by their command-line form (`--tau`)."""
    head, colon, rest = message.partition(":")
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--"):
            name = re.escape(option[2:].replace("-", "_"))
            head = re.sub(rf"(^|(?<= and )|(?<= with )){name}\b", option, head)
    return head + colon + rest


def _resume_command(arguments: list[str]) -> str:
    if arguments[0] == "compare":
        return shlex.join(["tdlrt", *arguments])
    kept = [word for word in arguments if word not in ("--overwrite", "--resume")]
    return shlex.join(["tdlrt", *kept, "--resume"])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tdlrt {version('tdlrt')}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def _tdlrt(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train networks in Tucker format, with ranks found during training."""
