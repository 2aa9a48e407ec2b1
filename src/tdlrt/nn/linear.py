"""Linear layer with a weight in Tucker format, as a matrix or as a tensor: TuckerLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn.layer import TuckerLayer
from tdlrt.nn.reshape import Reshape, check_reshape
from tdlrt.nn.start import Modes, Start, learned_modes
from tdlrt.nn.weight_value import WeightValue
from tdlrt.paths import LayerShape, PathChoice, linear_shape
from tdlrt.paths.apply import ModeMap, linear_stages, tucker_linear
from tdlrt.paths.stages import FOLDS_OUT
from tdlrt.ranks import RankSpec, explicit_ranks
from tdlrt.scalars import as_float

__all__ = ["TuckerLinear"]


class TuckerLinear(TuckerLayer):
    """y = x W^T + b with W = C x_1 U_1 ... x_d U_d, applied in the cheapest order (see `path`).

    W is the matrix, d = 2, or with `reshape` that matrix read as a tensor whose first modes are the
    rows and whose other modes are the columns. A layer behind a flattened map of C x H x W features
    has the modes (out, C, H, W): a direction of its inputs is then a product of three vectors, of
    C + H + W numbers in place of C H W.

    Arguments are those of torch.nn.Linear, plus the following.

    Args:
        rank: Fraction in (0, 1], int, tuple with one rank per mode, 'full', or `RelativeTolerance`.
            Both ranks of a matrix become the smaller of the two. With `reshape` a fraction applies
            to every mode of more than 4.
        modes: As for convolutions. All modes of a linear layer are channel modes.
        init_scale: Norm of the initial weight relative to that of torch's initial weight; None
            keeps the norm of the truncated weight.
        reshape: Sizes of the modes of the rows and of the columns, such as
            ((20, 25), (50, 4, 4)) for 500 x 800; None for the matrix.

    Raises:
        RankError: The rank is not positive, or larger than its mode, or the sizes of `reshape` do
            not multiply to those of the matrix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: RankSpec = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._take_over(linear, rank, modes, init_scale, reshape)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: Start = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
        reshape: Reshape | None = None,
    ) -> TuckerLinear:
        """Factorise a torch.nn.Linear by truncated HOSVD; the bias Parameter is shared with it.

        Args:
            linear: A torch.nn.Linear, not a subclass.
            rank: See the class; or a `TuckerTensor` that replaces the weight.
            modes: See the class.
            init_scale: See the class.
            reshape: See the class.

        Raises:
            UnsupportedLayerError: The layer is of another class, or its weight is complex,
                quantised or computed from other parameters.
            RankError: The rank is not positive, or larger than its mode, or a `TuckerTensor` or
                `reshape` does not fit.
            NonFiniteError: The weight is not finite.
        """
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(
                f"linear: got {type(linear).__name__}, expected torch.nn.Linear itself"
            )
        layer = cls.__new__(cls)
        layer._take_over(linear, rank, modes, init_scale, reshape)
        return layer

    def _take_over(
        self,
        linear: nn.Linear,
        rank: Start,
        modes: Modes,
        init_scale: float | None,
        reshape: Reshape | None,
    ) -> None:
        if reshape is not None:
            reshape = check_reshape(reshape, (linear.out_features, linear.in_features))
            learned_modes(modes, 2)  # refuses other words
            modes, shape = "all", (*reshape[0], *reshape[1])
            if as_float(rank) is not None:
                rank = explicit_ranks(rank, shape, channels=len(shape))
        self._factorize(linear, rank, modes, init_scale, reshape)

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return math.prod(self.shape[self._row_modes :])

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return math.prod(self.shape[: self._row_modes])

    @property
    def _row_modes(self) -> int:
        return 1 if self.reshape is None else len(self.reshape[0])

    @property
    def _matrix(self) -> Tensor:
        return self.dense_weight().reshape(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The full weight as a matrix, out_features x in_features, computed at every access.

        Writing into it raises an `UnsupportedLayerError`, because the write would be lost.
        """
        return WeightValue.of(self._matrix)

    def _apply_weight(self, input: Tensor) -> Tensor:
        if self.reshape is not None:
            self._check_width(input)
        bases = self._bases
        path, rows = self._call_path(input, bases), self._row_modes
        return tucker_linear(input, self.core, bases, self.bias, path=path, row_modes=rows)

    def _check_width(self, input: Tensor) -> None:
        """Refuse, as torch.nn.Linear does, what no pass through several modes would explain."""
        width = input.shape[-1] if input.ndim else 0
        if isinstance(width, int) and width != self.in_features:  # a tracer may leave it open
            raise RuntimeError(
                f"input: got one of shape {tuple(input.shape)}, expected (..., {self.in_features}) "
                f"for a TuckerLinear with in_features={self.in_features}, reshape={self.reshape}"
            )

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """The shapes of the layer and of an input; the memory layout makes no difference."""
        return linear_shape(self.shape, self.ranks, input, input_grad, self._row_modes)

    def to_dense(self) -> nn.Linear:
        """torch.nn.Linear with the weight W in full."""
        dense = _linear(self._matrix, self.bias)
        self._hand_over(dense)
        return dense

    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Two torch.nn.Linear, or one where that is cheaper.

        With `reshape` a basis becomes a Linear or a Conv1d of size 1 that acts on its own mode,
        between an Unflatten and a Flatten.
        """
        path = self._chosen_plain_path(path)
        *first, last = linear_stages(self.core, self._bases, path, self._row_modes)
        stages = [module for stage in first for module in _mode_modules(stage)]
        if last.before == last.after == 1:
            stages.append(_linear(last.matrix, self.bias))
        else:
            stages += _mode_modules(last)
            stages += [] if self.bias is None else _bias_modules(self.bias, last.matrix)
        plain = stages[0] if len(stages) == 1 else nn.Sequential(*stages)
        self._hand_over(plain)
        return plain

    @property
    def plain_parameters(self) -> int:
        """See `TuckerLayer`; includes the ones of the layer that adds a bias to several modes."""
        expands = self.plain_path() not in FOLDS_OUT
        ones = self.bias is not None and self._row_modes > 1 and expands
        return super().plain_parameters + ones * self.out_features

    def extra_repr(self) -> str:
        """Arguments of the constructor, as torch prints them, and the ranks."""
        reshaped = "" if self.reshape is None else f", reshape={self.reshape}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{reshaped}, {self._own_repr}"
        )


