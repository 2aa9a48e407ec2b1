"""The application `tdlrt`: its commands, error messages and exit codes."""

import re
import shlex
import sys
import traceback
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated, Any

import typer

from tdlrt.errors import TdlrtError
from tdlrt_lab.cli.bench import bench
from tdlrt_lab.cli.compare import compare
from tdlrt_lab.cli.display import RunDisplay
from tdlrt_lab.cli.doctor import doctor
from tdlrt_lab.cli.examples import EXAMPLES, examples_of
from tdlrt_lab.cli.export import export
from tdlrt_lab.cli.parameters import OUTPUT, Debug, shown_option, takes_run_options
from tdlrt_lab.cli.plan import plan
from tdlrt_lab.cli.report import report
from tdlrt_lab.cli.screens import choose_screen
from tdlrt_lab.cli.tensorboard import TensorBoardLog
from tdlrt_lab.config import RunConfig
from tdlrt_lab.options import TRAINING
from tdlrt_lab.run.checkpoint import Checkpoints
from tdlrt_lab.run.runner import Interrupted, Observer, Observers, run

__all__ = ["app", "run_app"]

# click's UsageError, from the private copy of click inside typer.
UsageError: Any = typer.BadParameter.__base__

DONE, FAILED, BAD_ARGUMENTS, STOPPED = 0, 1, 2, 130

app = typer.Typer(
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
    except (TdlrtError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
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


@app.command(epilog=examples_of("train"))
@takes_run_options
def train(
    options: dict[str, Any],
    *,
    baseline: Annotated[
        bool, shown_option("Also train the dense network, in OUT/baseline.", TRAINING, "--baseline")
    ] = False,
    out: Annotated[
        str | None,
        shown_option("Run directory.", OUTPUT, show_default="runs/MODEL-DATA-METHOD-SEED"),
    ] = None,
    checkpoint_steps: Annotated[
        int | None,
        shown_option("Steps between checkpoints.", OUTPUT, show_default="ends of epochs"),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        shown_option("Minutes between checkpoints.", OUTPUT, show_default="ends of epochs"),
    ] = None,
    keep: Annotated[
        int, shown_option("Number of latest checkpoints to keep.", OUTPUT)
    ] = Checkpoints.keep,
    resume: Annotated[
        bool, shown_option("Continue the interrupted run in OUT.", OUTPUT, "--resume")
    ] = False,
    overwrite: Annotated[
        bool, shown_option("Replace an earlier run in OUT.", OUTPUT, "--overwrite")
    ] = False,
    tensorboard: Annotated[
        bool, shown_option("Also write event files in OUT/tensorboard.", OUTPUT, "--tensorboard")
    ] = False,
    as_json: Annotated[
        bool,
        shown_option("Print one JSON object per epoch and one at the end.", OUTPUT, "--json"),
    ] = False,
    quiet: Annotated[bool, shown_option("Print only errors.", OUTPUT, "--quiet")] = False,
    debug: Debug = False,
) -> None:
    """Train a network and write a run directory.

    The directory holds config.yaml, metrics.jsonl (one line per epoch),
    summary.json, checkpoints and plots. A checkpoint is stored after each epoch,
    as often as the options below set, and when Ctrl-C or a termination signal
    stops the run; --resume continues from it with the same results.
    """
    checkpoints = Checkpoints(steps=checkpoint_steps, minutes=checkpoint_minutes, keep=keep)
    config = RunConfig.given(**options)
    out = out or f"runs/{config.model}-{config.data}-{config.method}-{config.seed}"
    log = TensorBoardLog(out) if tensorboard else nullcontext(Observer())
    with choose_screen(as_json=as_json, quiet=quiet) as screen, log as logged:
        run(
            config,
            out,
            baseline=baseline,
            resume=resume,
            overwrite=overwrite,
            checkpoints=checkpoints,
            observer=Observers(RunDisplay(screen, out), logged),
            command=shlex.join(["tdlrt", *sys.argv[1:]]),
        )


for command in (plan, bench, export, compare, report, doctor):
    app.command(epilog=examples_of(command.__name__))(command)
