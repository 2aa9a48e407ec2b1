"""Arguments of `TDLRT`: checked, and made what the rest works with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Self, TypeVar, overload

import torch
from torch import Tensor

from tdlrt.errors import RankError
from tdlrt.ranks import (
    DEFAULT_TAU,
    BudgetRecipe,
    ByName,
    ParameterBudget,
    RankPolicy,
    RelativeTolerance,
)
from tdlrt.ranks.bounds import check_number
from tdlrt.scalars import as_float, as_int, as_number

__all__ = [
    "Adapting",
    "Argument",
    "check_count",
    "check_options",
    "check_rates",
    "resolve_adapting",
    "resolve_policy",
    "without_numpy",
]

T = TypeVar("T")


class Argument(Generic[T]):
    """An argument of a constructor that is read later. Setting it again raises an error.

    The value is in the instance, under the name of the argument.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance._arguments[self._name]

    def __set__(self, instance: Any, value: T) -> None:
        raise AttributeError(
            f"{self._name}: got {value!r}, but it is an argument of {type(instance).__name__} that "
            f"is read at the beginning; construct a new one with {self._name}={value!r}"
        )


class Adapting(NamedTuple):
    """How ranks change in a training: the arguments of `TDLRT` with that of a budget's recipe.

    Attributes:
        policy: Which ranks to keep.
        adapt_every: See `TDLRT`.
        freeze_after: See `TDLRT`.
    """

    policy: RankPolicy
    adapt_every: int | None
    freeze_after: int | None


def check_options(
    *,
    integrator: str,
    capturable: bool,
    adapt_every: int | None,
    core_steps: int,
    basis_every: int,
    freeze_after: int | None,
    skip_nonfinite: int,
    has_rest: bool = False,
) -> dict[str, Any]:
    """Options of `TDLRT`, refused if they are out of range, or exclude each other.

    Returns:
        The options by name, with Python's own numbers.

    Raises:
        ValueError: One is.
    """
    if integrator not in ("parallel", "bug"):
        raise ValueError(f"integrator: got {integrator!r}, expected 'parallel' or 'bug'")
    periods = {"adapt_every": adapt_every, "freeze_after": freeze_after}
    counts = {"core_steps": core_steps, "basis_every": basis_every}
    options = {
        "integrator": integrator,
        "capturable": capturable,
        **{n: None if count is None else check_count(n, count) for n, count in periods.items()},
        **{name: check_count(name, count) for name, count in counts.items()},
        "skip_nonfinite": check_count("skip_nonfinite", skip_nonfinite, least=0),
    }
    if basis_every > 1 and (integrator == "bug" or capturable):
        other = "integrator='bug'" if integrator == "bug" else "capturable=True"
        raise ValueError(f"basis_every: got {basis_every} with {other}, expected 1 there")
    if capturable and has_rest:
        raise ValueError(
            "rest: got one with capturable=True, expected None there: nothing is known of the "
            "first step of another optimiser, so that it could not be taken back on the device"
        )
    return options


def resolve_adapting(
    *,
    tau: float | None,
    budget: float | None,
    total_steps: int | None,
    rank_policy: RankPolicy | Mapping[str, RankPolicy] | None,
    adapt_every: int | None,
    freeze_after: int | None,
) -> Adapting:
    """What the arguments of `TDLRT` on ranks stand for together; a budget has a recipe.

    Raises:
        RankError: More than one of tau, budget and rank_policy is given, or total_steps without
            budget, or one of them is out of range.
    """
    choices = {"tau": tau, "budget": budget, "rank_policy": rank_policy}
    given = [f"{name}={value}" for name, value in choices.items() if value is not None]
    if len(given) > 1:
        raise RankError(
            f"{', '.join(choices)}: got {' and '.join(given)}; give one of them: tau for a "
            "tolerance of each layer, budget for a size of the network, rank_policy for all else"
        )
    if budget is None:
        if total_steps is not None:
            raise RankError(
                f"total_steps: got {total_steps} without budget, whose recipe alone uses it; give "
                "budget=0.05 or the like, or leave it out"
            )
        return Adapting(resolve_policy(tau, rank_policy), adapt_every, freeze_after)
    if total_steps is None:
        check_number("budget", budget, "a number in (0, 1], such as 0.1", lambda x: 0 < x <= 1)
        return Adapting(ParameterBudget(budget), adapt_every, freeze_after)
    recipe = BudgetRecipe(budget, total_steps)
    return Adapting(
        recipe.rank_policy,
        recipe.adapt_every if adapt_every is None else adapt_every,
        recipe.freeze_after if freeze_after is None else freeze_after,
    )


def resolve_policy(
    tau: float | None, rank_policy: RankPolicy | Mapping[str, RankPolicy] | None
) -> RankPolicy:
    """The policy that `tau` or `rank_policy` stands for.

    Raises:
        RankError: rank_policy is of another type, or tau out of range.
    """
    if rank_policy is None:
        return RelativeTolerance(DEFAULT_TAU if tau is None else tau)
    if isinstance(rank_policy, Mapping):
        return ByName(rank_policy)
    if isinstance(rank_policy, BudgetRecipe):
        raise RankError(
            "rank_policy: got a BudgetRecipe, which is a policy and more; give its parts: "
            "rank_policy=recipe.rank_policy, adapt_every=recipe.adapt_every, "
            "freeze_after=recipe.freeze_after"
        )
    if not isinstance(rank_policy, RankPolicy):
        raise RankError(
            f"rank_policy: got {rank_policy!r}, expected RelativeTolerance(...), "
            "ParameterBudget(...), FixedRank(), or a dict from layer-name pattern to these"
        )
    return rank_policy


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """A value as Python's own int.

    Raises:
        ValueError: It is no int, or too small.
    """
    count = as_int(value)
    if count is None or count < least:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")
    return count


def check_rates(
    optimizer_cls: type[torch.optim.Optimizer], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a torch optimiser, with Python's own numbers.

    Those are numbers that the class has a number for by default, and lr.

    Args:
        optimizer_cls: The class. It checks their range.
        options: Some of its options, such as lr, betas and weight_decay, or a param_group.

    Raises:
        ValueError: One is no number, or no tuple of as many numbers as its default.
    """
    defaults = {n: of.default for n, of in inspect.signature(optimizer_cls).parameters.items()}
    defaults["lr"] = 1e-3  # not every class has one
    return {
        name: _like(name, value, defaults[name]) if name in defaults else value
        for name, value in options.items()
    }


def without_numpy(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with Python's own floats, which any scheduler may have made numpy's."""
    floats = {name: as_float(value) for name, value in options.items()}
    return {
        name: value if floats[name] is None else floats[name] for name, value in options.items()
    }


def _like(name: str, value: Any, default: object) -> Any:
    """An option in the form of its default, if that is a number or a tuple of numbers."""
    if as_number(default) is not None:
        number = value if isinstance(value, Tensor) else as_number(value)
        if number is None:
            raise ValueError(f"{name}: got {value!r}, expected a number such as {default!r}")
        return number
    if isinstance(default, tuple) and all(as_number(of) is not None for of in default):
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ValueError(
                f"{name}: got {value!r}, expected {len(default)} numbers such as {default!r}"
            )
        return tuple(_like(name, part, of) for part, of in zip(value, default, strict=True))
    return value
