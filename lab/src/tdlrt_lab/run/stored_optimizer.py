"""Validation of the optimiser and the schedule in a checkpoint against those of the run."""

import reprlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tdlrt.optim.rules import resolve_rule
from tdlrt.optim.stored_values import check_entries
from tdlrt_lab.run.metrics import is_finite_number

__all__ = ["check_optimizer", "checked_schedule"]

ABSENT = "absent"


def check_optimizer(stored: object, optimizer: Optimizer, model: nn.Module) -> None:
    """Check the options of each group, which are those of the run, and what each parameter has.

    Args:
        stored: The state_dict of the optimiser in a checkpoint.
        optimizer: The optimiser that is to load it, with a schedule.
        model: The network with the parameters of the optimiser.

    Raises:
        ValueError: A value is missing, of the wrong kind, or another than the run has.
        IntegratorStateError: The state of a parameter is not one that the optimiser writes.
    """
    if not isinstance(stored, Mapping) or not isinstance(stored.get("param_groups"), list):
        raise ValueError("optimizer: expected param_groups and state")
    groups, own = stored["param_groups"], optimizer.state_dict()["param_groups"]
    if len(groups) != len(own):
        raise ValueError(f"optimizer: {len(groups)} groups of parameters; expected {len(own)}")
    for number, (group, mine) in enumerate(zip(groups, own, strict=True)):
        place = f"optimizer: param_groups: {number}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{place}: expected options by name")
        _check_rate(group.get("lr", ABSENT), float(mine["initial_lr"]), f"{place}: lr")
        for key, value in mine.items():
            # Versions of torch differ in the flags that they have.
            is_optional = value is None or isinstance(value, bool)
            if key != "lr" and not (is_optional and key not in group):
                _check_equal(group.get(key, ABSENT), value, f"{place}: {key}")
    if "tdlrt" not in stored:  # an optimiser of torch; TDLRT checks its own
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        counters = resolve_rule(type(optimizer)).counters
        check_entries(stored, optimizer.param_groups, names, counters=counters)


def checked_schedule(stored: object, schedule: LRScheduler, step: int) -> dict[str, Any]:
    """What a schedule loads from a checkpoint: that of the run, at a step.

    Args:
        stored: The state_dict of the schedule in the checkpoint.
        schedule: The schedule that is to load it, at its beginning.
        step: Number of steps taken.

    Returns:
        The stored values that the schedule has. The others are left out: torch would take each of
        them as an attribute, in the place of a method even.

    Raises:
        ValueError: A value is missing, or another than the run has at this step.
    """
    if not isinstance(stored, Mapping):
        raise ValueError("schedule: expected values by name")
    own: dict[str, Any] = schedule.state_dict()
    expected = {**own, "last_epoch": step, "_step_count": step + 1}
    for key, value in expected.items():
        found, place = stored.get(key, ABSENT), f"schedule: {key}"
        if key == "_last_lr":
            if not isinstance(found, list) or len(found) != len(value):
                raise ValueError(f"{place}: expected {len(value)} rates")
            for rate, base in zip(found, own["base_lrs"], strict=True):
                _check_rate(rate, float(base), place)
        elif isinstance(value, bool) and key.startswith("_"):
            # Flags of torch's own, which change with the steps and differ between its versions.
            if key in stored and not isinstance(found, bool):
                raise ValueError(f"{place}: {reprlib.repr(found)}; expected True or False")
        else:
            _check_equal(found, value, place)
    return {key: stored.get(key, value) for key, value in own.items()}


def _check_rate(rate: Any, largest: float, place: str) -> None:
    """Check a learning rate, a number or a tensor of one; that of the run is the largest."""
    number = float(rate) if isinstance(rate, Tensor) and rate.numel() == 1 else rate
    fits = is_finite_number(number) and not isinstance(number, bool)
    if not fits or not 0 <= number <= largest * (1 + 1e-6):
        raise ValueError(f"{place}: {reprlib.repr(rate)}; expected a number from 0 to {largest:g}")


def _check_equal(found: Any, expected: Any, place: str) -> None:
    same_type = type(found) is type(expected) or not isinstance(expected, bool | type(None))
    if not same_type or isinstance(found, Tensor) or found != expected:
        raise ValueError(
            f"{place}: {reprlib.repr(found)}; expected {reprlib.repr(expected)}, as the run has"
        )
