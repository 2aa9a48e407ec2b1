"""Checks of each value in a state_dict: one of the wrong kind would raise some steps later."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.optim.slot import BASIS_CORE, MASTER, STEP, LayerSlot

__all__ = ["check_entries", "check_layer_values", "stored_keys"]

_OF_THE_CORE = {STEP, MASTER, BASIS_CORE}
"""Entries that the core of a layer may have and its bases have not, or not always."""


def check_layer_values(extra: Mapping[str, Any]) -> None:
    """Check the kind of what the integrator keeps for each layer.

    Args:
        extra: The entry of `TDLRT` in its state_dict, with tables by name of the layers.

    Raises:
        IntegratorStateError: A value has another type or range.
    """
    resting = extra.get("resting_bases", {})
    tables: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
        "resting_ranks": (extra["resting_ranks"], _are_ranks, "a list of ranks"),
        "curvatures": (extra.get("curvatures", {}), _is_number, "a tensor with one number"),
    }
    tables["norms"] = (extra.get("norms", {}), _is_number, "a tensor with one number")
    for part in ("since", "taken"):
        tables[f"resting_bases.{part}"] = (resting.get(part, {}), _is_count, "an integer from 0")
    for field, (table, fits, expected) in tables.items():
        if not isinstance(table, Mapping):
            raise _wrong(field, table, "values by name of a layer")
        for name, value in table.items():
            if not fits(value):
                raise _wrong(f"{field}: {name}", value, expected)


def stored_keys(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, Any]:
    """Key of the stored state of each parameter; torch numbers them in the order of the groups."""
    return {
        parameter: key
        for saved, own in zip(state_dict["param_groups"], groups, strict=True)
        for key, parameter in zip(saved["params"], own["params"], strict=True)
    }


def check_entries(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    layers: Collection[LayerSlot] = (),
    lifted: Collection[str] = (),
    counters: Collection[str] = (),
) -> None:
    """Check what an optimiser keeps for each parameter: tensors of its shape, and step counts.

    All parameters of a group have the same entries, or none before their first step. The bases of
    a layer in Tucker format have those of its core, or none between the passes of `bug`.

    Args:
        state_dict: The state_dict of a torch optimiser or of `TDLRT`, with as many parameters in
            each group as the optimiser that is to load it.
        groups: The param_groups of that optimiser.
        names: Names of the parameters in them.
        layers: The layers in Tucker format.
        lifted: Names of those that are between the passes of `bug`.
        counters: Names of entries that are one number, beside the number of steps.

    Raises:
        IntegratorStateError: An entry is missing, or has another type or shape.
    """
    state = state_dict.get("state")
    if not isinstance(state, Mapping):
        raise _wrong("state", state, "entries by parameter")
    keys = stored_keys(state_dict, groups)
    for key in state.keys() - set(keys.values()):
        raise _wrong("state", key, f"numbers of the {len(keys)} parameters")
    found = {}
    for parameter, key in keys.items():
        entries = state.get(key, {})
        _check_entries_of(parameter, names[parameter], entries, {STEP, *counters})
        # torch's SGD without momentum stores None.
        found[parameter] = {name for name, value in entries.items() if value is not None}
    cores = {slot.layer.core for slot in layers}
    bases = {basis for slot in layers for basis in slot.bases}
    for group in groups:
        for alike in ([p for p in group["params"] if p in cores], _plain(group, cores | bases)):
            _check_same_entries({names[p]: found[p] for p in alike})
    for slot in layers:
        if slot.name not in lifted:
            own = {names[p]: found[p] - _OF_THE_CORE for p in slot.parameters}
            _check_same_entries(own, empty=False)
        elif unexpected := [names[b] for b in slot.bases if found[b] - _OF_THE_CORE]:
            raise _wrong(unexpected[0], "a state", "none between the passes of 'bug'")


def _check_entries_of(
    parameter: Tensor, name: str, entries: object, numbers: Collection[str]
) -> None:
    if not isinstance(entries, Mapping):
        raise _wrong(name, entries, "the optimiser's state by name")
    for key, value in entries.items():
        place = f"{name}: {key}"
        if key in numbers:
            if not _is_number(value) or not 0 <= float(value) < math.inf:
                raise _wrong(place, value, "a tensor of one number from 0, such as that of steps")
        elif value is not None:
            fits = isinstance(value, Tensor) and value.is_floating_point()
            if not fits or value.layout is not torch.strided or value.is_meta:
                raise _wrong(place, value, "a tensor of floating-point numbers")
            if value.shape != parameter.shape:
                raise IntegratorStateError(
                    f"{name}: got a state of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}; load the model's state_dict before the optimiser's"
                )


def _check_same_entries(entries: Mapping[str, set[str]], *, empty: bool = True) -> None:
    expected = set().union(*entries.values()) - {MASTER, BASIS_CORE}
    for name, keys in entries.items():
        if missing := expected - keys:
            if keys or not empty:
                raise IntegratorStateError(
                    f"state_dict: {name} has no {min(missing)}, which others of its group have; "
                    "expected the result of state_dict()"
                )


def _plain(group: Mapping[str, Any], others: Collection[Tensor]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter not in others]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type(), because True is an int


def _are_ranks(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(rank) is int for rank in value)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.layout is torch.strided
        and not value.is_meta
        and (value.is_floating_point() or value.dtype in (torch.int32, torch.int64))
    )


def _wrong(place: str, value: object, expected: str) -> IntegratorStateError:
    if isinstance(value, Tensor):
        got = f"a tensor of {value.dtype}, {value.layout}, with shape {tuple(value.shape)}"
    else:
        got = reprlib.repr(value)
    where = f"state_dict: {place}" if place else "state_dict"
    return IntegratorStateError(
        f"{where}: got {got}, expected {expected}; load what state_dict() gave"
    )
