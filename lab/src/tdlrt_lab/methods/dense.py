"""The network as it is."""

from torch import nn

from tdlrt_lab.methods.method import Method
from tdlrt_lab.options import RunOptions

__all__ = ["Dense"]


class Dense(Method):
    """Train the network as it is.

    It ignores how other methods are made small: the baseline beside a run has the run's options.
    """

    options = frozenset()
    needs_budget = False

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave every layer as it is."""
        return {}
