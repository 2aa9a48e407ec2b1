"""The param_groups of `TDLRT`: which parameters are in which group, and checks of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tdlrt.errors import UnsupportedLayerError
from tdlrt.optim.shards import is_sharded
from tdlrt.optim.slot import LayerSlot

__all__ = [
    "as_list",
    "check_shards",
    "check_tucker_alone",
    "group_of_each_layer",
    "groups_of",
    "tucker_parameters",
]


def as_list(
    parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[Tensor]:
    """Parameters as torch takes them: one, or several, with or without their names.

    Raises:
        TypeError: They are in a set, which has no order.
    """
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, set | frozenset):
        raise TypeError(
            "params: got a set, whose order changes from run to run, expected a list of parameters"
        )
    return [p[1] if isinstance(p, tuple) else p for p in parameters]


def tucker_parameters(slots: Collection[LayerSlot]) -> set[int]:
    """Ids of the cores and bases.

    Raises:
        ValueError: Two layers share a core or a basis.
    """
    found = {id(parameter) for slot in slots for parameter in slot.parameters}
    if len(found) < sum(len(slot.parameters) for slot in slots):
        raise ValueError(
            "model: got Tucker layers that share a core or a basis, which would move twice a step; "
            "use one layer in both places"
        )
    return found


def groups_of(
    parameters: Iterable[Tensor], tucker: Collection[int], given: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A group for cores and bases, one for plain parameters, then the user's own groups.

    Raises:
        TypeError: A group is no dict with 'params'.
    """
    own = []
    for group in given if isinstance(given, Iterable) else [given]:
        if not isinstance(group, Mapping) or "params" not in group:
            got = "a dict without 'params'" if isinstance(group, Mapping) else type(group).__name__
            raise TypeError(
                f"param_groups: got {got}, expected a list of dicts such as "
                "{'params': model.stem.parameters(), 'lr': 0.01}"
            )
        own.append({**group, "params": as_list(group["params"])})
    taken = {id(parameter) for group in own for parameter in group["params"]}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    return [
        {"params": [p for p in rest if id(p) in tucker]},
        {"params": [p for p in rest if id(p) not in tucker]},
        *own,
    ]


def check_tucker_alone(
    groups: Iterable[Mapping[str, Any]], tucker: Collection[int], names: Mapping[Tensor, str]
) -> None:
    """Refuse groups of the user's with parameters that optimisers of their own move.

    Raises:
        ValueError: A parameter is not in Tucker format.
    """
    for group in groups:
        for parameter in group["params"]:
            if parameter in names and id(parameter) not in tucker:
                raise ValueError(
                    f"param_groups: got {names[parameter]} with rest, expected cores and bases of "
                    "Tucker layers alone; give it a group in the optimiser that rest returns"
                )


def group_of_each_layer(
    slots: Mapping[str, LayerSlot], groups: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Index of the param_group of each layer.

    Raises:
        ValueError: The core and a basis of a layer are in different groups.
    """
    index = {
        id(parameter): number
        for number, group in enumerate(groups)
        for parameter in group["params"]
    }
    found = {}
    for name, slot in slots.items():
        numbers = {index[id(parameter)] for parameter in slot.parameters}
        if len(numbers) > 1:
            raise ValueError(
                f"param_groups: {name} has parameters in groups {sorted(numbers)}; put its "
                "core and factors in the same group"
            )
        found[name] = numbers.pop()
    return found


def check_shards(names: Mapping[Tensor, str], slots: Collection[LayerSlot]) -> None:
    """Refuse sharded parameters, except those of a model that `fully_shard_` has prepared.

    Raises:
        UnsupportedLayerError: A core or a basis is sharded, other parameters are sharded although
            nothing averages the gradients of cores and bases, or some are and others are not.
    """
    sharded = [name for parameter, name in names.items() if is_sharded(parameter)]
    if not sharded:
        return
    tucker = tucker_parameters(slots)
    averaged = all(slot.layer.is_averaged for slot in slots)
    for parameter, name in names.items():
        if is_sharded(parameter) and not (averaged and id(parameter) not in tucker):
            raise UnsupportedLayerError(
                f"{name}: is a DTensor, expected a plain parameter; leave out torch's fully_shard "
                "and tensor parallelism, and shard the whole model by "
                "tdlrt.integrations.fsdp.fully_shard_(model), which leaves cores and bases whole "
                "and averages their gradients"
            )
        if averaged and not is_sharded(parameter) and id(parameter) not in tucker:
            raise UnsupportedLayerError(
                f"{name}: is a plain parameter beside sharded ones such as {sharded[0]}, expected "
                "all in one model given to tdlrt.integrations.fsdp.fully_shard_"
            )
