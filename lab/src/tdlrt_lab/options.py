"""The options of a training run: the name, type, default and help of each, and no checks.

An option is written here and nowhere else: `tdlrt train` takes its options from these fields.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from tdlrt.nn.start import Modes
from tdlrt_lab.rank_option import RankOption, number_or_word, parse_rank

__all__ = ["DATA", "DEPENDS", "METHOD", "TRAINING", "Option", "RunOptions"]

DEPENDS: Any = None
"""Default of an option that depends on others; a finished `RunConfig` holds its value instead."""

DATA, METHOD, TRAINING = "Data", "Method", "Training"


class Option(NamedTuple):
    """How an option is shown on a command line, and how it is read there.

    Attributes:
        group: The group of options under which the help lists it.
        help: What it does; "{choices}" stands for the names that it takes.
        unset: What the help says in place of the default None.
        metavar: What the help says in place of the type.
        read: Turns the text on the command line into the value, where the type does not say how.
    """

    group: str
    help: str
    unset: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a training run, as they were given; `tdlrt_lab.config.RunConfig` checks them.

    An option at `DEPENDS` takes the value of the data set, of the method, or of
    `tdlrt_lab.config.WITH_BUDGET` and `WITH_TAU`, by whether there is a budget.
    """

    model: Annotated[str, Option(DATA, "{choices}.", metavar="MODEL")]
    data: Annotated[str, Option(DATA, "Data set: {choices}.")]
    data_dir: Annotated[
        str | None,
        Option(
            DATA,
            "Folder with NAME/{{train,test}}.parquet; for imagefolder with {{train,test}}/CLASS/*.",
            unset="the hub",
        ),
    ] = None
    train_images: Annotated[
        int | None, Option(DATA, "Train on the first so many images.", unset="all")
    ] = None
    image_size: Annotated[
        int | None,
        Option(DATA, "Height and width in pixels of the images of imagefolder.", unset="64"),
    ] = None
    validation: Annotated[
        float | int | None,
        Option(
            DATA,
            "Share or number of training images that are held out, at random by the seed, and "
            "measured in place of the test set.",
            unset="none",
            metavar="PART",
            read=number_or_word,
        ),
    ] = None
    augment: Annotated[
        str,
        Option(
            DATA,
            "none, or standard: every training image is shifted by up to 4 pixels each way and "
            "mirrored or not, at random.",
        ),
    ] = "none"
    method: Annotated[str, Option(METHOD, "{choices}.")] = "tdlrt"
    tau: Annotated[
        float | None, Option(METHOD, "Truncation tolerance, relative to the weight, in [0, 1).")
    ] = DEPENDS
    budget: Annotated[
        float | None,
        Option(
            METHOD,
            "Share in (0, 1] of the dense parameters of the factorised layers to keep, instead of "
            "--tau.",
        ),
    ] = None
    ramp: Annotated[
        str,
        Option(
            METHOD,
            "How tau rises from 0, or the budget falls from at least 0.5, over the first three "
            "quarters of the steps before the ranks stay: {choices}.",
        ),
    ] = DEPENDS
    spare: Annotated[
        float,
        Option(METHOD, "Share of a rank, or of the budget, kept beyond it until the ranks stay."),
    ] = DEPENDS
    rank: Annotated[
        RankOption,
        Option(
            METHOD,
            "Ranks at the start: a share of each mode (0.5), an integer, or full; or by layer, "
            "such as conv2=16x8x5x5,fc1=12,*=0.5 (the first pattern that matches counts; a layer "
            "that no pattern matches stays dense).",
            metavar="RANK",
            read=parse_rank,
        ),
    ] = 0.5
    modes: Annotated[
        Modes, Option(METHOD, "Modes of a kernel with bases: all, or channels for its two.")
    ] = "all"
    reshape: Annotated[
        str | None,
        Option(
            METHOD,
            "Linear layers whose matrix is a tensor, with the modes of its rows and columns, such "
            "as fc1=20x25:50x4x4 or fc1=500:50x4x4.",
            unset="none",
            metavar="MODES",
        ),
    ] = None
    init_scale: Annotated[
        float | Literal["auto"],
        Option(
            METHOD,
            "Norm of the initial weights relative to the network's own.",
            metavar="SCALE",
            read=number_or_word,
        ),
    ] = "auto"
    integrator: Annotated[str, Option(METHOD, "parallel (one gradient per step) or bug (two).")] = (
        "parallel"
    )
    adapt_every: Annotated[int, Option(METHOD, "Steps between two changes of the ranks.")] = DEPENDS
    core_steps: Annotated[int, Option(METHOD, "Core steps per basis step of bug.")] = 1
    basis_every: Annotated[
        int,
        Option(METHOD, "Bases move in one of so many steps of parallel, and cores in every one."),
    ] = 1
    freeze_at: Annotated[
        float,
        Option(
            METHOD,
            "Share of the training, in [0, 1], after which the ranks stay; with 0 they stay what "
            "--rank says.",
        ),
    ] = DEPENDS
    dense_until: Annotated[
        float,
        Option(
            METHOD,
            "Share of the training after which a method that starts dense has its size.",
        ),
    ] = 0.6
    epochs: Annotated[int, Option(TRAINING, "Passes over the training set.")] = DEPENDS
    batch_size: Annotated[int, Option(TRAINING, "Images per step.")] = DEPENDS
    optimizer: Annotated[str, Option(TRAINING, "{choices}.")] = DEPENDS
    lr: Annotated[float, Option(TRAINING, "Learning rate, falling to 0 along a cosine.")] = DEPENDS
    warmup: Annotated[
        float,
        Option(
            TRAINING,
            "Share of the training in which the learning rate rises along a line; the cosine "
            "takes the rest.",
        ),
    ] = 0.0
    momentum: Annotated[
        float, Option(TRAINING, "Momentum of sgd, in [0, 1); the other optimizers have none.")
    ] = 0.9
    weight_decay: Annotated[
        float,
        Option(TRAINING, "As in torch; with tdlrt it acts on the cores of Tucker layers alone."),
    ] = 0.0
    spectral_penalty: Annotated[
        float,
        Option(
            TRAINING,
            "Weight in the loss of the spread of the cores' singular values, once the ranks stay "
            "(tdlrt and matrix_dlrt).",
        ),
    ] = 0.0
    skip_nonfinite: Annotated[
        int,
        Option(
            TRAINING,
            "Steps in a row that may be skipped, and are counted, because the loss or a gradient "
            "is not finite.",
        ),
    ] = 0
    seed: Annotated[
        int, Option(TRAINING, "Seed of the initial weights and of the order of the images.")
    ] = 0
    device: Annotated[str, Option(TRAINING, "auto, cpu, cuda or cuda:N.")] = "auto"
