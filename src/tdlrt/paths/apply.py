"""Forward passes of Tucker layers along a path: the kernels of its stages, applied to an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce as reduce_pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdlrt.linalg import multi_mode_product
from tdlrt.paths.choose import cached_path, choose_path
from tdlrt.paths.modes import expanding_modes, reducing_modes
from tdlrt.paths.stages import FOLDS_IN, FOLDS_OUT, LayerShape, PathName

__all__ = [
    "ModeMap",
    "conv_stages",
    "fastest_path",
    "is_channels_last",
    "known_shape",
    "linear_stages",
    "tucker_conv",
    "tucker_linear",
]

UNKNOWN_SIZE = 32
"""Assumed for a size that is unknown when a layer is traced, such as a dynamic batch size."""

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_stages(
    core: Tensor, factors: Sequence[Tensor], path: PathName, *, channels_last: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Kernels of the convolutions by which a Tucker kernel is applied.

    'three_stage': the input channels are reduced by U_1^T (1x1), the core acts on r_1 channels,
    and U_0 (1x1) expands to the output channels. 'fold_in' folds U_1 into the core, 'fold_out'
    folds U_0, and 'dense' folds both. The spatial factors are always folded, because the cost of
    that does not grow with the batch or the image. They are applied as one matrix, their Kronecker
    product (taps x spatial ranks).

    Args:
        core: C, of shape r_0 x r_1 x (spatial ranks).
        factors: U_i, of shape n_i x r_i.
        path: One of `PATHS`.
        channels_last: Whether the middle kernel lies in memory with the channels last. The order of
            contractions depends on it, so that the largest tensor is not copied.

    Returns:
        The kernels (r_1 x n_1 x 1..., or None), (r_0 x r_1 x k...), where n_i replaces the rank of
        a factor that is folded, and (n_0 x r_0 x 1..., or None).
    """
    sizes = [factor.shape[0] for factor in factors[2:]]
    ones = (1,) * len(sizes)
    spatial = reduce_pairwise(torch.kron, factors[2:])
    # From here on the shape is r_0 x r_1 x taps, in memory r_0 x taps x r_1 if channels_last: the
    # output of a convolution gets the layout of its weight. Every product multiplies two matrices,
    # since `matmul` of other shapes rounds differently depending on which tensor needs a gradient.
    r_out, r_in = core.shape[:2]
    kernel = (core.reshape(r_out * r_in, -1) @ spatial.mT).reshape(r_out, r_in, -1)
    if channels_last:
        kernel = kernel.mT.contiguous().mT
    if path in FOLDS_IN:
        kernel = (kernel.mT.reshape(-1, r_in) @ factors[1].mT).reshape(r_out, kernel.shape[2], -1)
        kernel = kernel.mT if channels_last else kernel.mT.contiguous()
    if path in FOLDS_OUT and channels_last:
        rows = kernel.mT.flatten(1)
        kernel = (factors[0] @ rows).reshape(-1, kernel.shape[2], kernel.shape[1]).mT
    elif path in FOLDS_OUT:
        kernel = (factors[0] @ kernel.flatten(1)).reshape(-1, *kernel.shape[1:])
    kernel = kernel.reshape(*kernel.shape[:2], *sizes)
    reduce = None if path in FOLDS_IN else factors[1].mT.reshape(*factors[1].mT.shape, *ones)
    expand = None if path in FOLDS_OUT else factors[0].reshape(*factors[0].shape, *ones)
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
    path: PathName,
) -> Tensor:
    """Convolution with the kernel W = C x_j U_j, along one of the paths of `conv_stages`.

    Args:
        input: x, of shape (batch, n_1, spatial...) or (n_1, spatial...).
        core: C, of shape r_0 x r_1 x (spatial ranks).
        factors: U_i, of shape n_i x r_i.
        bias: b, of shape (n_0,).
        stride: As in torch's convolutions.
        padding: As in torch's convolutions.
        dilation: As in torch's convolutions.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        border: Widths for `torch.nn.functional.pad`, used if padding_mode is not 'zeros'.
        path: One of `PATHS`.

    Returns:
        The output, of shape (batch, n_0, spatial...) or (n_0, spatial...).
    """
    convolve = _CONV[core.ndim - 2]
    channels_last = is_channels_last(input, core.ndim)
    reduce, kernel, expand = conv_stages(core, factors, path, channels_last=channels_last)
    if reduce is not None:
        input = convolve(input, reduce)
    if padding_mode != "zeros":  # padding commutes with the 1x1 convolution and is cheaper after it
        input, padding = F.pad(input, list(border), mode=padding_mode), 0
    middle_bias = bias if expand is None else None
    output = convolve(input, kernel, middle_bias, stride, padding, dilation)
    return output if expand is None else convolve(output, expand, bias)


