"""What a training run is: every option, its default and its range."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from tdlrt.errors import RankError, TdlrtError
from tdlrt.experiments.data import DATA_SETS
from tdlrt.experiments.models import MODELS
from tdlrt.experiments.names import pick

__all__ = ["DEPENDS", "LEARNING_RATES", "ConfigError", "RunConfig"]

LEARNING_RATES = {"tdlrt": 0.05, "dense": 0.02}
"""Methods and the learning rate each uses unless told otherwise."""

DEPENDS: Any = None
"""Default of an option that depends on others; a finished `RunConfig` holds its value instead."""

INTEGRATORS = {name: name for name in ("parallel", "bug")}


class ConfigError(TdlrtError, ValueError):
    """An option of a run is outside its range, or two options contradict each other."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of a training run, checked on construction.

    Attributes:
        model: Name of the network, one of `tdlrt.experiments.models.MODELS`.
        data: Name of the data set, one of `tdlrt.experiments.data.DATA_SETS`.
        data_dir: Folder of the parquet files; None takes the data from the hub.
        method: "tdlrt" trains in Tucker format, "dense" the network as it is.
        tau: Relative truncation tolerance, in [0, 1).
        rank: Ranks at the start: a share of each mode in (0, 1], an integer, or "full".
        init_scale: Norm of the initial weights relative to the network's own; "auto" leaves it
            to `tdlrt.factorize_`.
        integrator: "parallel" (one gradient per step) or "bug" (two).
        adapt_every: Steps between two adaptations of the ranks.
        core_steps: Core steps per basis step of "bug".
        freeze_at: Share of the training after which the ranks stay, in [0, 1].
        epochs: Passes over the training set; None is the default of the data set.
        batch_size: Images per step; None is the default of the data set.
        lr: Learning rate of the first step; None is the default of the method.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: As in torch's SGD; on a Tucker layer it acts on the core; not negative.
        seed: Seed of the initial weights and of the order of the images.
        device: "auto", "cpu", "cuda" or "cuda:N".

    >>> RunConfig(model="lenet5", data="mnist").lr
    0.05
    """

    model: str
    data: str
    data_dir: str | None = None
    method: str = "tdlrt"
    tau: float = 0.1
    rank: float | int | Literal["full"] = 0.5
    init_scale: float | Literal["auto"] = "auto"
    integrator: str = "parallel"
    adapt_every: int = 1
    core_steps: int = 1
    freeze_at: float = 0.5
    epochs: int = DEPENDS
    batch_size: int = DEPENDS
    lr: float = DEPENDS
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other options, then check every range."""
        pick("model", self.model, MODELS)
        info = pick("data set", self.data, DATA_SETS)
        lr = pick("method", self.method, LEARNING_RATES)
        pick("integrator", self.integrator, INTEGRATORS)
        dependent = {"epochs": info.epochs, "batch_size": info.batch_size, "lr": lr}
        for name, default in dependent.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, (holds, expected) in RULES.items():
            value = getattr(self, name)
            if not holds(value):
                error = RankError if name in ("tau", "rank") else ConfigError
                raise error(f"{name} {value!r}: expected {expected}")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device the run computes on.

        Raises:
            ConfigError: The device is unknown or not present.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {self.device!r}: not available on this machine; "
                "expected auto, cpu, cuda or cuda:N"
            ) from error
        return device

    def to_dict(self) -> dict[str, Any]:
        """All options as plain types."""
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of the options that differ from `other`, save for where the data lie."""
        mine = self.to_dict()
        names = [field.name for field in fields(self) if field.name != "data_dir"]
        return [name for name in names if mine[name] != other.get(name)]


def _is_rank(value: float | int | str) -> bool:
    if isinstance(value, str):
        return value == "full"
    return value >= 1 if isinstance(value, int) else 0 < value <= 1


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_share_below_one(value: float) -> bool:
    return 0 <= value < 1


def _is_count(value: int) -> bool:
    return value >= 1


def _is_scale(value: float | str) -> bool:
    return value == "auto" if isinstance(value, str) else _is_positive(value)


def _is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _is_not_negative(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tau": (_is_share_below_one, "a tolerance in [0, 1)"),
    "rank": (_is_rank, "a share in (0, 1], an integer from 1, or 'full'"),
    "init_scale": (_is_scale, "a positive number or 'auto'"),
    "adapt_every": (_is_count, "at least 1 step"),
    "core_steps": (_is_count, "at least 1 step"),
    "freeze_at": (_is_share, "a share of the training in [0, 1]"),
    "epochs": (_is_count, "at least 1 epoch"),
    "batch_size": (_is_count, "at least 1 image"),
    "lr": (_is_positive, "a positive number"),
    "momentum": (_is_share_below_one, "a number in [0, 1)"),
    "weight_decay": (_is_not_negative, "a number from 0"),
    "seed": (lambda value: 0 <= value < 2**32, "an integer from 0 to 2**32 - 1"),
}
