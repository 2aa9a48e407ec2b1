"""Commands of `tdlrt`: parsing, choice of display, exit codes."""

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from tdlrt.errors import RunError, TdlrtError
from tdlrt.export import FORMATS
from tdlrt.ranks import RelativeTolerance
from tdlrt.surgery import factorize_
from tdlrt_lab.cli.bench import layer_times, network_times
from tdlrt_lab.cli.compare import compare
from tdlrt_lab.cli.display import RunDisplay
from tdlrt_lab.cli.doctor import doctor
from tdlrt_lab.cli.export import closing_lines, export_table
from tdlrt_lab.cli.plan import plan_layers, plan_table
from tdlrt_lab.cli.report import report
from tdlrt_lab.cli.screens import choose_screen
from tdlrt_lab.cli.tensorboard import TensorBoardLog
from tdlrt_lab.cli.untrained import untrained
from tdlrt_lab.config import LEARNING_RATES, WITH_BUDGET, WITH_TAU, RunConfig, torch_device
from tdlrt_lab.data import DATA_SETS
from tdlrt_lab.methods import DEFAULT_TAU, METHODS, OPTIMIZERS, RAMPS
from tdlrt_lab.models import MODELS
from tdlrt_lab.rank_option import number_or_word, parse_rank
from tdlrt_lab.run.checkpoint import Checkpoints
from tdlrt_lab.run.exporting import export_run
from tdlrt_lab.run.runner import Interrupted, Observer, Observers, run
from tdlrt_lab.run.timing import compare_networks

__all__ = ["app", "run_app"]

# typer carries its own copy of click under a private name; this is click's UsageError.
UsageError: Any = typer.BadParameter.__base__

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2

EXAMPLES = """\
[bold]Examples[/bold]

  tdlrt train lenet5 --data digits --baseline

  tdlrt train lenet5 --data mnist --data-dir DIR --tau 0.15 --seed 1

  tdlrt train vgg16 --data cifar10 --weight-decay 5e-4 --out runs/vgg

  tdlrt train vgg16 --data cifar10 --weight-decay 5e-4 --out runs/vgg --resume

  tdlrt train vgg16 --data cifar10 --checkpoint-minutes 10 --keep 3

  tdlrt compare lenet5 --data digits --methods dense,tdlrt --budget 0.1,0.2 --out runs/sweep

  tdlrt report runs/sweep

  tdlrt plan vgg16 --data cifar10 --rank 0.2

  tdlrt bench vgg16 --data cifar10 --rank 0.2 --batch-size 64

  tdlrt export runs/vgg --format onnx --int8

  tdlrt doctor
"""


