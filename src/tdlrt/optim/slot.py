"""A Tucker layer together with its share of the optimiser's state: read, and written as one."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.linalg import TangentSpace, TangentVector, TuckerTensor
from tdlrt.nn import TuckerLayer
from tdlrt.optim.steps import Augmented, Iterate

__all__ = ["LayerSlot"]

_MOMENTUM = "momentum_buffer"


class LayerSlot:
    """Access to one layer: its weight, gradient and momentum as the pure steps want them.

    The momentum is kept in the optimiser's `state` under the same key as in torch.optim.SGD, the
    core's part with the core and each basis part with its basis, all of their Parameters' shapes.

    Args:
        name: Name of the layer in the model.
        layer: The layer.
    """

    def __init__(self, name: str, layer: TuckerLayer) -> None:
        self.name = name
        self.layer = layer
        self._space: TangentSpace | None = None
        self._version: list[tuple[int, int]] = []

    @property
    def parameters(self) -> list[Tensor]:
        """Core and learned bases, in a fixed order."""
        layer = self.layer
        return [layer.core, *(layer.factors[mode] for mode in layer.learned_modes)]

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

    def _tangent_space(self) -> TangentSpace:
        """Tangent space at the weight; the last step's own unless somebody else wrote since."""
        if self._space is None or self._version != self._current_version():
            self._space = TangentSpace(*self.point(), self.layer.learned_modes)
            self._version = self._current_version()
        return self._space

    def _current_version(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]

    def gradient(self, space: TangentSpace) -> TangentVector:
        """Projected gradient, from what autograd left in `.grad`, which is only read."""
        factors = [factor.grad for factor in self.layer.factors]
        return space.gradient(
            self.core_gradient(),
            [None if grad is None else _at_least_float32(grad) for grad in factors],
        )

    def core_gradient(self) -> Tensor:
        """Gradient of the core."""
        gradient = self.layer.core.grad
        if gradient is None:
            raise IntegratorStateError(f"{self.name}.core: got no gradient; call backward() first")
        return _at_least_float32(gradient)

    def iterate(self, state: MutableMapping[Any, Any]) -> Iterate:
        """Weight and momentum at rest."""
        space = self._tangent_space()
        core = self._momentum(state, self.layer.core)
        if core is None:
            return Iterate(space, None)
        parts = []
        for factor in self.layer.factors:
            part = self._momentum(state, factor)
            parts.append(torch.zeros_like(factor) if part is None else part)
        return Iterate(space, TangentVector(core, tuple(parts)))

    def augmented(self, state: MutableMapping[Any, Any]) -> Augmented:
        """Weight and momentum between a basis step and the truncation."""
        return Augmented(self.point(), self._momentum(state, self.layer.core))

    def assign_(self, update: Iterate | Augmented, state: MutableMapping[Any, Any]) -> None:
        """Put a new weight and its momentum in place: the one resize of layer and state together.

        Args:
            update: Weight and momentum, of any rank.
            state: The optimiser's state, changed in place.
        """
        self.layer.resize_(update.point.core, update.point.factors)
        exact = update.point.core.dtype == self.layer.core.dtype
        self._space = update.space if isinstance(update, Iterate) and exact else None
        self._version = self._current_version()
        for parameter in self.parameters:
            state.pop(parameter, None)
        momentum = update.momentum
        if isinstance(momentum, TangentVector):
            state[self.layer.core] = {_MOMENTUM: momentum.core}
            for mode in self.layer.learned_modes:
                state[self.layer.factors[mode]] = {_MOMENTUM: momentum.factors[mode]}
        elif momentum is not None:
            state[self.layer.core] = {_MOMENTUM: momentum}

    def _momentum(self, state: MutableMapping[Any, Any], parameter: Tensor) -> Tensor | None:
        momentum: Tensor | None = state.get(parameter, {}).get(_MOMENTUM)
        if momentum is not None and momentum.shape != parameter.shape:
            raise IntegratorStateError(
                f"{self.name}: got a momentum of shape {tuple(momentum.shape)} for a parameter of "
                f"shape {tuple(parameter.shape)}; load the model's state_dict together with the "
                "optimiser's"
            )
        return momentum


def _at_least_float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
