"""How often the bases of wide layers move: in every step, or in one of so many."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.nn import TuckerLayer
from tdlrt.optim.batches import Members
from tdlrt.optim.slot import LayerSlot, OptimizerState
from tdlrt.optim.team import Team

__all__ = ["RestingBases"]

# Products of the size of a basis and a core, in multiply-adds, that a basis step comes to.
_PRODUCTS = 20

# Multiply-adds of a basis step from which a layer is wide: less takes some ten milliseconds.
_WIDE = 2e9

# Largest share of the multiply-adds of a step that the bases of wide layers may take.
_SHARE = 0.2


class RestingBases:
    """Which layers move their cores alone in the step under way.

    A basis step takes some 20 (n r^2 + |C| r) multiply-adds a mode, however small the batch; the
    passes of a layer take three multiply-adds a parameter and row of its output. The bases of wide
    layers move in one of k steps, and their cores in every one: with B for the basis steps of wide
    layers and F for the passes of all layers, k is the least power of two with
    B <= (B + k F) / 5.

    Args:
        slots: The layers by name.
        every: k, for all layers; None for the k above, and layers that are not wide in every step.

    Attributes:
        rows: Rows of outputs of each layer in the first step: for `every=None`, until then.
    """

    def __init__(self, slots: Mapping[str, LayerSlot], every: int | None) -> None:
        self._slots, self._every = slots, every
        self._rows: dict[str, int] = {}
        self._since: dict[str, int] = {}  # steps since the bases moved
        self._taken: dict[str, int] = {}  # steps that moved them
        self._plan: tuple[object, int, frozenset[str]] = (None, 1, frozenset())
        self._hooks: list[Any] = []
        if every is None and self._wide():
            self._hooks = [
                slot.layer.register_forward_hook(_RowCounter(self._rows, name))
                for name, slot in slots.items()
            ]

    def names(self, active: Collection[str], generation: int, team: Team) -> list[str]:
        """Those of the layers whose bases rest in the step under way.

        Args:
            active: Layers that have a gradient.
            generation: `Batches.generation`: what holds for the ranks is found once for each.
            team: The processes that must agree.
        """
        if self._hooks:
            self._remove_hooks()
            names = list(self._slots)
            rows = team.largest([self._rows.get(name, 0) for name in names])
            self._rows = dict(zip(names, rows, strict=True))
        if self._plan[0] != generation:
            self._plan = (generation, *self._made_plan())
        _, period, able = self._plan
        mine = [name for name in active if name in able] if period > 1 else []
        # All together, so that there are steps in which none rests.
        if any(self._since.get(name, period) + 1 >= period for name in mine):
            return []
        return mine

    def _wide(self) -> dict[str, float]:
        """Multiply-adds of the basis steps of wide layers."""
        work = {name: _basis_work(slot) for name, slot in self._slots.items()}
        return {name: count for name, count in work.items() if count >= _WIDE}

    def _made_plan(self) -> tuple[int, frozenset[str]]:
        if self._every is not None:
            return self._every, frozenset(self._slots)
        wide = self._wide() if self._rows else {}
        if not wide or not all(self._rows.get(name) for name in wide):
            return 1, frozenset()
        passes = sum(
            3.0 * rows * self._slots[name].layer.weight_parameters
            for name, rows in self._rows.items()
        )
        least = sum(wide.values()) * (1 / _SHARE - 1) / passes
        return 2 ** max(0, math.ceil(math.log2(least))), frozenset(wide)

    def end_step(
        self, active: Collection[str], resting: Collection[str], state: OptimizerState
    ) -> None:
        """Count a step.

        Args:
            active: Layers that have moved.
            resting: Those of them whose bases have not.
            state: The optimiser's state.
        """
        for name in active:
            if name in resting:
                if name not in self._taken:
                    steps = self._slots[name].steps(state)  # this one included
                    self._taken[name] = 0 if steps is None else int(steps) - 1
                self._since[name] += 1
            elif name in self._plan[2] or name in self._taken:
                self._since[name] = 0
                if name in self._taken:
                    self._taken[name] += 1

    def steps_taken(self, members: Members, steps: Tensor) -> Tensor | None:
        """Steps that moved the bases of each layer; None where all steps of all layers did.

        Args:
            members: The layers.
            steps: Steps of each layer.
        """
        taken = [self._taken.get(slot.name, math.nan) for slot in members.slots]
        if all(math.isnan(count) for count in taken):
            return None
        known = torch.tensor(taken, dtype=steps.dtype, device=steps.device)
        return torch.where(known.isnan(), steps, known)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """What a training that goes on must know, by layer."""
        return {"rows": dict(self._rows), "since": dict(self._since), "taken": dict(self._taken)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what `state_dict` gave."""
        self._rows.clear()
        self._rows.update(state.get("rows", {}))
        self._since, self._taken = dict(state.get("since", {})), dict(state.get("taken", {}))
        self._plan = (None, 1, frozenset())
        if self._rows:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _RowCounter:
    """A hook that counts the rows of a layer's outputs, where they are trained on."""

    def __init__(self, rows: MutableMapping[str, int], name: str) -> None:
        self._rows, self._name = rows, name

    def __call__(self, layer: nn.Module, inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if isinstance(output, Tensor) and isinstance(layer, TuckerLayer):
            count = output.numel() // layer.shape[0]
            self._rows[self._name] = self._rows.get(self._name, 0) + count


def _basis_work(slot: LayerSlot) -> float:
    """Multiply-adds of a step of a layer's bases, roughly."""
    shape, ranks = slot.layer.shape, slot.layer.ranks
    core = math.prod(ranks)
    sizes = [(n, r) for n, r in zip(shape, ranks, strict=True) if n > r]
    return _PRODUCTS * sum(n * r**2 + core * r for n, r in sizes)
