"""Linear layer with a weight in Tucker format (d = 2): TuckerLinear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn.layer import TuckerLayer
from tdlrt.nn.start import Modes, Start
from tdlrt.paths import LayerShape, PathChoice, linear_shape
from tdlrt.paths.apply import linear_stages, tucker_linear
from tdlrt.ranks import RankSpec

__all__ = ["TuckerLinear"]


class TuckerLinear(TuckerLayer):
    """y = x (U_0 C U_1^T)^T + b, applied in the cheapest order (see `path`).

    Arguments are those of torch.nn.Linear, plus the following.

    Args:
        rank: Fraction in (0, 1], int, tuple of two ranks, 'full', or `RelativeTolerance`. Both
            ranks become the smaller of the two.
        modes: As for convolutions. Both modes of a matrix are channel modes.
        init_scale: Norm of the initial weight relative to that of torch's initial weight; None
            keeps the norm of the truncated weight.

    Raises:
        RankError: The rank is not positive, or larger than its mode.
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
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._factorize(linear, rank, modes, init_scale)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: Start = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
    ) -> TuckerLinear:
        """Factorise a torch.nn.Linear by truncated SVD; the bias Parameter is shared with it.

        Args:
            linear: A torch.nn.Linear, not a subclass.
            rank: See the class; or a `TuckerTensor` that replaces the weight.
            modes: See the class.
            init_scale: See the class.

        Raises:
            UnsupportedLayerError: The layer is of another class, or its weight is complex,
                quantised or computed from other parameters.
            RankError: The rank is not positive, or larger than its mode, or a `TuckerTensor` does
                not fit.
            NonFiniteError: The weight is not finite.
        """
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(
                f"linear: got {type(linear).__name__}, expected torch.nn.Linear itself"
            )
        layer = cls.__new__(cls)
        layer._factorize(linear, rank, modes, init_scale)
        return layer

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.shape[0]

    def _apply_weight(self, input: Tensor) -> Tensor:
        bases = self._bases
        path = self._call_path(input, bases)
        return tucker_linear(input, self.core, bases, self.bias, path=path)

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """The shapes of the layer and of an input; the memory layout makes no difference."""
        return linear_shape(self.shape, self.ranks, input, input_grad)

    def to_dense(self) -> nn.Linear:
        """torch.nn.Linear with the weight W = U_0 C U_1^T in full."""
        dense = _linear(self.dense_weight(), self.bias)
        self._hand_over(dense)
        return dense

    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Two torch.nn.Linear, or one where that is cheaper."""
        *first, last = linear_stages(self.core, self._bases, self._chosen_plain_path(path))
        stages = [*(_linear(matrix, None) for matrix in first), _linear(last, self.bias)]
        plain = stages[0] if len(stages) == 1 else nn.Sequential(*stages)
        self._hand_over(plain)
        return plain

    def extra_repr(self) -> str:
        """Arguments of the constructor, as torch prints them, and the ranks."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._own_repr}"
        )


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
