"""A slot: one Tucker layer together with its part of the optimiser's state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.nn import TuckerLayer

__all__ = ["BASIS_CORE", "MASTER", "STEP", "LayerSlot", "OptimizerState", "working_dtype"]

OptimizerState: TypeAlias = MutableMapping[Any, Any]

STEP = "step"

MASTER = "master"
"""A parameter of float16 or bfloat16 before it was rounded, in float32."""

BASIS_CORE = "basis_core"
"""Key of the core at the last step that moved the bases; stored only while the bases rest."""


class LayerSlot:
    """Access to one layer, its parameters and their state.

    `parameters` holds the core and the learned bases in a fixed order; they stay the same objects.
    The optimiser's `state` holds the state under the keys of the torch optimiser: the core part
    under the core and each basis part under its basis, each in the shape of its Parameter.

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
            IntegratorStateError: Only some of its Parameters have a gradient, or they are not those
                that the optimiser was constructed with.
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
                f"{self.name}: got a gradient for some of core and factors but not for others; "
                "freeze or train the whole layer (requires_grad)"
            )
        return not missing[0]

    def versions(self) -> list[tuple[int, int]]:
        """Address and version of each parameter; they change when other code writes to it."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]

    def weights(self, state: OptimizerState) -> list[Tensor]:
        """The parameters, or their masters where these round to the parameters."""
        masters = [state.get(p, {}).get(MASTER) for p in self.parameters]
        found = []
        for parameter, master in zip(self.parameters, masters, strict=True):
            if master is None or master.shape != parameter.shape:
                return [p.detach() for p in self.parameters]
            if not torch.equal(master.to(parameter.dtype), parameter.detach()):
                return [p.detach() for p in self.parameters]
            found.append(master)
        return found

    def moments(self, state: OptimizerState, names: Collection[str]) -> dict[str, list[Tensor]]:
        """The state by name: a tensor for each parameter, or for the core alone.

        Between the passes of `bug` only the core has a state. Before the first step there is none.

        A state that belongs to other ranks is dropped, with a warning.
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
        """Replace the layer's state.

        Args:
            state: The optimiser's state, changed in place.
            moments: The state by name: a tensor for each parameter, or for the core alone.
            step: Number of steps taken, if the optimiser counts them.
        """
        for parameter in self.parameters:
            state.pop(parameter, None)
        for name, tensors in moments.items():
            for parameter, tensor in zip(self.parameters, tensors, strict=False):
                state.setdefault(parameter, {})[name] = tensor
        if step is not None:
            state[self.layer.core][STEP] = step

    def steps(self, state: OptimizerState) -> Tensor | None:
        """Number of steps taken, a scalar; None before the first, or if they are not counted."""
        steps: Tensor | None = state.get(self.layer.core, {}).get(STEP)
        return steps


def working_dtype(parameter: Tensor) -> torch.dtype:
    """Type of the arithmetic: float32 for half-precision weights, since linear algebra needs it."""
    return parameter.dtype if parameter.dtype == torch.float64 else torch.float32
