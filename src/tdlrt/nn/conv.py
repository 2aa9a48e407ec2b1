"""Convolutions with a kernel in Tucker format: TuckerConv1d, TuckerConv2d, TuckerConv3d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn.layer import TuckerLayer
from tdlrt.nn.start import Modes, Start
from tdlrt.paths import LayerShape, PathChoice, conv_shape
from tdlrt.paths.apply import conv_stages, tucker_conv
from tdlrt.ranks import RankSpec

__all__ = ["TuckerConv1d", "TuckerConv2d", "TuckerConv3d"]

Self = TypeVar("Self", bound="_TuckerConv")

_OPTIONS = ("stride", "padding", "dilation", "padding_mode")
_SIZES = ("kernel_size", "in_channels", "out_channels")
# The same for every Tucker convolution; code that rebuilds a convolution reads them.
_FIXED = ("groups", "transposed", "output_padding")


class _TuckerConv(TuckerLayer):
    """y = conv(x, C x_1 U_1 ... x_d U_d) + b, applied in the cheapest order (see `path`).

    Arguments are those of the torch layer of the same dimension, plus the following.

    Args:
        rank: Fraction in (0, 1] of the channel modes, int, tuple with one rank per mode, 'full',
            or `RelativeTolerance`.
        modes: 'all', or 'channels' to leave the kernel modes unfactorised (Tucker-2).
        init_scale: Norm of the initial weight relative to that of torch's initial weight; None
            keeps the norm of the truncated weight.

    Raises:
        UnsupportedLayerError: groups is not 1.
        RankError: The rank is not positive, or larger than its mode.
    """

    plain: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: RankSpec = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
    ) -> None:
        arguments: tuple[Any, ...] = (
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups),
            *(bias, padding_mode, device, dtype),
        )
        self._take_over(self.plain(*arguments), rank, modes, init_scale)

    @classmethod
    def from_conv(
        cls: type[Self],
        conv: nn.Module,
        *,
        rank: Start = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
    ) -> Self:
        """Factorise a torch convolution by truncated HOSVD; the bias Parameter is shared with it.

        Args:
            conv: A convolution of exactly the torch class that this class replaces, with groups=1.
            rank: See the class; or a `TuckerTensor` that replaces the weight.
            modes: See the class.
            init_scale: See the class.

        Raises:
            UnsupportedLayerError: The layer is of another class, or grouped, or its weight is
                complex, quantised or computed from other parameters.
            RankError: The rank is not positive, or larger than its mode, or a `TuckerTensor` does
                not fit.
            NonFiniteError: The weight is not finite.
        """
        layer = cls.__new__(cls)
        layer._take_over(conv, rank, modes, init_scale)
        return layer

    def _take_over(
        self, conv: nn.Module, rank: Start, modes: Modes, init_scale: float | None
    ) -> None:
        if type(conv) is not self.plain:
            raise UnsupportedLayerError(
                f"conv: got {type(conv).__name__}, expected torch.nn.{self.plain.__name__} itself "
                "(no subclass, no transposed convolution)"
            )
        if conv.groups != 1:
            raise UnsupportedLayerError(
                f"groups: got {conv.groups}, expected 1; leave a grouped convolution dense, it is "
                "already factorised"
            )
        self._factorize(conv, rank, modes, init_scale)
        for name in (*_OPTIONS, *_SIZES, *_FIXED):
            setattr(self, name, getattr(conv, name))
        self._border = tuple(conv._reversed_padding_repeated_twice)

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _apply_weight(self, input: Tensor) -> Tensor:
        bases = self._bases
        return tucker_conv(
            input,
            self.core,
            bases,
            self.bias,
            **self._options,
            border=self._border,
            path=self._call_path(input, bases),
        )

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """The shapes of the layer and of an input, from which a path is chosen."""
        stride, padding, dilation, _ = self._options.values()
        return conv_shape(
            self.shape,
            self.ranks,
            input,
            stride=stride,
            padding=padding,
            dilation=dilation,
            channels_last=channels_last,
            input_grad=input_grad,
        )

    def to_dense(self) -> nn.Module:
        """The torch convolution with the kernel in full."""
        dense = self._convolution(self.dense_weight(), self.bias, **self._options)
        self._hand_over(dense)
        return dense

    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Torch convolutions in sequence: 1x1, core, 1x1, or fewer where that is cheaper."""
        factors, path = self._bases, self._chosen_plain_path(path)
        reduce, kernel, expand = conv_stages(self.core, factors, path)
        stages = [] if reduce is None else [self._convolution(reduce, None)]
        if expand is None:
            stages.append(self._convolution(kernel, self.bias, **self._options))
        else:
            stages.append(self._convolution(kernel, None, **self._options))
            stages.append(self._convolution(expand, self.bias))
        plain = stages[0] if len(stages) == 1 else nn.Sequential(*stages)
        self._hand_over(plain)
        return plain

    @torch.no_grad()
    def _convolution(self, weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Module:
        outputs, inputs, *kernel_size = weight.shape
        arguments: tuple[Any, ...] = (inputs, outputs, tuple(kernel_size))
        options |= {"bias": bias is not None, "device": "meta"}
        conv = self.plain(*arguments, **options)
        conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach().clone())
        return conv

    def extra_repr(self) -> str:
        """Arguments of the constructor, as torch prints them, and the ranks."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, value in self._options.items():
            text += f", {name}={value!r}"
        return f"{text}, bias={self.bias is not None}, {self._own_repr}"


class TuckerConv1d(_TuckerConv):
    """`torch.nn.Conv1d` with a Tucker kernel (d = 3)."""

    plain = nn.Conv1d


class TuckerConv2d(_TuckerConv):
    """`torch.nn.Conv2d` with a Tucker kernel (d = 4)."""

    plain = nn.Conv2d


class TuckerConv3d(_TuckerConv):
    """`torch.nn.Conv3d` with a Tucker kernel (d = 5)."""

    plain = nn.Conv3d


for _cls in (TuckerConv1d, TuckerConv2d, TuckerConv3d):
    _cls.__doc__ = f"{_cls.__doc__}\n\n    {_TuckerConv.__doc__}"
