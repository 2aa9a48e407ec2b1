"""`tdlrt train`: one training run in a run directory."""

import shlex
import sys
from contextlib import nullcontext
from typing import Annotated, Any

from tdlrt_lab.cli.display import RunDisplay
from tdlrt_lab.cli.output import OUTPUT, Debug, shown_option
from tdlrt_lab.cli.parameters import takes_run_options
from tdlrt_lab.cli.screens import choose_screen
from tdlrt_lab.cli.tensorboard import TensorBoardLog
from tdlrt_lab.config import RunConfig
from tdlrt_lab.options import TRAINING
from tdlrt_lab.run.checkpoint import Checkpoints
from tdlrt_lab.run.runner import Observer, Observers, run

__all__ = ["train"]


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
