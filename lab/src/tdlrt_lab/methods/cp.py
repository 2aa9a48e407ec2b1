"""CP factors as free parameters."""

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

    A 1x1 convolution into r channels, one per channel along each axis of the kernel, and a 1x1 one
    to the outputs. A linear layer has two modes: there it is the matrix factorisation. The start is
    random: a dense start has no CP form of low rank that could be computed reliably.

    Source: Lebedev et al., arXiv:1412.6553.
    """

    def ranks(self, shape: Shape, share: float) -> Ranks:
        """One rank; the full one has as many parameters as the weight."""
        return uniform_ranks([math.prod(shape) // sum(shape)], share)

    def size(self, shape: Shape, ranks: Ranks) -> int:
        """That is r (n_1 + ... + n_d)."""
        return ranks[0] * sum(shape)

    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """One stage per mode."""
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
