"""The integrators, from pure steps to the torch optimiser."""

from tdlrt.optim.optimizer import TDLRT

__all__ = ["TDLRT"]
