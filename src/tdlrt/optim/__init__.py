"""The integrators, from pure steps to the torch optimiser."""

from tdlrt.optim.graphs import GraphedStep
from tdlrt.optim.optimizer import TDLRT

__all__ = ["TDLRT", "GraphedStep"]
