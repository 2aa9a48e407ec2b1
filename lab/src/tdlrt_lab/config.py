"""The configuration of a training run: ranges of its options, and which of them go together."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, get_args

import torch

from tdlrt.errors import ConfigError, RankError
from tdlrt.nn.start import Modes
from tdlrt.ranks import BudgetRecipe
from tdlrt_lab.data import DATA_SETS
from tdlrt_lab.methods import (
    DEFAULT_TAU,
    INTEGRATORS,
    METHODS,
    OPTIMIZER_OPTIONS,
    OPTIMIZERS,
    RAMPS,
    Method,
)
from tdlrt_lab.models import MODELS, reads_text
from tdlrt_lab.names import pick
from tdlrt_lab.options import RunOptions
from tdlrt_lab.rank_option import check_rank
from tdlrt_lab.reshape_option import is_reshape

__all__ = [
    "AUGMENTATIONS",
    "CHOICES",
    "LEARNING_RATES",
    "PRECISIONS",
    "WITH_BUDGET",
    "WITH_TAU",
    "RunConfig",
    "torch_device",
]

LEARNING_RATES = {name: method.learning_rates for name, method in METHODS.items()}
"""Default learning rates by method and optimiser."""

WITH_TAU = {
    "optimizer": "sgd",
    "ramp": "constant",
    "spare": 0.0,
    "adapt_every": 1,
    "freeze_at": 0.5,
}
WITH_BUDGET = {
    "optimizer": "adam",
    "ramp": "linear",
    "spare": BudgetRecipe.spare,
    "adapt_every": BudgetRecipe.adapt_every,
    "freeze_at": BudgetRecipe.freeze_at,
}
"""Defaults of a run without and with a budget (docs/algorithm.md)."""

AUGMENTATIONS = ("none", "standard")

PRECISIONS = ("float32", "bfloat16")

RANK_OPTIONS = ("tau", "budget", "budget_start", "spare")

CHOICES: dict[str, Mapping[str, Any]] = {
    "model": MODELS,
    "data": DATA_SETS,
    "method": METHODS,
    "modes": dict.fromkeys(get_args(Modes)),
    "integrator": INTEGRATORS,
    "ramp": RAMPS,
    "optimizer": OPTIMIZERS,
    "augment": dict.fromkeys(AUGMENTATIONS),
    "precision": dict.fromkeys(PRECISIONS),
}
"""The accepted names of each option that takes a name."""


class Users(NamedTuple):
    """Which options are used, by the value of another option.

    Attributes:
        chosen: Returns the value of the deciding option in a configuration.
        options: The options used with each value of the deciding option.
    """

    chosen: Callable[[RunOptions], str]
    options: Mapping[str, Collection[str]]


USERS = {
    "method": Users(
        lambda config: config.method, {name: method.options for name, method in METHODS.items()}
    ),
    "integrator": Users(lambda config: config.integrator, INTEGRATORS),
    "optimizer": Users(lambda config: config.optimizer, OPTIMIZER_OPTIONS),
    "data": Users(
        lambda config: config.data, {name: info.options for name, info in DATA_SETS.items()}
    ),
    "freeze_at": Users(
        lambda config: "above 0" if config.freeze_at > 0 else "0",
        {"0": (), "above 0": ("tau", "budget", "budget_start", "ramp", "spare", "adapt_every")},
    ),
    "budget": Users(
        lambda config: "none" if config.budget is None else "given",
        {"none": (), "given": ("budget_start",)},
    ),
}
"""Options that decide which others are used; errors name the first that excludes an option."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunOptions):
    """Options of a training run, checked and completed on construction.

    >>> RunConfig(model="lenet5", data="mnist").lr
    0.05
    """

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other options, then check every range."""
        info = pick("data set", self.data, DATA_SETS)
        self._default({"optimizer": info.optimizer})
        self._default(WITH_TAU if self.budget is None else WITH_BUDGET)
        for name, table in CHOICES.items():
            pick("data set" if name == "data" else name, getattr(self, name), table)
        method = METHODS[self.method]
        if reads_text(self.model) != info.is_text:
            kinds = {name for name, one in DATA_SETS.items() if one.is_text != info.is_text}
            raise ConfigError(
                f"model {self.model!r} with data {self.data!r}: expected data that the network can "
                f"read; choose one of {', '.join(sorted(kinds))}, or another model"
            )
        if info.is_text and not method.for_text:
            raise ConfigError(
                f"method {self.method!r} with data {self.data!r}: expected a method that can train "
                "networks of text; choose another one"
            )
        if self.tau is not None and self.budget is not None:
            raise ConfigError(
                f"tau {self.tau!r} and budget {self.budget!r}: expected one of them; each "
                "determines the ranks"
            )
        if self.spectral_penalty and "spectral_penalty" not in method.options:
            raise ConfigError(
                f"spectral_penalty {self.spectral_penalty!r}: expected 0 for method "
                f"{self.method!r}, which has no orthonormal bases; leave it out"
            )
        self._default({"epochs": info.epochs, "batch_size": info.batch_size})
        self._default({"lr": method.learning_rates[self.optimizer]})
        self._default({"tau": DEFAULT_TAU if self.budget is None else None})
        object.__setattr__(self, "rank", check_rank(self.rank))
        for name, (holds, expected) in RULES.items():
            value = getattr(self, name)
            if not holds(value):
                error = RankError if name in RANK_OPTIONS else ConfigError
                raise error(f"{name} {value!r}: expected {expected}")
        self._check_use(method)
        method.check(self)
        self.torch_device()

    @classmethod
    def given(cls, **options: Any) -> "RunConfig":
        """Make a configuration from options typed by a user, each of which must be used.

        The constructor is less strict, because stored configurations name all options: it accepts
        unused options at their defaults, and any compression option in a dense run.

        Raises:
            ConfigError: An option is not used, or the constructor refuses it.
        """
        config = cls(**options)
        for name in options:
            config._check_used(name, tuple(USERS))
        return config

    def used(self, name: str) -> bool:
        """Whether the run depends on an option."""
        return not any(self._other_users(name, decider) for decider in USERS)

    def _check_use(self, method: Method) -> None:
        """Refuse options that are not used and not at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        defaults |= WITH_TAU if self.budget is None else WITH_BUDGET
        defaults["tau"] = DEFAULT_TAU if self.budget is None else None
        deciders = (
            ("method", "budget", "integrator", "optimizer") if method.options else ("optimizer",)
        )
        for name, default in defaults.items():
            if getattr(self, name) != default:
                # Where data lie is shared by the rows of a sweep, whether they read files or not.
                own = deciders if name == "data_dir" else (*deciders, "data")
                self._check_used(name, own)

    def _check_used(self, name: str, deciders: Collection[str]) -> None:
        for decider in deciders:
            users = self._other_users(name, decider)
            if users:
                chosen = USERS[decider].chosen(self)
                raise ConfigError(
                    f"{name} {getattr(self, name)!r}: not used with {decider} {chosen}, only "
                    f"with {decider} {', '.join(users)}; leave it out"
                )

    def _other_users(self, name: str, decider: str) -> list[str]:
        """The values of the deciding option that use an option; empty if the chosen one does."""
        chosen, options = USERS[decider]
        users = [value for value, used in options.items() if name in used]
        return [] if chosen(self) in users else users

    def _default(self, values: Mapping[str, Any]) -> None:
        """Set the options that are None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def torch_device(self) -> torch.device:
        """The device of the run.

        Raises:
            ConfigError: The device is unknown or not available.
        """
        return torch_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain types."""
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of options that this run uses and that differ in `other`, except `data_dir`."""
        mine = self.to_dict()
        # An option added after `other` was stored is taken to have had its default.
        theirs = {field.name: field.default for field in fields(self)} | other
        return [
            name
            for name in mine
            if name != "data_dir" and mine[name] != theirs[name] and self.used(name)
        ]


def torch_device(name: str) -> torch.device:
    """The device with a name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: The device is unknown or not available.
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


