"""CP decomposition with the factors as parameters."""

import math
from functools import reduce

import torch
from torch import nn

from tdlrt_lab.methods.factored import (
    Factored,
    Ranks,
    Shape,
    balanced,
    in_sequence,
    stage,
)
from tdlrt_lab.methods.sizes import uniform_ranks

__all__ = ["CP"]


class CP(Factored):
    """Train the factors of W = sum_r a_r o b_r o c_r o d_r.

    A convolution becomes a 1x1 convolution to r channels, a depthwise convolution along each axis
    of the kernel, and a 1x1 convolution to the outputs; a linear layer becomes two linear layers.
    The initial factors are random, because no reliable algorithm computes a low-rank CP
    decomposition of the dense initial weight.

    Source: Lebedev et al., arXiv:1412.6553.
    """

    def ranks(self, shape: Shape, share: float) -> Ranks:
        """One rank r; at share 1 the factors have about as many entries as the weight."""
        return uniform_ranks([math.prod(shape) // sum(shape)], share)

    def size(self, shape: Shape, ranks: Ranks) -> int:
        """R (n_1 + ... + n_d)."""
        return ranks[0] * sum(shape)

    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """One layer per mode."""
        weight, (rank,) = layer.get_parameter("weight"), ranks
        factors = [torch.randn(size, rank) for size in weight.shape]
        overlaps = reduce(torch.mul, [factor.mT @ factor for factor in factors])
        norm = float(overlaps.sum().sqrt())
        outputs, inputs, *taps = balanced(factors, norm, float(weight.norm()))
        stages = [stage(layer, inputs.mT)]
        stages += [
            stage(layer, factor.mT[:, None], [axis], groups=rank)
            for axis, factor in enumerate(taps)
        ]
        return in_sequence(layer, [*stages, stage(layer, outputs)])
