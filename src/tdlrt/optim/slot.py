"""A Tucker layer together with its share of the optimiser's state: read, and written as one."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.linalg import TangentSpace, TangentVector, TuckerTensor
from tdlrt.nn import TuckerLayer
from tdlrt.optim.rule import Rule
from tdlrt.optim.steps import Iterate, Lifted

__all__ = ["LayerSlot"]

OptimizerState: TypeAlias = MutableMapping[Any, Any]

_STEP = "step"


class LayerSlot:
    """Access to one layer: its weight, gradient and state as the pure steps want them.

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
        self._bases = {mode: layer.factors[mode] for mode in layer.learned_modes}
        self.parameters: list[Tensor] = [layer.core, *self._bases.values()]
        self._space: TangentSpace | None = None
        self._version: list[tuple[int, int]] = []

    @property
    def bases(self) -> list[Tensor]:
        """Learned bases."""
        return self.parameters[1:]

    def point(self) -> TuckerTensor:
        """The weight, in float32 where its type is too small for linear algebra."""
        return TuckerTensor(
            _at_least_float32(self.layer.core),
            tuple(_at_least_float32(factor) for factor in self.layer.factors),
        )

    def has_gradient(self) -> bool:
        """Whether the layer takes part in this step.

        Raises:
            IntegratorStateError: Some of its Parameters have a gradient and some have not.
        """
        missing = [parameter.grad is None for parameter in self.parameters]
        if any(missing) and not all(missing):
            raise IntegratorStateError(
                f"{self.name}: got a gradient for some of core and factors and not for others; "
                "freeze or train the whole layer (requires_grad)"
            )
        return not missing[0]

    def work(self) -> float:
        """Multiply-adds on the CPU of one product of each basis and of the core with an r x r."""
        if self.layer.core.device.type != "cpu":
            return 0.0
        bases = sum(len(basis) * basis.shape[1] ** 2 for basis in self.bases)
        return float(bases + self.layer.core.numel() * sum(b.shape[1] for b in self.bases))

    def _tangent_space(self) -> TangentSpace:
        """Tangent space at the weight; the last step's own unless somebody else wrote since."""
        if self._space is None or self._version != self._current_version():
            self._space = TangentSpace(*self.point(), tuple(self._bases))
            self._version = self._current_version()
        return self._space

    def _current_version(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]

    def gradient(self) -> TangentVector:
        """Projected gradient, from what autograd left in `.grad`, which is only read."""
        factors: list[Tensor | None] = [None] * len(self.layer.factors)
        for mode, basis in self._bases.items():
            if basis.grad is not None:
                factors[mode] = _at_least_float32(basis.grad)
        return self._tangent_space().gradient(self.core_gradient(), factors)

    def core_gradient(self) -> Tensor:
        """Gradient of the core."""
        gradient = self.layer.core.grad
        if gradient is None:
            raise IntegratorStateError(f"{self.name}.core: got no gradient; call backward() first")
        return _at_least_float32(gradient)

    def iterate(self, state: OptimizerState, rule: Rule) -> Iterate:
        """Weight and state at rest."""
        space = self._tangent_space()
        cores = self._moments(state, self.layer.core, rule)
        parts = {mode: self._moments(state, basis, rule) for mode, basis in self._bases.items()}
        moments = {
            name: space.vector(
                core, {mode: part[name] for mode, part in parts.items() if name in part}
            )
            for name, core in cores.items()
        }
        return Iterate(space, moments, self._step(state))

    def lifted(self, state: OptimizerState, rule: Rule) -> Lifted:
        """Weight and state between a basis step and the truncation."""
        moments = self._moments(state, self.layer.core, rule)
        return Lifted(self.point(), moments, self._step(state))

    def assign_(self, update: Iterate | Lifted, state: OptimizerState, rule: Rule) -> None:
        """Put a new weight and its state in place: the one resize of layer and state together.

        Args:
            update: Weight and state, of any rank.
            state: The optimiser's state, changed in place.
            rule: The optimiser.
        """
        self.layer.resize_(update.point.core, update.point.factors)
        exact = update.point.core.dtype == self.layer.core.dtype
        self._space = update.space if isinstance(update, Iterate) and exact else None
        self._version = self._current_version()
        for parameter in self.parameters:
            state.pop(parameter, None)
        core_state: dict[str, Tensor] = {}
        for name, moment in update.moments.items():
            if isinstance(moment, Tensor):
                core_state[name] = moment
                continue
            core_state[name] = moment.core
            for mode, basis in self._bases.items():
                state.setdefault(basis, {})[name] = moment.factors[mode]
        if rule.counts_steps:
            core_state[_STEP] = torch.tensor(float(update.step))
        if core_state:
            state[self.layer.core] = core_state

    def _step(self, state: OptimizerState) -> int:
        return int(state.get(self.layer.core, {}).get(_STEP, 0))

    def _moments(self, state: OptimizerState, parameter: Tensor, rule: Rule) -> dict[str, Tensor]:
        moments = {}
        own = state.get(parameter, {})
        for name in rule.first_moments + rule.second_moments:
            moment = own.get(name)
            if moment is None:
                continue
            if moment.shape != parameter.shape:
                raise IntegratorStateError(
                    f"{self.name}: got a {name} of shape {tuple(moment.shape)} for a parameter of "
                    f"shape {tuple(parameter.shape)}; load the model's state_dict together with "
                    "the optimiser's"
                )
            moments[name] = moment
        return moments


def _at_least_float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