class ModeMap(NamedTuple):
    """A matrix M that acts on one mode of vectors, seen as tensors of shape before x n x after.

    Attributes:
        matrix: M, of shape m x n.
        before: Product of the sizes of the modes before it.
        after: Product of the sizes of the modes after it.
    """

    matrix: Tensor
    before: int = 1
    after: int = 1

    def __call__(self, input: Tensor) -> Tensor:
        """Map (..., before * n * after) to (..., before * m * after)."""
        if self.before == self.after == 1:
            return F.linear(input, self.matrix)
        sizes = self.before, self.matrix.shape[1], self.after
        modes = input.reshape(*input.shape[:-1], *sizes)
        return F.linear(modes.mT, self.matrix).mT.flatten(-3)


def linear_stages(
    core: Tensor, factors: Sequence[Tensor], path: PathName, row_modes: int = 1
) -> list[ModeMap]:
    """Maps that are applied one after the other instead of a matrix W = U_out C U_in^T.

    For a weight with several modes of rows or columns, U_out and U_in are Kronecker products of
    bases, which are never formed: each basis acts on its own mode.

    Args:
        core: C, of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i; first those of the rows, then those of the columns.
        path: One of `PATHS`.
        row_modes: How many of the modes are rows.

    Returns:
        U_in^T, C, U_out for 'three_stage'; C U_in^T, U_out for 'fold_in'; U_in^T, U_out C for
        'fold_out'; U_out C U_in^T for 'dense'.
    """
    sizes, ranks = [factor.shape[0] for factor in factors], list(core.shape)
    rows, columns = factors[:row_modes], factors[row_modes:]
    reduce, expand = [], []
    if path in FOLDS_IN:
        core = multi_mode_product(core, [*[None] * row_modes, *columns])
    else:
        for one in reducing_modes(sizes[row_modes:], ranks[row_modes:]):
            reduce.append(ModeMap(columns[one.mode].mT, one.before, one.after))
    if path in FOLDS_OUT:
        core = multi_mode_product(core, rows)
    else:
        for one in expanding_modes(sizes[:row_modes], ranks[:row_modes]):
            expand.append(ModeMap(rows[one.mode], one.before, one.after))
    matrix = core.flatten(row_modes).flatten(0, row_modes - 1)
    return [*reduce, ModeMap(matrix), *expand]


def tucker_linear(
    input: Tensor,
    core: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    path: PathName,
    row_modes: int = 1,
) -> Tensor:
    """Linear map y = x W^T + b with W = C x_i U_i as a matrix of rows times columns.

    Args:
        input: x, of shape (..., columns).
        core: C, of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i; first those of the rows, then those of the columns.
        bias: b, of shape (rows,).
        path: One of `PATHS`; see `linear_stages`.
        row_modes: How many of the modes are rows.

    Returns:
        The output, of shape (..., rows).
    """
    *first, last = linear_stages(core, factors, path, row_modes)
    for stage in first:
        input = stage(input)
    if last.before == last.after == 1:
        return F.linear(input, last.matrix, bias)
    output = last(input)
    return output if bias is None else output + bias.to(output.dtype)  # autocast lowers the first


def fastest_path(shape: LayerShape, tensors: Sequence[Tensor]) -> PathName:
    """The fastest path of one call, for training if one of the tensors needs a gradient."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # A compiler cannot trace a cached function, and calls this only once per graph.
    choose = choose_path if torch.compiler.is_compiling() else cached_path
    return choose((shape,), "training" if trains else "inference")


def known_shape(input: Tensor) -> tuple[int, ...]:
    """The shape with `UNKNOWN_SIZE` for sizes that a tracer leaves open, so no guard is made."""
    if torch.compiler.is_compiling():
        # Imported here because it imports sympy, which takes longer to load than tdlrt.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return tuple(size if has_static_value(size) else UNKNOWN_SIZE for size in input.shape)
    return tuple(size if isinstance(size, int) else UNKNOWN_SIZE for size in input.shape)


def has_known_shape(tensor: Tensor) -> bool:
    """Whether a tracer leaves no size of the tensor open."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return all([has_static_value(size) for size in tensor.shape])
    return True


def is_channels_last(input: Tensor, order: int) -> bool:
    """Whether a batch of images lies in memory with the channels last, by torch's own rule.

    A batch with one channel or one pixel has both layouts at once; then the strides show which
    layout was asked for.
    """
    if order < 4 or input.ndim != order:
        return False
    strides = input.stride()
    return strides[1] == 1 and strides[-1] == input.shape[1]
