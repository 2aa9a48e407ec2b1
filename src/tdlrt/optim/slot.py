"""A Tucker layer together with its share of the optimiser's state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.nn import TuckerLayer

__all__ = ["BASIS_CORE", "STEP", "LayerSlot", "OptimizerState", "working_dtype"]

OptimizerState: TypeAlias = MutableMapping[Any, Any]

STEP = "step"

BASIS_CORE = "basis_core"
"""The core of the last step that moved the bases, while they rest."""


class LayerSlot:
    """Access to one layer, its parameters and their state.

    Core and learned bases stand in `parameters`, in a fixed order; they keep their identity.
    The state is kept in the optimiser's `state` under the keys of the torch optimiser, the core's
    part with the core and each basis part with its basis, all of their Parameters' shapes.

    Args:
        name: Name of the layer in the model.
        layer: The layer.
    """

    def __init__(self, name: str, layer: TuckerLayer) -> None:
        self.name = name
        self.layer = layer
        self.parameters: list[Tensor] = [
            layer.core,
            *(layer.factors[mode] for mode in layer.learned_modes),
        ]

    @property
    def bases(self) -> list[Tensor]:
        """Learned bases."""
        return self.parameters[1:]

    def has_gradient(self) -> bool:
        """Whether the layer takes part in this step.

        Raises:
            IntegratorStateError: Some of its Parameters have a gradient and some have not, or they
                are not those that the optimiser was constructed with.
        """
        if self.layer.core is not self.parameters[0]:
            raise IntegratorStateError(
                f"{self.name}: its parameters are not those that TDLRT was constructed with; "
                "load_state_dict(assign=True) replaces them: load without assign=True, or before "
                "TDLRT is constructed"
            )
        missing = [parameter.grad is None for parameter in self.parameters]
        if any(missing) and not all(missing):
            raise IntegratorStateError(
                f"{self.name}: got a gradient for some of core and factors and not for others; "
                "freeze or train the whole layer (requires_grad)"
            )
        return not missing[0]

    def versions(self) -> list[tuple[int, int]]:
        """What changes when somebody writes a parameter."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]

    def moments(self, state: OptimizerState, names: Collection[str]) -> dict[str, list[Tensor]]:
        """The state by name: a tensor for each parameter, or for the core alone.

        Between the passes of `bug` the core alone has a state, before the first step nothing has.

        A state of other ranks is dropped, with a warning.
        """
        found: dict[str, list[Tensor]] = {}
        for parameter in self.parameters:
            own = state.get(parameter, {})
            for name in names:
                moment = own.get(name)
                if moment is None:
                    continue
                if moment.shape != parameter.shape:
                    warnings.warn(
                        f"{self.name}: its ranks were changed by another optimiser, or by "
                        f"load_state_dict of the model alone; its {name} begins anew",
                        stacklevel=2,
                    )
                    self.set_moments(state, {}, None)
                    return {}
                found.setdefault(name, []).append(moment)
        return found

    def set_moments(
        self, state: OptimizerState, moments: Mapping[str, Sequence[Tensor]], step: Tensor | None
    ) -> None:
        """Make these the layer's state.

        Args:
            state: The optimiser's state, changed in place.
            moments: By name a tensor for each parameter, or for the core alone.
            step: Steps taken, where the optimiser counts them.
        """
        for parameter in self.parameters:
            state.pop(parameter, None)
        for name, tensors in moments.items():
            for parameter, tensor in zip(self.parameters, tensors, strict=False):
                state.setdefault(parameter, {})[name] = tensor
        if step is not None:
            state[self.layer.core][STEP] = step

    def steps(self, state: OptimizerState) -> Tensor | None:
        """Steps of an optimiser that counts them, a scalar; None before the first."""
        steps: Tensor | None = state.get(self.layer.core, {}).get(STEP)
        return steps


def working_dtype(parameter: Tensor) -> torch.dtype:
    """Type of the arithmetic: float32 where that of the weight is too small for linear algebra."""
    return parameter.dtype if parameter.dtype == torch.float64 else torch.float32
