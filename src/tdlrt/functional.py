"""Forward passes of Tucker layers: the weight is applied through its factors, never formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from tdlrt.linalg import mode_product

__all__ = ["conv_stages", "tucker_conv", "tucker_linear"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_stages(
    core: Tensor, factors: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Kernels of the three convolutions that a Tucker kernel factorises into.

    The input channels are reduced by U_1^T (1x1), the core with the spatial factors folded in
    (their cost does not grow with batch or image) acts on r_1 channels, and U_0 (1x1) expands
    to the output channels. A channel mode of full rank is folded into the core: its 1x1 would
    only cost.

    Args:
        core: C, of shape r_0 x r_1 x (spatial ranks).
        factors: U_i, of shape n_i x r_i.

    Returns:
        The kernels (r_1 x n_1 x 1..., or None), (r_0 x r_1 x k...), (n_0 x r_0 x 1..., or None).
    """
    kernel, dimensions = core, core.ndim - 2
    for mode in range(2, core.ndim):
        kernel = mode_product(kernel, factors[mode], mode)
    ones = (1,) * dimensions
    reduce = expand = None
    if factors[1].shape[0] > factors[1].shape[1]:
        reduce = factors[1].mT.reshape(*factors[1].mT.shape, *ones)
    else:
        kernel = mode_product(kernel, factors[1], 1)
    if factors[0].shape[0] > factors[0].shape[1]:
        expand = factors[0].reshape(*factors[0].shape, *ones)
    else:
        kernel = mode_product(kernel, factors[0], 0)
    return reduce, kernel, expand


def tucker_conv(
    input: Tensor,
    core: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    padding_mode: str = "zeros",
    border: Sequence[int] = (),
) -> Tensor:
    """Convolution with the kernel W = C x_j U_j in three stages: 1x1, core, 1x1.

    Args:
        input: x, of shape (batch, n_1, spatial...) or (n_1, spatial...).
        core: C, of shape r_0 x r_1 x (spatial ranks).
        factors: U_i, of shape n_i x r_i.
        bias: b, of shape (n_0,).
        stride: As in torch's convolutions.
        padding: As in torch's convolutions.
        dilation: As in torch's convolutions.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        border: Widths for `torch.nn.functional.pad`; used where padding_mode is not 'zeros'.

    Returns:
        The output, of shape (batch, n_0, spatial...) or (n_0, spatial...).
    """
    convolve = _CONV[core.ndim - 2]
    reduce, kernel, expand = conv_stages(core, factors)
    if reduce is not None:
        input = convolve(input, reduce)
    if padding_mode != "zeros":  # padding commutes with the 1x1 and is cheaper after it
        input, padding = F.pad(input, list(border), mode=padding_mode), 0
    middle_bias = bias if expand is None else None
    output = convolve(input, kernel, middle_bias, stride, padding, dilation)
    return output if expand is None else convolve(output, expand, bias)


def tucker_linear(
    input: Tensor, core: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """Linear map y = x W^T + b with W = U_0 C U_1^T, in three stages.

    Args:
        input: x, of shape (..., n_1).
        core: C, of shape r_0 x r_1.
        factors: U_0 (n_0 x r_0) and U_1 (n_1 x r_1).
        bias: b, of shape (n_0,).

    Returns:
        The output, of shape (..., n_0).
    """
    return F.linear(F.linear(F.linear(input, factors[1].mT), core), factors[0], bias)
