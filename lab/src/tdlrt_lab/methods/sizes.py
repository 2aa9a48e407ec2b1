"""The size of a network, measured alike for every method, and how to meet a given one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import nn

from tdlrt.errors import RankError
from tdlrt.surgery import factorize_

__all__ = [
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


def factorizable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a dense network that `tdlrt.factorize_` would put in Tucker format, by name."""
    rows = factorize_(model, rank=1, dry_run=True).factorized
    return {row.name: model.get_submodule(row.name) for row in rows}


def dense_sizes(layers: dict[str, nn.Module]) -> dict[str, int]:
    """Numbers in the weight of each dense layer."""
    return {name: layer.get_parameter("weight").numel() for name, layer in layers.items()}


def kept_parameters(module: nn.Module, *, biases: bool = True) -> int:
    """Parameters of a module; of those under a mask of `torch.nn.utils.prune` the kept ones.

    A mask itself is not counted: what it costs depends on how it is stored.
    """
    return sum(_sizes(module, biases))


def _sizes(module: nn.Module, biases: bool) -> Iterator[int]:
    seen = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter in seen or (name == "bias" and not biases):
                continue
            seen.add(parameter)
            mask = part._buffers.get(name.removesuffix("_orig") + "_mask")
            yield parameter.numel() if mask is None else int(mask.sum())


def check_budget(smallest: int, budget: float, dense: int) -> None:
    """Refuse a budget that the smallest network exceeds.

    Raises:
        RankError: It does.
    """
    if smallest > budget * dense:
        raise RankError(
            f"budget {budget}: the smallest network of this method has {smallest:,} of {dense:,} "
            f"parameters, expected at most {budget * dense:,.0f}; "
            f"give at least {smallest / dense:.2g}"
        )


def largest_share(size: Callable[[float], int], budget: float, dense: int) -> float:
    """The largest share in [0, 1] whose network fits the budget, by bisection.

    Args:
        size: Parameters of the network of a share; does not fall with it.
        budget: Share of the dense parameters that the network may have.
        dense: Dense parameters.

    Returns:
        The share.

    Raises:
        RankError: Even the network of share 0 is larger.
    """
    check_budget(size(0.0), budget, dense)
    return _bisect(size, budget * dense, 0.0, 1.0)


def largest_shares(
    size: Callable[[str, float], int], budget: float, layers: Mapping[str, int]
) -> dict[str, float]:
    """One share for all layers, the largest that fits, and what rounding to ranks leaves over.

    That goes to the layers in turn, the largest first, each up to twice its share.

    Args:
        size: Parameters of a layer, by name, at a share; does not fall with it.
        budget: Share of the dense parameters that the layers may have together.
        layers: Dense parameters of each layer.

    Returns:
        The share of each layer.

    Raises:
        RankError: Even the network of share 0 is larger.
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
    """A share of each full rank, at least 1.

    >>> uniform_ranks((20, 3), 0.25)
    (5, 1)
    """
    return tuple(max(1, round(share * rank)) for rank in full)


def tucker_size(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the core and the bases of a weight of the given shape."""
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
