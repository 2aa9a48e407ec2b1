"""Checks of a state_dict of `TDLRT`, made before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError, UnsupportedOptimizerError
from tdlrt.optim.rules import Rule
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.stored_values import check_entries, check_layer_values, stored_keys

__all__ = [
    "EXTRA",
    "are_same",
    "check_state",
    "core_norms",
    "owned",
    "restore_types",
    "with_own_tensors",
]

EXTRA = "tdlrt"
"""Key of the integrator's own state in the state_dict, next to torch's keys."""


def owned(value: Any) -> Any:
    """A copy of a tensor that is a view of a stack; any other value unchanged."""
    return value.clone() if isinstance(value, Tensor) and value._base is not None else value


def with_own_tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same state_dict with copies of the tensors, of which torch would go on with the given."""
    state = {
        key: {name: v.clone() if isinstance(v, Tensor) else v for name, v in of.items()}
        for key, of in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def core_norms(slots: Iterable[LayerSlot]) -> dict[str, Tensor]:
    """||C|| = ||W|| of each layer, by which a stored state knows its weights again."""
    own = list(slots)
    norms = torch._foreach_norm([slot.layer.core.detach() for slot in own], 2, dtype=torch.float64)
    return {slot.name: norm for slot, norm in zip(own, norms, strict=True)}


def are_same(norms: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether norms of layers agree up to rounding; waits for the device."""
    return norms.keys() == others.keys() and all(
        math.isclose(float(norm), float(others[name]), rel_tol=1e-6) for name, norm in norms.items()
    )


def check_state(
    state_dict: Mapping[str, Any],
    integrator: str,
    optimizer: str,
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    slots: Mapping[str, LayerSlot],
    rule_of: Callable[[Mapping[str, Any]], Rule],
) -> None:
    """Refuse a state_dict that does not fit the optimiser.

    Args:
        state_dict: The state_dict.
        integrator: Name of the integrator that is to continue from it.
        optimizer: Name of the plain optimiser's class.
        groups: The param_groups.
        names: Names of the parameters in them.
        slots: The layers by name.
        rule_of: Reads the rule of a group, or raises an error.

    Raises:
        IntegratorStateError: It is incomplete, or belongs to another optimiser, integrator or
            model, or to other ranks.
    """
    if not isinstance(state_dict, Mapping):
        raise IntegratorStateError(
            f"state_dict: got {type(state_dict).__name__}, expected the result of "
            "TDLRT.state_dict()"
        )
    outer: dict[str, type] = {"state": dict, "param_groups": list}
    for key, kind in outer.items():
        if not isinstance(state_dict.get(key), kind):
            raise IntegratorStateError(
                f"state_dict: got {key}={state_dict.get(key)!r}, expected a value of type "
                f"{kind.__name__}; it is incomplete or damaged, so load another"
            )
    extra = state_dict.get(EXTRA)
    if not isinstance(extra, Mapping):
        raise IntegratorStateError(
            "state_dict: got one without a 'tdlrt' entry, expected the result of TDLRT.state_dict()"
        )
    for name, (kind, default) in _FIELDS.items():
        value = extra.get(name, default)
        is_flag, is_negative = isinstance(value, bool), isinstance(value, int) and value < 0
        if not isinstance(value, kind) or is_flag != (kind is bool) or is_negative:
            raise IntegratorStateError(
                f"state_dict['tdlrt']: got {name}={value!r}, expected a value of type "
                f"{kind.__name__}; it is incomplete or damaged, so load another"
            )
    if extra["integrator"] != integrator:
        raise IntegratorStateError(
            f"state_dict: got one of integrator={extra['integrator']!r}, expected "
            f"{integrator!r}; construct TDLRT with the same integrator"
        )
    if extra.get("optimizer", optimizer) != optimizer:
        raise IntegratorStateError(
            f"state_dict: got one of {extra['optimizer']}, expected one of {optimizer}; construct "
            "TDLRT with the same optimizer_cls"
        )
    _check_shapes(state_dict, groups, names, rule_of)
    check_layer_values(extra)
    _check_layers(extra, slots)
    counters = {name for group in groups for name in rule_of(group).counters}
    check_entries(state_dict, groups, names, slots.values(), extra["resting_ranks"], counters)


# What the integrator's own state consists of: types, and defaults of what older versions lack.
_FIELDS: dict[str, tuple[type, Any]] = {
    "integrator": (str, None),
    "steps": (int, None),
    "skipped_steps": (int, 0),
    "skipped_in_a_row": (int, 0),
    "frozen": (bool, None),
    "settling": (bool, None),
    "postponed": (bool, False),
    "resting_bases": (Mapping, {}),
    "core_steps_left": (int, None),
    "resting_ranks": (Mapping, None),
    "curvatures": (Mapping, {}),
    "norms": (Mapping, {}),
}


def _check_layers(extra: Mapping[str, Any], slots: Mapping[str, LayerSlot]) -> None:
    """Refuse what is stored of layers that the model does not have, or has in other sizes."""
    resting = extra.get("resting_bases", {})
    by_name = {name: extra.get(name, {}) for name in ("resting_ranks", "curvatures")}
    by_name |= {f"resting_bases.{name}": resting.get(name, {}) for name in ("since", "taken")}
    for field, found in by_name.items():
        unknown = [repr(name) for name in found if name not in slots]
        if unknown:
            raise IntegratorStateError(
                f"state_dict['tdlrt']: got {field} of layers {', '.join(unknown)}, expected those "
                f"of {', '.join(map(repr, slots))}; it belongs to another model"
            )
    if extra["resting_ranks"] and not extra["core_steps_left"]:
        raise IntegratorStateError(
            f"state_dict['tdlrt']: got resting_ranks={dict(extra['resting_ranks'])} with "
            "core_steps_left=0, expected none between steps; it is damaged, so load another"
        )
    for name, ranks in extra["resting_ranks"].items():
        present = slots[name].layer.ranks
        if len(ranks) != len(present) or not all(map(_is_rank, ranks, present)):
            raise IntegratorStateError(
                f"state_dict['tdlrt']: got resting_ranks {ranks!r} of {name}, expected ranks of at "
                f"most {present}; load the model's state_dict before the optimiser's"
            )


def _is_rank(value: object, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most


def _check_shapes(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    rule_of: Callable[[Mapping[str, Any]], Rule],
) -> None:
    saved_groups = state_dict["param_groups"]
    got = [len(group["params"]) for group in saved_groups]
    expected = [len(group["params"]) for group in groups]
    if got != expected:
        raise IntegratorStateError(
            f"state_dict: got groups of {got} parameters, expected {expected}; it belongs to "
            "another model"
        )
    for number, saved in enumerate(saved_groups):
        try:
            rule_of(saved)
        except (KeyError, TypeError, ValueError, UnsupportedOptimizerError) as error:
            raise IntegratorStateError(
                f"state_dict: got param_groups[{number}] with options that TDLRT cannot use "
                f"({type(error).__name__}: {error}); construct TDLRT with the same optimizer_cls "
                "and options, or load another state"
            ) from error


def restore_types(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], slots: Iterable[LayerSlot]
) -> None:
    """Give the loaded state of Tucker layers back the types that torch casts to the parameters'.

    Args:
        optimizer: The optimiser, after torch's own `load_state_dict`.
        state_dict: The state.
        slots: The layers.
    """
    keys = stored_keys(state_dict, optimizer.param_groups)
    for slot in slots:
        for parameter in slot.parameters:
            loaded = optimizer.state.get(parameter, {})
            for name, value in state_dict["state"].get(keys[parameter], {}).items():
                if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                    loaded[name] = value.to(parameter.device, copy=True)
