"""Tucker factors as free parameters at fixed ranks ("Tucker vanilla")."""

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

# A share of 0 means rank 1 here, and is no rank for `explicit_ranks`.
SMALLEST_SHARE = 1e-9


class Tucker(Method):
    """Train cores and bases directly, by the plain optimiser, at fixed ranks.

    Size: what `rank` gives; or with a `budget` the same share of the channel modes of every layer,
    up to rounding, the largest that fits. Cores and bases count.
    """

    learning_rates = FREE_FACTOR_RATES
    options = frozenset({"budget", "rank", "init_scale"})
    needs_budget = False

    def check(self, config: RunOptions) -> None:
        """Refuse a rank beside a budget."""
        if config.budget is not None and config.rank != RunOptions.rank:
            raise ConfigError(
                f"rank {config.rank!r} and budget {config.budget!r}: expected one of them for "
                "method 'tucker'; both say the ranks"
            )

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Put the network in Tucker format.

        Free factors start at the norm of the layer: a flat spectrum loses most of it by
        truncation, and there is no tolerance for which learned directions would have to stand out.
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
