"""Sharding of the integrator: each process computes the steps of its own layers and sends them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tdlrt.errors import NonFiniteError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.layer import resize_layers_
from tdlrt.optim.slot import STEP, LayerSlot, OptimizerState
from tdlrt.optim.team import Team

__all__ = ["ShardedTeam"]


class ShardedTeam(Team):
    """Every layer has one process that computes its steps, its owner.

    Layers are assigned once, from the largest to the smallest, each to the process that has the
    fewest parameters so far.

    Args:
        layers: The layers by name, the same on all processes.
        process_group: The processes; all by default.
    """

    def __init__(
        self, layers: Mapping[str, TuckerLayer], process_group: dist.ProcessGroup | None = None
    ) -> None:
        self._group = process_group
        self._process = dist.get_rank(process_group)
        self._owners: dict[str, int] = {}
        loads = [0] * dist.get_world_size(process_group)
        for name, layer in sorted(layers.items(), key=lambda item: -item[1].weight_parameters):
            self._owners[name] = loads.index(min(loads))
            loads[self._owners[name]] += layer.weight_parameters

    def share(self, names: Collection[str]) -> Collection[str]:
        """The layers that this process owns."""
        return [name for name in names if self._owners[name] == self._process]

    def owners(self) -> Mapping[str, int]:
        """See `Team.owners`."""
        return self._owners

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Raise NonFiniteError on all processes if it is raised inside on one of them."""
        error = None
        try:
            yield
        except NonFiniteError as caught:
            error = caught
        failed = [False] * dist.get_world_size(self._group)
        dist.all_gather_object(failed, error is not None, group=self._group)
        if error is not None:
            raise error
        if any(failed):
            raise NonFiniteError(
                f"weight: a step of process {failed.index(True)} would not be finite, expected "
                "finite values; nothing was changed. Lower lr"
            )

    @torch.no_grad()
    def exchange(
        self,
        slots: Sequence[LayerSlot],
        state: OptimizerState,
        curvatures: MutableMapping[str, Tensor],
    ) -> None:
        """Broadcast the layers of every process to all others, in one buffer per process."""
        own = [_describe(slot, state, curvatures) for slot in slots if self._owns(slot)]
        described = [own] * dist.get_world_size(self._group)
        dist.all_gather_object(described, own, group=self._group)
        for owner, descriptions in enumerate(described):
            theirs = [slot for slot in slots if self._owners[slot.name] == owner]
            if not theirs:
                continue
            core = theirs[0].layer.core
            dtype = torch.promote_types(core.dtype, torch.float32)
            if owner == self._process:
                flat = torch.cat(
                    [t.flatten().to(dtype) for s in theirs for t in _tensors(s, state)]
                )
            else:
                size = sum(_size(description) for description in descriptions)
                flat = torch.empty(size, dtype=dtype, device=core.device)
            dist.broadcast(flat, group=self._group, group_src=owner)
            if owner != self._process:
                parts = torch.split(flat, [_size(d) for d in descriptions])
                for slot, part, description in zip(theirs, parts, descriptions, strict=True):
                    _write(slot, part, description, state, curvatures)

    def _owns(self, slot: LayerSlot) -> bool:
        return self._owners[slot.name] == self._process


class _Description(NamedTuple):
    """Shapes of a layer's core and bases, names of their moments, step count and curvature."""

    shapes: list[tuple[int, ...]]
    moments: list[list[str]]
    step: float | None
    curvature: float | None


def _describe(
    slot: LayerSlot, state: OptimizerState, curvatures: Mapping[str, Tensor]
) -> _Description:
    core_state = state.get(slot.layer.core, {})
    curvature = curvatures.get(slot.name)
    return _Description(
        [tuple(parameter.shape) for parameter in slot.parameters],
        [[key for key in state.get(p, {}) if key != STEP] for p in slot.parameters],
        float(core_state[STEP]) if STEP in core_state else None,
        None if curvature is None else float(curvature),
    )


def _tensors(slot: LayerSlot, state: OptimizerState) -> Iterator[Tensor]:
    for parameter in slot.parameters:
        yield parameter
        yield from (value for key, value in state.get(parameter, {}).items() if key != STEP)


def _size(description: _Description) -> int:
    return sum(
        math.prod(shape) * (1 + len(names))
        for shape, names in zip(description.shapes, description.moments, strict=True)
    )


def _write(
    slot: LayerSlot,
    flat: Tensor,
    description: _Description,
    state: OptimizerState,
    curvatures: MutableMapping[str, Tensor],
) -> None:
    """Write a received layer and its state."""
    values: list[Tensor] = []
    moments: dict[str, list[Tensor]] = {}
    for shape, names in zip(description.shapes, description.moments, strict=True):
        size = math.prod(shape) * (1 + len(names))
        part, flat = flat[:size], flat[size:]
        value, *own = part.view(-1, *shape)
        values.append(value)
        for name, moment in zip(names, own, strict=True):
            moments.setdefault(name, []).append(moment.clone())
    resize_layers_([slot.layer], [values])
    step = None if description.step is None else torch.tensor(description.step)
    slot.set_moments(state, moments, step)
    if description.curvature is not None:
        curvatures[slot.name] = torch.tensor(
            description.curvature, dtype=torch.float64, device=flat.device
        )