def _examples_of(command: str) -> str:
    title, *lines = EXAMPLES.split("\n\n")
    return "\n\n".join([title, *(line for line in lines if f"tdlrt {command}" in line)])


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_app(arguments: list[str]) -> int:
    """Run a command line; errors become one line on stderr and an exit code.

    Args:
        arguments: Everything after the name of the program.

    Returns:
        0 done, 1 failed run, 2 bad arguments.
    """
    try:
        return app(arguments, prog_name="tdlrt", standalone_mode=False) or DONE
    except UsageError as error:
        # Without any argument the help was printed, and there is no message.
        if error.format_message():
            _complain(f"{error.format_message()} See --help.")
        return BAD_ARGUMENTS
    except (TdlrtError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _complain(str(error))
        if isinstance(error, Interrupted):
            print(f"continue with: {_resume_command(arguments)}", file=sys.stderr)
        # What a caller gave is a ValueError or TypeError; what went wrong later is not.
        return BAD_ARGUMENTS if isinstance(error, ValueError | TypeError) else FAILED


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


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
    """Train networks in Tucker format, with every rank found during training."""


def _per_data_set(option: str) -> str:
    names: dict[int, list[str]] = {}
    for name, info in DATA_SETS.items():
        names.setdefault(getattr(info, option), []).append(name)
    return "; ".join(f"{value} for {', '.join(group)}" for value, group in names.items())


def _option(help: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def _completion(names: Iterable[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


DATA, METHOD, TRAINING, OUTPUT = "Data", "Method", "Training", "Output"
RATES = "; ".join(
    f"{rates['sgd']} for {method}, {rates['adam']} with Adam(W)"
    for method, rates in LEARNING_RATES.items()
)


# What the commands share. A command without training needs no data, only the size of images.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=f"{', '.join(MODELS)}.", autocompletion=_completion(MODELS)
    ),
]
Sizes = Annotated[
    str,
    _option(
        f"Data set, for the size of its images: {', '.join(DATA_SETS)}.",
        DATA,
        autocompletion=_completion(DATA_SETS),
    ),
]
Batch = Annotated[
    int | None, _option("Images per step.", DATA, min=1, show_default=_per_data_set("batch_size"))
]
Ranks = Annotated[str, _option("As for train.", METHOD, metavar="RANK")]
AsJson = Annotated[bool, _option("Print one JSON object.", OUTPUT, "--json")]
Debug = Annotated[bool, _option("Show the traceback of an error.", OUTPUT, "--debug")]


def _recipe(option: str) -> str:
    return f"{WITH_TAU[option]}; {WITH_BUDGET[option]} with --budget"


@app.command(epilog=_examples_of("train"))
def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str,
        _option(f"Data set: {', '.join(DATA_SETS)}.", DATA, autocompletion=_completion(DATA_SETS)),
    ],
    data_dir: Annotated[
        str | None,
        _option(
            "Folder with NAME/{train,test}.parquet; for imagefolder with {train,test}/CLASS/*.",
            DATA,
            show_default="the hub",
        ),
    ] = None,
    train_images: Annotated[
        int | None, _option("Train on the first so many images.", DATA, show_default="all")
    ] = None,
    image_size: Annotated[
        int | None,
        _option("Height and width of the images of imagefolder.", DATA, show_default="64"),
    ] = None,
    validation: Annotated[
        Any,
        _option(
            "Share or number of training images held out and measured in place of the test set.",
            DATA,
            parser=number_or_word,
            metavar="PART",
            show_default="none",
        ),
    ] = None,
    augment: Annotated[
        str, _option("none, or standard: random shifts and mirror images.", DATA)
    ] = RunConfig.augment,
    method: Annotated[
        str, _option(f"{', '.join(METHODS)}.", METHOD, autocompletion=_completion(METHODS))
    ] = RunConfig.method,
    tau: Annotated[
        float | None,
        _option(
            "Truncation tolerance, relative to the weight, in [0, 1).",
            METHOD,
            show_default=f"{DEFAULT_TAU} without --budget",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        _option("Share of the dense parameters to keep, instead of --tau.", METHOD),
    ] = None,
    ramp: Annotated[
        str | None,
        _option(
            f"Of tau or budget before the ranks stay: {', '.join(RAMPS)}.",
            METHOD,
            show_default=_recipe("ramp"),
        ),
    ] = None,
    spare: Annotated[
        float | None,
        _option(
            "Share kept beyond tau or budget until the ranks stay.",
            METHOD,
            show_default=_recipe("spare"),
        ),
    ] = None,
    rank: Annotated[
        str,
        _option(
            "Ranks at the start: a share of each mode (0.5), an integer, or full; or by layer, "
            "such as conv2=16x8x5x5,fc1=12,*=0.5 (a layer that no pattern matches stays dense).",
            METHOD,
            metavar="RANK",
        ),
    ] = str(RunConfig.rank),
    modes: Annotated[
        str, _option("Modes of a kernel with bases: all or channels.", METHOD)
    ] = RunConfig.modes,
    init_scale: Annotated[
        Any,
        _option(
            "Norm of the start relative to the network's own.",
            METHOD,
            parser=number_or_word,
            metavar="SCALE",
        ),
    ] = RunConfig.init_scale,
    integrator: Annotated[
        str, _option("parallel (one gradient per step) or bug (two).", METHOD)
    ] = RunConfig.integrator,
    adapt_every: Annotated[
        int | None,
        _option(
            "Steps between two changes of the ranks.", METHOD, show_default=_recipe("adapt_every")
        ),
    ] = None,
    core_steps: Annotated[
        int, _option("Core steps per basis step of bug.", METHOD)
    ] = RunConfig.core_steps,
    freeze_at: Annotated[
        float | None,
        _option(
            "Share of the training after which the ranks stay.",
            METHOD,
            show_default=_recipe("freeze_at"),
        ),
    ] = None,
    dense_until: Annotated[
        float,
        _option("Share of the training after which what starts dense has its size.", METHOD),
    ] = RunConfig.dense_until,
    epochs: Annotated[
        int | None,
        _option("Passes over the training set.", TRAINING, show_default=_per_data_set("epochs")),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("Images per step.", TRAINING, show_default=_per_data_set("batch_size")),
    ] = None,
    lr: Annotated[
        float | None,
        _option("Learning rate, falling to 0 along a cosine.", TRAINING, show_default=RATES),
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(f"{', '.join(OPTIMIZERS)}.", TRAINING, show_default=_recipe("optimizer")),
    ] = None,
    warmup: Annotated[
        float, _option("Share of the training in which the learning rate rises.", TRAINING)
    ] = RunConfig.warmup,
    momentum: Annotated[
        float, _option("Of SGD, in [0, 1); no other optimizer uses it.", TRAINING)
    ] = RunConfig.momentum,
    weight_decay: Annotated[
        float, _option("With tdlrt it acts on the cores of Tucker layers alone.", TRAINING)
    ] = RunConfig.weight_decay,
    spectral_penalty: Annotated[
        float, _option("Weight of the spread of the cores' singular values (tdlrt).", TRAINING)
    ] = RunConfig.spectral_penalty,
    skip_nonfinite: Annotated[
        int,
        _option("Steps in a row that may be skipped for a loss or gradient not finite.", TRAINING),
    ] = RunConfig.skip_nonfinite,
    seed: Annotated[
        int, _option("Of the initial weights and the order of the images.", TRAINING)
    ] = RunConfig.seed,
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.", TRAINING)] = RunConfig.device,
    baseline: Annotated[
        bool, _option("Train the dense network too, in OUT/baseline.", TRAINING, "--baseline")
    ] = False,
    out: Annotated[
        str | None, _option("Run directory.", OUTPUT, show_default="runs/MODEL-DATA-METHOD-SEED")
    ] = None,
    checkpoint_steps: Annotated[
        int | None, _option("Steps between two checkpoints.", OUTPUT, show_default="ends of epochs")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        _option("Minutes between two checkpoints.", OUTPUT, show_default="ends of epochs"),
    ] = None,
    keep: Annotated[
        int, _option("Checkpoints that stay, the last ones.", OUTPUT)
    ] = Checkpoints.keep,
    resume: Annotated[
        bool, _option("Continue the interrupted run in OUT.", OUTPUT, "--resume")
    ] = False,
    overwrite: Annotated[
        bool, _option("Replace an earlier run in OUT.", OUTPUT, "--overwrite")
    ] = False,
    tensorboard: Annotated[
        bool, _option("Write event files in OUT/tensorboard too.", OUTPUT, "--tensorboard")
    ] = False,
    as_json: Annotated[
        bool, _option("Print one JSON object per line: epochs, then summary.", OUTPUT, "--json")
    ] = False,
    quiet: Annotated[bool, _option("Print nothing but errors.", OUTPUT, "--quiet")] = False,
    debug: Debug = False,
) -> None:
    """Train a network and write a run directory.

    The directory holds config.yaml, metrics.jsonl (a line per epoch),
    summary.json, checkpoints and plots. A checkpoint is stored after each epoch,
    when the options below say so, and before Ctrl-C or a termination signal
    stops the run; --resume then continues exactly.
    """
    checkpoints = Checkpoints(steps=checkpoint_steps, minutes=checkpoint_minutes, keep=keep)
    options = {field.name: context.params[field.name] for field in fields(RunConfig)}
    config = RunConfig(**{**options, "rank": parse_rank(rank)})
    out = out or f"runs/{model}-{data}-{method}-{seed}"
    log = TensorBoardLog(out) if tensorboard else nullcontext(Observer())
    with choose_screen(as_json=as_json, quiet=quiet) as screen, log as logged:
        try:
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
        except KeyboardInterrupt as error:
            raise RunError("stopped at once; what was not stored by then is lost") from error


@app.command(epilog=_examples_of("plan"))
def plan(
    model: Model,
    data: Sizes,
    batch_size: Batch = None,
    rank: Ranks = str(RunConfig.rank),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how each Tucker layer is applied, and its estimated cost against dense.

    The cheapest order of contractions in training and in inference, by the
    calibrated cost model; no data are read and nothing is trained.
    """
    info, network, ranks, batch_size = untrained(model, data, rank, batch_size)
    factorize_(network, rank=ranks)
    layers = plan_layers(network, (batch_size, *info.image_shape))
    if as_json:
        print(
            json.dumps({"model": model, "data": data, "batch_size": batch_size, "layers": layers})
        )
    else:
        Console().print(plan_table(layers))


@app.command(epilog=_examples_of("bench"))
def bench(
    model: Model,
    data: Sizes,
    batch_size: Batch = None,
    rank: Ranks = str(RunConfig.rank),
    threads: Annotated[
        int | None, _option("Threads of torch.", TRAINING, min=1, show_default="torch's")
    ] = None,
    rounds: Annotated[int, _option("Timed rounds; medians are shown.", TRAINING, min=1)] = 5,
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.", TRAINING)] = RunConfig.device,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a network in Tucker format against the dense one.

    Milliseconds of a training step, in which ranks are examined, and of
    inference, beside parameters and bytes; then of each layer. On random
    images; nothing is trained.
    """
    info, network, ranks, batch_size = untrained(model, data, rank, batch_size)
    if threads is not None:
        torch.set_num_threads(threads)
    place = torch_device(device)
    images = torch.randn(batch_size, *info.image_shape, device=place)
    labels = torch.randint(info.classes, (batch_size,), device=place)
    policy = RelativeTolerance(0.01)  # examines, and cuts nothing of a random start
    found = compare_networks(network.to(place), images, labels, ranks, policy, rounds)
    if as_json:
        print(json.dumps({"model": model, "data": data, "batch_size": batch_size, **found}))
    else:
        console = Console()
        console.print(network_times(found["networks"]))
        console.print(layer_times(found["layers"]))


@app.command(epilog=_examples_of("export"))
def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of train.")],
    format: Annotated[
        str,
        _option(
            f"{', '.join(FORMATS)}. plain: weights (safetensors) for those who have the code of "
            "the network.",
            OUTPUT,
        ),
    ],
    int8: Annotated[
        bool,
        _option(
            "Weights and activations of 8 bits, calibrated with training images.", OUTPUT, "--int8"
        ),
    ] = False,
    out: Annotated[
        str | None, _option("The file.", OUTPUT, show_default="RUN/export/MODEL...")
    ] = None,
    overwrite: Annotated[bool, _option("Replace the file.", OUTPUT, "--overwrite")] = False,
    data_dir: Annotated[
        str | None,
        _option(
            "Folder with NAME/train.parquet and NAME/test.parquet.",
            DATA,
            show_default="that of the run",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(
            "Test images to compare and time with.", DATA, min=1, show_default="that of the run"
        ),
    ] = None,
    rounds: Annotated[int, _option("Timed rounds; medians are shown.", DATA, min=1)] = 5,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the network of a finished run to a file that runs without tdlrt.

    Reads the file back and shows the parity error, the largest difference of
    its outputs from those of the trained network relative to the largest
    output, and its size and speed next to dense and to the Tucker network.
    """
    found = export_run(
        run_dir,
        out,
        format=format,
        int8=int8,
        data_dir=data_dir,
        batch_size=batch_size,
        rounds=rounds,
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps(found))
    else:
        Console().print(export_table(found))
        print("\n".join(closing_lines(found)))


for command in (compare, report, doctor):
    app.command(epilog=_examples_of(command.__name__))(command)