def _is_share_above_zero(value: float) -> bool:
    return 0 < value <= 1


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
    "budget": (_or_none(_is_share_above_zero), "a share in (0, 1]"),
    "budget_start": (_is_share_above_zero, "a share in (0, 1]"),
    "spare": (_is_not_negative, "a share of at least 0"),
    "reshape": (_or_none(is_reshape), "LAYER=ROWS:COLUMNS,..., such as fc1=20x25:50x4x4"),
    "init_scale": (_is_scale, "a positive number or 'auto'"),
    "adapt_every": (_is_count, "at least 1 step"),
    "core_steps": (_is_count, "at least 1 step"),
    "basis_every": (_is_count, "at least 1 step"),
    "freeze_at": (_is_share, "a share of the training in [0, 1]"),
    "epochs": (_is_count, "at least 1 epoch"),
    "batch_size": (_is_count, "at least 1 image"),
    "lr": (_is_positive, "a positive number"),
    "validation": (_or_none(_is_part), "a share in (0, 1), or a number of at least 1"),
    "dense_until": (lambda value: 0 < value < 1, "a share of the training in (0, 1)"),
    "warmup": (_is_share_below_one, "a share of the training in [0, 1)"),
    "momentum": (_is_share_below_one, "a number in [0, 1)"),
    "spectral_penalty": (_is_not_negative, "a number of at least 0"),
    "weight_decay": (_is_not_negative, "a number of at least 0"),
    "skip_nonfinite": (lambda value: value >= 0, "a number of steps, at least 0"),
    "seed": (lambda value: 0 <= value < 2**32, "an integer from 0 to 2**32 - 1"),
}
