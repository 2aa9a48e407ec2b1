"""The base class of methods that train the factors of each weight as a sequence of torch layers.

Torch layers keep every option of a convolution, and their multiply-adds are counted like those of
any layer. The layers of TensorLy-Torch drop `padding_mode` and fail for padding 'same'.
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
    """Train the factors of every weight as parameters, with an ordinary optimiser.

    Size: every layer has the same share of its full ranks, up to rounding: the largest share within
    `budget`. All factors count. The initial weights keep the norm of the dense layer, as in
    `tucker`.
    """

    learning_rates = FREE_FACTOR_RATES

    @abstractmethod
    def ranks(self, shape: Shape, share: float) -> Ranks:
        """The ranks of a weight of shape `shape`, at a share of the full ranks."""

    @abstractmethod
    def size(self, shape: Shape, ranks: Ranks) -> int:
        """Number of entries in the factors."""

    @abstractmethod
    def replacement(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """Layers with the factors of the weight, and with the same bias Parameter."""

    @torch.no_grad()
    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Replace every layer that `tdlrt.factorize_` would factorise."""
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
    """One of the layers that replace a convolution or linear layer, without bias.

    Args:
        layer: The layer to replace.
        weight: Weight of the new layer, of shape outputs x inputs x kernel; the kernel is that
            along `axes`.
        axes: Spatial axes along which the new layer convolves, with the stride, padding and
            dilation of `layer`; along the others these are 1, 0 and 1.
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
    if isinstance(values, str):  # 'same' and 'valid' apply to every axis
        return values
    return tuple(value if axis in axes else neutral for axis, value in enumerate(values))


def in_sequence(layer: nn.Module, stages: list[nn.Module]) -> nn.Module:
    """The stages as one module; the last one gets the bias Parameter of `layer`."""
    stages[-1].register_parameter("bias", layer._parameters["bias"])
    return nn.Sequential(*stages)


def train_cores(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Tensor-train cores by sequential truncated SVDs, scaled to the norm of the tensor.

    W(i_1, ..., i_d) = G_1(i_1) G_2(i_2) ... G_d(i_d); for d = 2 this is the truncated SVD.

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
    """Scale factors to equal norms, and so that the norm of their product changes to `wanted`.

    Args:
        factors: The factors.
        norm: Norm of their product.
        wanted: Norm of the product of the scaled factors.
    """
    norms = [float(factor.norm()) for factor in factors]
    common = (wanted / norm * math.prod(norms)) ** (1 / len(factors))
    return [factor * (common / own) for factor, own in zip(factors, norms, strict=True)]
