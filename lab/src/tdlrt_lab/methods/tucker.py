"""Tucker decomposition with cores and bases as parameters and fixed ranks ("Tucker vanilla")."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdlrt.errors import ConfigError
from tdlrt.linalg import possible_ranks
from tdlrt.ranks import explicit_ranks
from tdlrt.surgery import factorize_
from tdlrt_lab.methods.method import FREE_FACTOR_RATES, Method
from tdlrt_lab.methods.sizes import (
    dense_sizes,
    factorizable,
    largest_shares,
    tucker_size,
)
from tdlrt_lab.options import RunOptions

__all__ = ["Tucker"]

Ranks = tuple[int, ...]

SMALLEST_SHARE = 1e-9
"""Gives rank 1; `explicit_ranks` does not accept a share of 0."""


class Tucker(Method):
    """Train cores and bases directly, with an ordinary optimiser and fixed ranks.

    Size: given by `rank`; or with a `budget`, every channel mode of every layer has the same share
    of its full rank, up to rounding: the largest share within the budget. Cores and bases count.
    """

    learning_rates = FREE_FACTOR_RATES
    options = frozenset({"budget", "rank", "init_scale"})
    needs_budget = False

    def check(self, config: RunOptions) -> None:
        """Refuse a rank together with a budget."""
        if config.budget is not None and config.rank != RunOptions.rank:
            raise ConfigError(
                f"rank {config.rank!r} and budget {config.budget!r}: expected one of them for "
                "method 'tucker', because each determines the ranks"
            )

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Factorise the network.

        With init_scale 'auto' the scale is 1, which keeps the norm of each weight: truncation of a
        flat spectrum loses most of the norm. A smaller scale helps to tell learned directions from
        initial ones when a tolerance chooses the ranks, and here the ranks are fixed.
        """
        rank: Any = config.rank
        if config.budget is not None:
            rank = _ranks_within(config.budget, factorizable(model))
        scale = 1.0 if config.init_scale == "auto" else config.init_scale
        report = factorize_(model, rank=rank, init_scale=scale)
        return {row.name: row.dense_parameters for row in report.factorized}


def _ranks_within(budget: float, layers: dict[str, nn.Module]) -> dict[str, Ranks]:
    shapes = {name: layer.get_parameter("weight").shape for name, layer in layers.items()}

    def size(name: str, share: float) -> int:
        return tucker_size(shapes[name], _ranks(share, shapes[name]))

    shares = largest_shares(size, budget, dense_sizes(layers))
    return {name: _ranks(shares[name], shape) for name, shape in shapes.items()}


def _ranks(share: float, shape: Sequence[int]) -> Ranks:
    return possible_ranks(explicit_ranks(max(share, SMALLEST_SHARE), shape))
