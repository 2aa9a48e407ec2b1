"""Matrix DLRT: the integrators of TDLRT for weights reshaped to matrices."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.errors import ConfigError
from tdlrt.nn import TuckerLayer, TuckerLinear
from tdlrt.paths import LayerShape, PathChoice, conv_shape
from tdlrt.paths.apply import linear_stages
from tdlrt.ranks import RankSpec
from tdlrt.surgery import DEFAULT_INIT_SCALE
from tdlrt_lab.methods.factored import stage
from tdlrt_lab.methods.sizes import dense_sizes, factorizable
from tdlrt_lab.methods.tdlrt import TDLRTMethod
from tdlrt_lab.options import RunOptions

__all__ = ["MatrixConv", "MatrixDLRT"]


class MatrixDLRT(TDLRTMethod):
    """Train W = U_0 C U_1^T, W reshaped to outputs x (inputs times taps), by `tdlrt.TDLRT`.

    Size: as for `tdlrt`.

    Source: arXiv:2205.13571, with the integrators and rank policies of this library.
    """

    options = TDLRTMethod.options - {"modes"}

    def check(self, config: RunOptions) -> None:
        """Refuse ranks by layer name, which have one entry per mode of the kernel."""
        if isinstance(config.rank, dict):
            raise ConfigError(
                f"rank {config.rank!r}: expected one rank for all layers with method "
                "'matrix_dlrt', whose weights have two modes; give a share, an integer or 'full'"
            )

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Factorise, as a matrix, every layer that `tdlrt.factorize_` would factorise."""
        layers = factorizable(model)
        rank: Any = config.rank
        scale: Any = config.init_scale
        if scale == "auto":
            scale = None if rank == "full" else DEFAULT_INIT_SCALE
        sizes = dense_sizes(layers)
        for name, layer in layers.items():
            build = TuckerLinear.from_linear if isinstance(layer, nn.Linear) else MatrixConv
            model.set_submodule(name, build(layer, rank=rank, init_scale=scale))
        return sizes


class MatrixConv(TuckerLayer):
    """A convolution with W = U_0 C U_1^T: one to r channels by U_1^T, then a 1x1 one by U_0 C.

    Args:
        conv: The convolution; its bias Parameter is shared.
        rank: As for TuckerLinear, of the matrix outputs x (inputs times taps).
        init_scale: As for TuckerLinear.
    """

    _path = "fold_out"

    def __init__(self, conv: nn.Module, *, rank: RankSpec, init_scale: float | None) -> None:
        matrix = nn.Linear(1, 1, bias=False)
        matrix.weight = nn.Parameter(conv.get_parameter("weight").detach().flatten(1))
        matrix.bias = conv._parameters["bias"]  # type: ignore[assignment]
        self._factorize(matrix, rank, "all", init_scale)
        # Kept for its options. In a tuple it is not registered as a submodule.
        options: Any = copy.copy(conv)
        options._parameters = {"weight": None, "bias": None}
        self.kernel = (tuple(conv.get_parameter("weight").shape[1:]), options)

    @property
    def _stages(self) -> tuple[Tensor, Tensor]:
        reduce, expand = linear_stages(self.core, self._bases, "fold_out")
        return reduce.matrix, expand.matrix

    def _apply_weight(self, input: Tensor) -> Tensor:
        reduce, expand = self._stages
        shape, conv = self.kernel
        hidden = conv._conv_forward(input, reduce.reshape(-1, *shape), None)
        ones, zeros = [1] * (len(shape) - 1), [0] * (len(shape) - 1)
        expand = expand.reshape(*expand.shape, *ones)
        return torch.convolution(hidden, expand, self.bias, ones, zeros, ones, False, zeros, 1)

    @torch.no_grad()
    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Two convolutions; the only path."""
        reduce, expand = self._stages
        shape, conv = self.kernel
        last = stage(conv, expand)
        if self.bias is not None:
            last.register_parameter("bias", nn.Parameter(self.bias.detach().clone()))
        first = stage(conv, reduce.reshape(-1, *shape), range(len(shape) - 1))
        return nn.Sequential(first, last).to(self.core).train(self.training)

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """The shape of the matrix, applied at every position of the output."""
        shape, conv = self.kernel
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
        rows = conv_shape((self.shape[0], *shape), self.ranks, input, **options).rows_out
        return LayerShape(self.shape, self.ranks, rows, rows, input_grad=input_grad)
