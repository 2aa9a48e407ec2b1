"""What a training run is: every option, its default and its range."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from tdlrt.errors import ConfigError, RankError
from tdlrt.experiments.data import DATA_SETS
from tdlrt.experiments.methods import DEFAULT_TAU, METHODS, OPTIMIZERS, RAMPS, Method
from tdlrt.experiments.models import MODELS
from tdlrt.experiments.names import pick
from tdlrt.experiments.rank_option import RankOption, check_rank
from tdlrt.nn.start import Modes

__all__ = [
    "AUGMENTATIONS",
    "DEFAULT_TAU",
    "DEPENDS",
    "LEARNING_RATES",
    "OPTIMIZERS",
    "RAMPS",
    "WITH_BUDGET",
    "WITH_TAU",
    "ConfigError",
    "RunConfig",
    "torch_device",
]

LEARNING_RATES = {name: method.learning_rates for name, method in METHODS.items()}
"""Methods, and the learning rate that each uses with an optimiser unless told otherwise."""

WITH_TAU = {
    "optimizer": "sgd",
    "ramp": "constant",
    "spare": 0.0,
    "adapt_every": 1,
    "freeze_at": 0.5,
}
WITH_BUDGET = {
    "optimizer": "adam",
    "ramp": "cubic",
    "spare": 0.25,
    "adapt_every": 10,
    "freeze_at": 0.2,
}
"""The recipe of a run that is given a budget, and of one that is not (docs/algorithm.md)."""

AUGMENTATIONS = ("none", "standard")

DEPENDS: Any = None
"""Default of an option that depends on others; a finished `RunConfig` holds its value instead."""

METHOD_OPTIONS = frozenset[str]().union(*(method.options for method in METHODS.values()))
"""Options that some methods take and others do not."""

RANK_OPTIONS = ("tau", "budget", "spare")

NAMED: dict[str, Mapping[str, object]] = {
    "modes": dict.fromkeys(get_args(Modes)),
    "integrator": dict.fromkeys(("parallel", "bug")),
    "ramp": RAMPS,
    "optimizer": OPTIMIZERS,
    "augment": dict.fromkeys(AUGMENTATIONS),
}
"""Options that take a name, and the names that each takes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of a training run, checked on construction.

    Attributes:
        model: Name of the network, one of `tdlrt.experiments.models.MODELS`.
        data: Name of the data set, one of `tdlrt.experiments.data.DATA_SETS`.
        data_dir: Folder of the parquet files; None takes the data from the hub.
        train_images: Train on the first so many images; None for all.
        image_size: Height and width of the images of "imagefolder", in pixels; None is 64.
        validation: Images that are carved from the training set, at random by the seed: a share
            in (0, 1) or a count from 1. Accuracies are then theirs, and the test set is not
            looked at. None measures on the test set.
        augment: "none", or "standard": every training image shifted by up to 4 pixels each way
            and mirrored or not, at random.
        method: One of `tdlrt.experiments.methods.METHODS` (docs/methods.md).
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

    >>> RunConfig(model="lenet5", data="mnist").lr
    0.05
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

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other options, then check every range."""
        pick("model", self.model, MODELS)
        info = pick("data set", self.data, DATA_SETS)
        if self.image_size is not None and not info.folder:
            raise ConfigError(
                f"image_size {self.image_size!r}: expected None for data set {self.data!r}, whose "
                "images have one size; leave it out"
            )
        method = pick("method", self.method, METHODS)
        if self.tau is not None and self.budget is not None:
            raise ConfigError(
                f"tau {self.tau!r} and budget {self.budget!r}: expected one of them; both say how "
                "the ranks are chosen"
            )
        if self.spectral_penalty and "spectral_penalty" not in method.options:
            raise ConfigError(
                f"spectral_penalty {self.spectral_penalty!r}: expected 0 for method "
                f"{self.method!r}; it needs the orthonormal bases of 'tdlrt'"
            )
        self._default(WITH_TAU if self.budget is None else WITH_BUDGET)
        for name, table in NAMED.items():
            pick(name, getattr(self, name), table)
        self._default({"epochs": info.epochs, "batch_size": info.batch_size})
        self._default({"lr": method.learning_rates[self.optimizer]})
        self._default({"tau": DEFAULT_TAU if self.budget is None else None})
        object.__setattr__(self, "rank", check_rank(self.rank))
        for name, (holds, expected) in RULES.items():
            value = getattr(self, name)
            if not holds(value):
                error = RankError if name in RANK_OPTIONS else ConfigError
                raise error(f"{name} {value!r}: expected {expected}")
        self._check_method(method)
        self.torch_device()

    def _check_method(self, method: Method) -> None:
        """Refuse options that the method has no use for, unless they are at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        defaults |= WITH_TAU if self.budget is None else WITH_BUDGET
        defaults["tau"] = DEFAULT_TAU if self.budget is None else None
        for name in METHOD_OPTIONS - method.options if method.options else ():
            value = getattr(self, name)
            if value != defaults[name]:
                raise ConfigError(
                    f"{name} {value!r}: expected its default {defaults[name]!r} for method "
                    f"{self.method!r}, which takes {', '.join(sorted(method.options))}"
                )
        method.check(self)

    def _default(self, values: Mapping[str, Any]) -> None:
        """Set options that were left open."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def torch_device(self) -> torch.device:
        """The device the run computes on.

        Raises:
            ConfigError: The device is unknown or not present.
        """
        return torch_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain types."""
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of the options that differ from `other`, save for where the data lie."""
        mine = self.to_dict()
        # An option that is newer than `other` had its default then.
        theirs = {field.name: field.default for field in fields(self)} | other
        return [name for name in mine if name != "data_dir" and mine[name] != theirs[name]]


def torch_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: The device is unknown or not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r}: not available on this machine; expected auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_share_below_one(value: float) -> bool:
    return 0 <= value < 1


def _is_count(value: int) -> bool:
    return value >= 1


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_scale(value: float | str) -> bool:
    return value == "auto" if isinstance(value, str) else _is_positive(value)


def _is_part(value: object) -> bool:
    if not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value < 1


def _is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _is_not_negative(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train_images": (_or_none(_is_count), "at least 1 image, or None for all"),
    "image_size": (_or_none(lambda value: value >= 4), "at least 4 pixels"),
    "tau": (_or_none(_is_share_below_one), "a tolerance in [0, 1)"),
    "budget": (_or_none(lambda value: 0 < value <= 1), "a share in (0, 1]"),
    "spare": (_is_not_negative, "a share from 0"),
    "init_scale": (_is_scale, "a positive number or 'auto'"),
    "adapt_every": (_is_count, "at least 1 step"),
    "core_steps": (_is_count, "at least 1 step"),
    "freeze_at": (_is_share, "a share of the training in [0, 1]"),
    "epochs": (_is_count, "at least 1 epoch"),
    "batch_size": (_is_count, "at least 1 image"),
    "lr": (_is_positive, "a positive number"),
    "validation": (_or_none(_is_part), "a share in (0, 1), or a count from 1"),
    "dense_until": (lambda value: 0 < value < 1, "a share of the training in (0, 1)"),
    "warmup": (_is_share_below_one, "a share of the training in [0, 1)"),
    "momentum": (_is_share_below_one, "a number in [0, 1)"),
    "spectral_penalty": (_is_not_negative, "a number from 0"),
    "weight_decay": (_is_not_negative, "a number from 0"),
    "skip_nonfinite": (lambda value: value >= 0, "a number of steps from 0"),
    "seed": (lambda value: 0 <= value < 2**32, "an integer from 0 to 2**32 - 1"),
}
