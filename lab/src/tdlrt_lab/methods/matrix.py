"""Matrix factorisation W = U V^T with the factors as parameters."""

import math

from torch import nn

from tdlrt_lab.methods.factored import (
    Factored,
    Ranks,
    Shape,
    in_sequence,
    stage,
    train_cores,
)
from tdlrt_lab.methods.sizes import uniform_ranks

__all__ = ["Matrix"]


class Matrix(Factored):
    """Train U and V of W = U V^T, W reshaped to outputs x (inputs times taps).

    V^T is a convolution to r channels and U a 1x1 convolution. The initial factors are those of the
    truncated SVD.
    """

    def ranks(self, shape: Shape, share: float) -> Ranks:
        """One rank; the full rank is min(n_1, n_2 ... n_d)."""
        return uniform_ranks([min(shape[0], math.prod(shape[1:]))], share)

    def size(self, shape: Shape, ranks: Ranks) -> int:
        """R (n_1 + n_2 ... n_d)."""
        return ranks[0] * (shape[0] + math.prod(shape[1:]))

    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """V^T, then U."""
        weight = layer.get_parameter("weight")
        left, right = train_cores(weight.flatten(1), ranks)
        reduce = right.reshape(ranks[0], *weight.shape[1:])
        stages = [stage(layer, reduce, range(weight.ndim - 2)), stage(layer, left[0])]
        return in_sequence(layer, stages)