def _mode_modules(stage: ModeMap) -> list[nn.Module]:
    """Torch layers that apply a matrix to one mode of features in a batch."""
    matrix, before, after = stage
    if before == after == 1:
        return [_linear(matrix, None)]
    size = matrix.shape[1]
    if after == 1:
        return [nn.Unflatten(-1, (before, size)), _linear(matrix, None), nn.Flatten(-2)]
    if before == 1:
        return [nn.Unflatten(-1, (size, after)), _pointwise(matrix, None), nn.Flatten(-2)]
    return [  # Conv1d takes one dimension before the mode, so the batch has to be part of it
        nn.Unflatten(-1, (before, size, after)),
        nn.Flatten(0, 1),
        _pointwise(matrix, None),
        nn.Unflatten(0, (-1, before)),
        nn.Flatten(1),
    ]


def _bias_modules(bias: Tensor, like: Tensor) -> list[nn.Module]:
    """Torch layers that add a bias: torch has none that does this alone, so they multiply by 1."""
    size = len(bias)
    ones = like.new_ones(size, 1)
    return [nn.Unflatten(-1, (size, 1)), _pointwise(ones, bias, groups=size), nn.Flatten(-2)]


@torch.no_grad()
def _pointwise(weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Conv1d:
    rows, columns = weight.shape
    conv = nn.Conv1d(columns * groups, rows, 1, groups=groups, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(
        weight.detach().clone(memory_format=torch.contiguous_format)[..., None]
    )
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
