"""The size of a network, measured in the same way for every method, and how to meet a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from tdlrt.errors import RankError
from tdlrt.surgery import factorize_

__all__ = [
    "Size",
    "check_budget",
    "dense_sizes",
    "factorizable",
    "kept_parameters",
    "largest_share",
    "largest_shares",
    "tucker_size",
    "uniform_ranks",
]

BISECTIONS = 16


class Size(NamedTuple):
    """Parameters of the layers that a method compresses, without biases, and of the network."""

    parameters: int
    dense_parameters: int
    network_parameters: int
    network_dense_parameters: int

    @property
    def compression(self) -> float:
        """1 - parameters / dense_parameters of these layers; 0 if there are none."""
        return 1 - self.parameters / self.dense_parameters if self.dense_parameters else 0.0

    @property
    def network_compression(self) -> float:
        """1 - parameters / dense parameters of the whole network."""
        return 1 - self.network_parameters / self.network_dense_parameters


def factorizable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a dense network that `tdlrt.factorize_` would factorise, by name."""
    rows = factorize_(model, rank=1, dry_run=True).factorized
    return {row.name: model.get_submodule(row.name) for row in rows}


def dense_sizes(layers: dict[str, nn.Module]) -> dict[str, int]:
    """Number of entries in the weight of each dense layer."""
    return {name: layer.get_parameter("weight").numel() for name, layer in layers.items()}


def kept_parameters(module: nn.Module, *, biases: bool = True) -> int:
    """Number of parameters of a module, without those that `torch.nn.utils.prune` has masked.

    The masks are not counted: their cost depends on how they are stored.

    Args:
        module: The module; a shared parameter counts once.
        biases: Whether biases count.
    """
    counts: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name != "bias" or biases:
                mask = part._buffers.get(name.removesuffix("_orig") + "_mask")
                kept = parameter.numel() if mask is None else int(mask.sum())
                counts.setdefault(parameter, kept)
    return sum(counts.values())


def check_budget(smallest: int, budget: float, dense: int) -> None:
    """Check that the smallest possible network is within the budget.

    Args:
        smallest: Parameters of the smallest network.
        budget: Share of the dense parameters that the network may have.
        dense: Dense parameters.

    Raises:
        RankError: The smallest network is larger.
    """
    if smallest > budget * dense:
        raise RankError(
            f"budget {budget}: the smallest network of this method has {smallest:,} of {dense:,} "
            f"parameters, expected at most {budget * dense:,.0f}; "
            f"give at least {smallest / dense:.2g}"
        )


def largest_share(size: Callable[[float], int], budget: float, dense: int) -> float:
    """The largest share in [0, 1] whose network is within the budget, by bisection.

    Args:
        size: Number of parameters as a nondecreasing function of the share.
        budget: Share of the dense parameters that the network may have.
        dense: Dense parameters.

    Returns:
        The share.

    Raises:
        RankError: The network is too large even at share 0.
    """
    check_budget(size(0.0), budget, dense)
    return _bisect(size, budget * dense, 0.0, 1.0)


def largest_shares(
    size: Callable[[str, float], int], budget: float, layers: Mapping[str, int]
) -> dict[str, float]:
    """The largest common share within the budget, then larger shares where rounding leaves room.

    Ranks are integers, so the common share does not use up the budget. The rest goes to the layers
    in turn, the largest first; no layer gets more than twice the common share.

    Args:
        size: Number of parameters of a layer, given its name and a share; nondecreasing in the
            share.
        budget: Share of the dense parameters that the layers may have together.
        layers: Dense parameters of each layer.

    Returns:
        The share of each layer.

    Raises:
        RankError: The network is too large even at share 0.
    """
    dense = sum(layers.values())
    share = largest_share(lambda one: sum(size(name, one) for name in layers), budget, dense)
    sizes = {name: size(name, share) for name in layers}
    shares = {}
    for name in sorted(layers, key=layers.__getitem__, reverse=True):
        rest = budget * dense - sum(sizes.values()) + sizes[name]
        shares[name] = _bisect(partial(size, name), rest, share, min(1.0, 2 * share))
        sizes[name] = size(name, shares[name])
    return shares


def _bisect(size: Callable[[float], int], limit: float, low: float, high: float) -> float:
    if size(high) <= limit:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def uniform_ranks(full: Sequence[int], share: float) -> tuple[int, ...]:
    """The given share of each full rank, rounded, and at least 1.

    >>> uniform_ranks((20, 3), 0.25)
    (5, 1)
    """
    return tuple(max(1, round(share * rank)) for rank in full)


def tucker_size(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Number of entries in the core and the bases of a weight."""
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
