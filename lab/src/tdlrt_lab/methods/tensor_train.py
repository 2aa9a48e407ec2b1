"""Tensor-train decomposition with the cores as parameters."""

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

__all__ = ["TensorTrain"]


class TensorTrain(Factored):
    """Train the cores of W(o, i, a, b) = G_1(i) G_2(a) G_3(b) G_4(o).

    A convolution becomes a 1x1 convolution to r_1 channels, a convolution along each axis of the
    kernel, and a 1x1 convolution to the outputs; a linear layer becomes two linear layers. The
    initial cores are those of sequential truncated SVDs.

    Source: Oseledets, Tensor-train decomposition, 2011; Garipov et al., arXiv:1611.03214.
    """

    def ranks(self, shape: Shape, share: float) -> Ranks:
        """Ranks r_1, ..., r_{d-1}, each at most the product of the modes on either side."""
        modes = _train_order(shape)
        full = [min(math.prod(modes[:cut]), math.prod(modes[cut:])) for cut in range(1, len(modes))]
        ranks = [1, *uniform_ranks(full, share), 1]
        for cut in range(1, len(modes)):
            ranks[cut] = min(ranks[cut], ranks[cut - 1] * modes[cut - 1])
        for cut in reversed(range(1, len(modes))):
            ranks[cut] = min(ranks[cut], modes[cut] * ranks[cut + 1])
        return tuple(ranks[1:-1])

    def size(self, shape: Shape, ranks: Ranks) -> int:
        """The sum of r_{k-1} m_k r_k."""
        edges = (1, *ranks, 1)
        return sum(edges[k] * n * edges[k + 1] for k, n in enumerate(_train_order(shape)))

    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """One layer per mode."""
        weight = layer.get_parameter("weight")
        cores = train_cores(weight.movedim(0, -1), ranks)
        stages = [stage(layer, cores[0][0].mT)]
        stages += [stage(layer, core.permute(2, 0, 1), [k]) for k, core in enumerate(cores[1:-1])]
        return in_sequence(layer, [*stages, stage(layer, cores[-1][:, :, 0].mT)])


def _train_order(shape: Shape) -> tuple[int, ...]:
    """The modes in the order in which the cores are applied: inputs, taps, outputs."""
    return (*shape[1:], shape[0])
