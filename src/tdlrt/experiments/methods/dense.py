"""The network as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tdlrt.experiments.methods.method import Method

if TYPE_CHECKING:
    from tdlrt.experiments.config import RunConfig

__all__ = ["Dense"]


class Dense(Method):
    """Train the network as it is.

    It ignores how other methods are made small: the baseline beside a run has the run's options.
    """

    options = frozenset()
    needs_budget = False

    def prepare(self, model: nn.Module, config: RunConfig) -> dict[str, int]:
        """Leave every layer as it is."""
        return {}
