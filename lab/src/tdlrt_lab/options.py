"""The options of a training run: name, type, default and help text of each, without checks.

This is the only definition of an option: `tdlrt train` takes its options from these fields.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from tdlrt.nn.start import Modes
from tdlrt.ranks import BudgetRecipe
from tdlrt_lab.rank_option import RankOption, number_or_word, parse_rank

__all__ = ["DATA", "DEPENDS", "METHOD", "TRAINING", "Option", "RunOptions"]

DEPENDS: Any = None
"""Default of an option that depends on others; `RunConfig` replaces it by a value."""

DATA, METHOD, TRAINING = "Data", "Method", "Training"


class Option(NamedTuple):
    """How the command line shows and reads an option.

    Attributes:
        group: Group of the option in the help.
        help: Help text; "{choices}" is replaced by the accepted names.
        unset: Text that the help shows for the default None.
        metavar: Text that the help shows for the type.
        read: Converts the text on the command line to the value, if the type alone cannot.
    """

    group: str
    help: str
    unset: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a training run as given; `tdlrt_lab.config.RunConfig` checks them.

    The default of an option at `DEPENDS` is set by the data set, by the method, or by
    `tdlrt_lab.config.WITH_BUDGET` with a budget and `WITH_TAU` without.
    """

    model: Annotated[str, Option(DATA, "Network: {choices}.", metavar="MODEL")]
    data: Annotated[str, Option(DATA, "Data set: {choices}.")]
    data_dir: Annotated[
        str | None,
        Option(
            DATA,
            "Folder with NAME/{{train,test}}.parquet, or {{train,test}}/CLASS/* for imagefolder.",
            unset="the hub",
        ),
    ] = None
    train_images: Annotated[
        int | None, Option(DATA, "Number of training images, from the first.", unset="all")
    ] = None
    image_size: Annotated[
        int | None,
        Option(DATA, "Height and width in pixels of imagefolder's images.", unset="64"),
    ] = None
    validation: Annotated[
        float | int | None,
        Option(
            DATA,
            "Share or number of training images, or files of text, to hold out at random and "
            "measure in place of the test set.",
            unset="none",
            metavar="PART",
            read=number_or_word,
        ),
    ] = None
    augment: Annotated[
        str,
        Option(
            DATA,
            "Augmentation of the training images: none, or standard (random shifts by up to 4 "
            "pixels and random horizontal flips).",
        ),
    ] = "none"
    method: Annotated[str, Option(METHOD, "Method: {choices}.")] = "tdlrt"
    tau: Annotated[
        float | None,
        Option(METHOD, "Truncation tolerance in [0, 1), relative to the norm of a weight."),
    ] = DEPENDS
    budget: Annotated[
        float | None,
        Option(
            METHOD,
            "Share in (0, 1] of the factorised layers' dense parameters to keep, instead of --tau.",
        ),
    ] = None
    ramp: Annotated[
        str,
        Option(
            METHOD,
            "Schedule by which tau rises from 0 over the first 60 % of the steps before "
            "--freeze-at, or the budget falls from --budget-start over the last 60 %: {choices}.",
        ),
    ] = DEPENDS
    budget_start: Annotated[
        float,
        Option(METHOD, "Share in (0, 1] that the network may have before the budget falls."),
    ] = BudgetRecipe.start
    spare: Annotated[
        float,
        Option(METHOD, "Extra share of each rank, or of the budget, kept until --freeze-at."),
    ] = DEPENDS
    rank: Annotated[
        RankOption,
        Option(
            METHOD,
            "Initial ranks: a share of each mode (0.5), an integer, or full; or ranks by layer, "
            "such as conv2=16x8x5x5,fc1=12,*=0.5 (the first matching pattern applies; layers "
            "without a match stay dense).",
            metavar="RANK",
            read=parse_rank,
        ),
    ] = 0.5
    modes: Annotated[
        Modes, Option(METHOD, "Kernel modes to factorise: all, or channels (output and input).")
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
            "Norm of the initial weights relative to the dense network's, or auto.",
            metavar="SCALE",
            read=number_or_word,
        ),
    ] = "auto"
    integrator: Annotated[
        str, Option(METHOD, "Integrator: parallel (one gradient per step) or bug (two).")
    ] = "parallel"
    adapt_every: Annotated[int, Option(METHOD, "Steps between rank changes.")] = DEPENDS
    core_steps: Annotated[int, Option(METHOD, "Core steps per basis step of integrator bug.")] = 1
    basis_every: Annotated[
        int,
        Option(METHOD, "Steps per basis step of integrator parallel; cores move in every step."),
    ] = 1
    freeze_at: Annotated[
        float,
        Option(
            METHOD,
            "Share of the training, in [0, 1], after which the ranks are fixed; 0 keeps those of "
            "--rank.",
        ),
    ] = DEPENDS
    dense_until: Annotated[
        float,
        Option(
            METHOD,
            "Share of the training, in (0, 1), after which a method that starts dense has reached "
            "its final size.",
        ),
    ] = 0.6
    epochs: Annotated[
        int, Option(TRAINING, "Passes over the training set; of text, each is 1,024 windows.")
    ] = DEPENDS
    batch_size: Annotated[int, Option(TRAINING, "Images, or windows of text, per step.")] = DEPENDS
    optimizer: Annotated[str, Option(TRAINING, "Optimizer: {choices}.")] = DEPENDS
    lr: Annotated[float, Option(TRAINING, "Learning rate, decayed to 0 by a cosine.")] = DEPENDS
    warmup: Annotated[
        float,
        Option(
            TRAINING,
            "Share of the training, in [0, 1), of linear warm-up; the cosine decay follows.",
        ),
    ] = 0.0
    momentum: Annotated[float, Option(TRAINING, "Momentum of sgd, in [0, 1).")] = 0.9
    weight_decay: Annotated[
        float,
        Option(TRAINING, "Weight decay; in Tucker layers trained by tdlrt, of the cores only."),
    ] = 0.0
    spectral_penalty: Annotated[
        float,
        Option(
            TRAINING,
            "Weight of the penalty on the spread of the cores' singular values, added to the loss "
            "after --freeze-at (tdlrt and matrix_dlrt).",
        ),
    ] = 0.0
    skip_nonfinite: Annotated[
        int,
        Option(
            TRAINING,
            "Largest number of consecutive steps to skip because the loss or a gradient is not "
            "finite.",
        ),
    ] = 0
    precision: Annotated[
        str,
        Option(
            TRAINING,
            "Type of the forward and backward pass: float32, or bfloat16 by autocast (weights, "
            "optimizer state and the last epoch's evaluation stay in float32).",
        ),
    ] = "float32"
    seed: Annotated[int, Option(TRAINING, "Seed of all random numbers of the run.")] = 0
    device: Annotated[str, Option(TRAINING, "Device: auto, cpu, cuda or cuda:N.")] = "auto"
