"""What direct trainings of a factorised weight share: plain torch layers in sequence.

Plain layers in place of TensorLy-Torch's: these keep every option of the convolution (theirs drops
`padding_mode`, and fails for padding 'same'), and their multiply-adds are counted as for any layer.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt_lab.methods.method import FREE_FACTOR_RATES, Method
from tdlrt_lab.methods.sizes import (
    dense_sizes,
    factorizable,
    largest_shares,
)
from tdlrt_lab.options import RunOptions

__all__ = ["Factored", "balanced", "in_sequence", "stage", "train_cores"]

Ranks = tuple[int, ...]
Shape = Sequence[int]


class Factored(Method):
    """Train the factors of every weight as free parameters by the plain optimiser.

    Size: every layer has the same share of its full ranks, up to rounding, the largest that fits
    `budget`; all factors count. The start has the norm of the layer's own, as for `tucker`.
    """

    learning_rates = FREE_FACTOR_RATES

    @abstractmethod
    def ranks(self, shape: Shape, share: float) -> Ranks:
        """Ranks of a weight of the given shape at a share of the full ranks."""

    @abstractmethod
    def size(self, shape: Shape, ranks: Ranks) -> int:
        """Numbers in the factors."""

    @abstractmethod
    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """The layer with factors in place of its weight; takes over its bias."""

    @torch.no_grad()
    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Replace every layer that `tdlrt.factorize_` would take."""
        layers = factorizable(model)
        sizes = dense_sizes(layers)
        shapes = {name: layer.get_parameter("weight").shape for name, layer in layers.items()}

        def size(name: str, share: float) -> int:
            return self.size(shapes[name], self.ranks(shapes[name], share))

        shares = largest_shares(size, config.budget or 1.0, sizes)
        for name, layer in layers.items():
            ranks = self.ranks(shapes[name], shares[name])
            model.set_submodule(name, self.replacement(layer, ranks))
        return sizes


def stage(
    layer: nn.Module, weight: Tensor, axes: Collection[int] = (), *, groups: int = 1
) -> nn.Module:
    """One of the small layers that stand for a convolution or linear layer, without bias.

    Args:
        layer: The layer.
        weight: Weight of the small one, outputs x inputs; the taps follow.
        axes: Spatial axes along which it convolves: stride, padding and dilation of these are
            the layer's, and 1, 0 and 1 of the others.
        groups: Groups of channels.
    """
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if isinstance(layer, nn.Linear):
        small: nn.Module = nn.Linear(inputs, outputs, bias=False)
    else:
        conv: Any = layer
        neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
        options = {name: _along(getattr(conv, name), axes, one) for name, one in neutral.items()}
        mode = conv.padding_mode if axes else "zeros"
        small = type(conv)(inputs, outputs, **options, groups=groups, bias=False, padding_mode=mode)
    parameter = small.get_parameter("weight")
    parameter.copy_(weight.reshape(parameter.shape))
    return small


def _along(values: Any, axes: Collection[int], neutral: int) -> Any:
    if isinstance(values, str):  # 'same' and 'valid' mean the right thing for each axis
        return values
    return tuple(value if axis in axes else neutral for axis, value in enumerate(values))


def in_sequence(layer: nn.Module, stages: list[nn.Module]) -> nn.Module:
    """The stages one after the other; the last takes over the bias."""
    stages[-1].register_parameter("bias", layer._parameters["bias"])
    return nn.Sequential(*stages)


def train_cores(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """The best start of a tensor train: sequential truncated SVDs, at the norm of the tensor.

    W(i_1, ..., i_d) = G_1(i_1) G_2(i_2) ... G_d(i_d), of two modes a truncated SVD.

    Args:
        tensor: W, of shape m_1 x ... x m_d.
        ranks: (r_1, ..., r_{d-1}).

    Returns:
        G_k, of shape r_{k-1} x m_k x r_k with r_0 = r_d = 1.

    Source: Oseledets, Tensor-train decomposition, 2011, algorithm 1.
    """
    cores: list[Tensor] = []
    rest = tensor
    for size, rank in zip(tensor.shape, ranks, strict=False):
        left = rest.reshape(rest.shape[0] if cores else 1, size, -1).flatten(0, 1)
        basis, values, directions = torch.linalg.svd(left, full_matrices=False)
        cores.append(basis[:, :rank].reshape(-1, size, rank))
        rest = values[:rank, None] * directions[:rank]
    cores.append(rest[:, :, None])
    return balanced(cores, float(rest.norm()), float(tensor.norm()))


def balanced(factors: list[Tensor], norm: float, wanted: float) -> list[Tensor]:
    """Scale factors so that all have one norm and their product, of norm `norm`, has `wanted`."""
    norms = [float(factor.norm()) for factor in factors]
    each = (wanted / norm * math.prod(norms)) ** (1 / len(factors))
    return [factor * (each / own) for factor, own in zip(factors, norms, strict=True)]
