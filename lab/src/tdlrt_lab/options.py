"""The options of a training run: their names, types and defaults, and nothing that checks them."""

from dataclasses import dataclass
from typing import Any, Literal

from tdlrt.nn.start import Modes
from tdlrt_lab.rank_option import RankOption

__all__ = ["DEPENDS", "RunOptions"]

DEPENDS: Any = None
"""Default of an option that depends on others; a finished `RunConfig` holds its value instead."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a training run, as they were given; `tdlrt_lab.config.RunConfig` checks them.

    Attributes:
        model: Name of the network, one of `tdlrt_lab.models.MODELS`.
        data: Name of the data set, one of `tdlrt_lab.data.DATA_SETS`.
        data_dir: Folder of the parquet files; None takes the data from the hub.
        train_images: Train on the first so many images; None for all.
        image_size: Height and width of the images of "imagefolder", in pixels; None is 64.
        validation: Images that are carved from the training set, at random by the seed: a share
            in (0, 1) or a count from 1. Accuracies are then theirs, and the test set is not
            looked at. None measures on the test set.
        augment: "none", or "standard": every training image shifted by up to 4 pixels each way
            and mirrored or not, at random.
        method: One of `tdlrt_lab.methods.METHODS` (docs/methods.md).
        tau: Relative truncation tolerance, in [0, 1); None is 0.1, or no tolerance with a budget.
        budget: Share in (0, 1] of the dense parameters of the factorised layers that these
            may have together, in place of a tolerance.
        ramp: How tau rises from 0, or the budget falls from at least 0.5, over the first three
            quarters of the steps before the ranks stay: "constant" (not at all), "linear" or
            "cubic". None is the value of `WITH_BUDGET` or `WITH_TAU`, as for spare, adapt_every,
            freeze_at and optimizer.
        spare: Share of a rank, or of the budget, that is kept beyond it until the ranks stay.
        rank: Ranks at the start: a share of each mode in (0, 1], an integer, or "full"; or a dict
            from layer-name pattern to one of these or to a list with one integer per mode (the
            first that matches; a layer that none matches stays dense).
        modes: Modes of a kernel with bases: "all", or "channels" for the two of its channels.
        init_scale: Norm of the initial weights relative to the network's own; "auto" leaves it
            to `tdlrt.factorize_`, and is 1 for "tucker".
        integrator: "parallel" (one gradient per step) or "bug" (two).
        adapt_every: Steps between two adaptations of the ranks.
        core_steps: Core steps per basis step of "bug".
        freeze_at: Share of the training after which the ranks stay, in [0, 1]; with 0 they stay
            what `rank` says.
        dense_until: Share of the training, in (0, 1), after which a method that starts dense has
            its size.
        epochs: Passes over the training set; None is the default of the data set.
        batch_size: Images per step; None is the default of the data set.
        optimizer: "sgd", "adam" or "adamw", of all parameters and for every method.
        lr: Largest learning rate; None is the default of the method and the optimiser.
        warmup: Share of the training, in [0, 1), in which the learning rate rises along a line;
            the cosine takes the rest.
        momentum: Momentum of SGD, in [0, 1); the other optimisers have none.
        weight_decay: As in torch; with "tdlrt" it acts on the core of a Tucker layer; not negative.
        spectral_penalty: Weight of `tdlrt.spectral_penalty` in the loss once the ranks stay; for
            "tdlrt" and "matrix_dlrt" alone, not negative.
        skip_nonfinite: How many steps in a row may be skipped, and counted, because the loss or a
            gradient is NaN or infinite; one more ends the run, and so does the first with 0.
        seed: Seed of the initial weights and of the order of the images.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    model: str
    data: str
    data_dir: str | None = None
    train_images: int | None = None
    image_size: int | None = None
    validation: float | int | None = None
    augment: str = "none"
    method: str = "tdlrt"
    tau: float | None = DEPENDS
    budget: float | None = None
    ramp: str = DEPENDS
    spare: float = DEPENDS
    rank: RankOption = 0.5
    modes: Modes = "all"
    init_scale: float | Literal["auto"] = "auto"
    integrator: str = "parallel"
    adapt_every: int = DEPENDS
    core_steps: int = 1
    freeze_at: float = DEPENDS
    dense_until: float = 0.6
    epochs: int = DEPENDS
    batch_size: int = DEPENDS
    optimizer: str = DEPENDS
    lr: float = DEPENDS
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    spectral_penalty: float = 0.0
    skip_nonfinite: int = 0
    seed: int = 0
    device: str = "auto"
