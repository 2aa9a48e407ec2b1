"""Whether a torch optimiser moves each entry by itself, tried on a few numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError

__all__ = ["check_class", "check_entrywise", "defaults_of"]

_GRADIENTS = ((0.5, -2.0, 0.1), (1.0, 0.3, -0.2), (0.2, 0.7, 0.4))
_START = 3.0
_RATE: dict[str, Any] = {"lr": 0.01}

# Classes that were tried, with the names of the options that were set.
_tried: set[tuple[type[torch.optim.Optimizer], frozenset[str], frozenset[str]]] = set()


def check_class(optimizer_cls: object) -> None:
    """Refuse what is no class of torch optimisers.

    Raises:
        UnsupportedOptimizerError: It is none.
    """
    if isinstance(optimizer_cls, torch.optim.Optimizer):  # prints as several lines
        name = type(optimizer_cls).__name__
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got an object of {name}, expected the class; pass {name} itself, and "
            "its options beside it"
        )
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got {optimizer_cls!r}, expected a subclass of torch.optim.Optimizer, "
            "such as torch.optim.Adam"
        )


@cache
def defaults_of(optimizer_cls: type[torch.optim.Optimizer]) -> Mapping[str, Any]:
    """The options of a class and their defaults.

    Raises:
        UnsupportedOptimizerError: The class cannot be made for a row of numbers, with lr alone.
    """
    try:
        return dict(optimizer_cls([torch.zeros(1)], **_RATE).defaults)
    except (TypeError, ValueError, RuntimeError) as error:
        why = f"it cannot be made for a row of numbers with lr alone ({error!r})"
        raise _refused(optimizer_cls.__name__, why) from error


def check_entrywise(
    optimizer_cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    declared: Collection[str],
) -> None:
    """Refuse a class whose step on coordinates is not what it is on a weight.

    Args:
        optimizer_cls: The class.
        options: Its options but lr, without weight decay.
        declared: Names of the state that it may have.

    Raises:
        UnsupportedOptimizerError: The step of an entry depends on other entries, or on the weight,
            or the state has other names.
    """
    kind = optimizer_cls, frozenset(n for n, of in options.items() if of), frozenset(declared)
    if kind in _tried:
        return
    name = optimizer_cls.__name__
    try:
        moved, state = _moved(optimizer_cls, options)
        alone, _ = _moved(optimizer_cls, options, entries=1)
        shifted, _ = _moved(optimizer_cls, options, start=_START)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _refused(name, f"its step failed on three numbers ({error!r})") from error
    if not torch.allclose(moved[:1], alone):
        raise _refused(name, "its step on an entry depends on other entries")
    if not torch.allclose(moved, shifted, atol=1e-6):
        raise _refused(name, "its step depends on the weight by more than weight decay")
    if unknown := sorted(state - set(declared)):
        raise _refused(name, f"its state has {', '.join(unknown)}, which its rule does not declare")
    _tried.add(kind)


def _moved(
    optimizer_cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    *,
    start: float = 0.0,
    entries: int = 3,
) -> tuple[Tensor, set[str]]:
    """How far some steps move a few numbers, and the names of the state then."""
    with torch.no_grad():
        weight = torch.full((entries,), start, dtype=torch.float64)
        optimizer = optimizer_cls([weight], **{**_RATE, **options})
        for gradient in _GRADIENTS:
            weight.grad = torch.tensor(gradient[:entries], dtype=torch.float64)
            optimizer.step()
        return weight - start, {str(name) for name in optimizer.state[weight]}


def _refused(name: str, why: str) -> UnsupportedOptimizerError:
    return UnsupportedOptimizerError(
        f"optimizer_cls: got {name}, expected an optimiser that moves each entry by itself; {why}. "
        "Derive a rule of your own from tdlrt.optim.Rule, or use it for other parameters (rest=)"
    )
