"""The dense network, without compression."""

from torch import nn

from tdlrt_lab.methods.method import Method
from tdlrt_lab.options import RunOptions

__all__ = ["Dense"]


class Dense(Method):
    """Train the dense network.

    It ignores the options of other methods, because a baseline has the options of its run.
    """

    options = frozenset()
    needs_budget = False

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave every layer unchanged."""
        return {}
