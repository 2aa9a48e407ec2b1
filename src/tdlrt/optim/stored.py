"""Checks of a state_dict of `TDLRT`, made before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.stored_values import check_entries, check_integrator_state

__all__ = ["EXTRA", "check_state", "owned", "restore_types"]

EXTRA = "tdlrt"
"""Key of the integrator's own state in the state_dict, next to torch's keys."""


def owned(value: Any) -> Any:
    """A copy of a tensor that is a view of a stack; any other value unchanged."""
    return value.clone() if isinstance(value, Tensor) and value._base is not None else value


def check_state(
    state_dict: Mapping[str, Any],
    integrator: str,
    optimizer: str,
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    slots: Mapping[str, LayerSlot],
    core_steps: int,
) -> None:
    """Refuse a state_dict that does not fit the optimiser.

    Args:
        state_dict: The state_dict.
        integrator: Name of the integrator that is to continue from it.
        optimizer: Name of the plain optimiser's class.
        groups: The param_groups.
        names: Names of the parameters in them.
        slots: The layers by name.
        core_steps: Number of core steps in a step of `bug`.

    Raises:
        IntegratorStateError: It belongs to another optimiser, integrator or model, or to other
            ranks, or a value in it is missing or of the wrong kind.
    """
    extra = state_dict.get(EXTRA)
    if extra is None:
        raise IntegratorStateError(
            "state_dict: got one without a 'tdlrt' entry, expected the result of TDLRT.state_dict()"
        )
    check_integrator_state(extra, slots, core_steps)
    if extra.get("integrator") != integrator:
        raise IntegratorStateError(
            f"state_dict: got one of integrator={extra.get('integrator')!r}, expected "
            f"{integrator!r}; construct TDLRT with the same integrator"
        )
    if extra.get("optimizer", optimizer) != optimizer:
        raise IntegratorStateError(
            f"state_dict: got one of {extra['optimizer']}, expected one of {optimizer}; construct "
            "TDLRT with the same optimizer_cls"
        )
    _check_groups(state_dict, groups)
    check_entries(state_dict, groups, names, slots.values(), extra["resting_ranks"])


def _check_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    saved = state_dict.get("param_groups")
    if not isinstance(saved, list) or not all(_lists_numbers(group) for group in saved):
        raise IntegratorStateError(
            "state_dict: got param_groups without numbers of parameters, expected the result of "
            "TDLRT.state_dict()"
        )
    got = [len(group["params"]) for group in saved]
    expected = [len(group["params"]) for group in groups]
    if got != expected:
        raise IntegratorStateError(
            f"state_dict: got groups of {got} parameters, expected {expected}; it belongs to "
            "another model"
        )


def _lists_numbers(group: object) -> bool:
    numbers = group.get("params") if isinstance(group, dict) else None
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


def restore_types(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], slots: Iterable[LayerSlot]
) -> None:
    """Give the loaded state of Tucker layers back the types that torch casts to the parameters'.

    Args:
        optimizer: The optimiser, after torch's own `load_state_dict`.
        state_dict: The state.
        slots: The layers.
    """
    keys = {
        parameter: key
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        for key, parameter in zip(saved["params"], own["params"], strict=True)
    }
    for slot in slots:
        for parameter in slot.parameters:
            loaded = optimizer.state.get(parameter, {})
            for name, value in state_dict["state"].get(keys[parameter], {}).items():
                if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                    loaded[name] = value.to(parameter.device, copy=True)
