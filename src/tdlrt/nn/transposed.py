"""Tucker layer for linear layers that store their weight as inputs x outputs, like GPT-2's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.nn.linear import TuckerLinear
from tdlrt.nn.reshape import Reshape
from tdlrt.nn.start import Modes, Start
from tdlrt.nn.weight_value import WeightValue

__all__ = ["TuckerTransposedLinear"]


class TuckerTransposedLinear(TuckerLinear):
    """`TuckerLinear` in the place of a layer whose Parameter `weight` is W^T, inputs x outputs.

    It computes y = x W^T + b like `TuckerLinear`, and all ranks and modes are those of W, outputs x
    inputs. Only `weight` and `to_dense` give the transposed matrix, in the order of the dense
    layer. `Conv1D` of transformers, of which GPT-2 consists, is such a layer.
    """

    _dense_type: type[nn.Module]

    @classmethod
    def from_transposed(
        cls,
        dense: nn.Module,
        *,
        rank: Start = 0.5,
        modes: Modes = "all",
        init_scale: float | None = None,
        reshape: Reshape | None = None,
    ) -> TuckerTransposedLinear:
        """Factorise a layer that computes x V + b; the bias Parameter is shared with it.

        Args:
            dense: The layer. V is its Parameter `weight`, b its Parameter `bias` or None, and its
                class is called as dense_type(outputs, inputs).
            rank: See `TuckerLinear`; or a `TuckerTensor` that replaces W.
            modes: See `TuckerLinear`.
            init_scale: See `TuckerLinear`.
            reshape: See `TuckerLinear`; modes of the rows (outputs) and columns (inputs) of W.

        Raises:
            RankError: See `TuckerLinear.from_linear`.
            NonFiniteError: The weight is not finite.
        """
        layer = cls.__new__(cls)
        layer._take_over(_as_linear(dense), rank, modes, init_scale, reshape)
        layer._dense_type = type(dense)
        return layer

    @property
    def weight(self) -> Tensor:
        """The full weight as it is stored in the dense layer, inputs x outputs, computed each time.

        Writing into it raises an `UnsupportedLayerError`, because the write would be lost.
        """
        return WeightValue.of(self._matrix.T)

    def to_dense(self) -> nn.Module:  # type: ignore[override]
        """The layer of the original class with the full weight; its parameters are copies."""
        linear = super().to_dense()
        dense = self._new_dense("meta")
        dense.weight = nn.Parameter(
            linear.weight.detach().T.contiguous(), linear.weight.requires_grad
        )
        dense.bias = linear.bias
        return dense.train(self.training)

    def _new_dense(self, device: torch.device | str) -> nn.Module:
        make: Any = self._dense_type
        with torch.device(device):
            dense: nn.Module = make(self.out_features, self.in_features)
        return dense

    def _random_dense(self) -> nn.Linear:
        return _as_linear(self._new_dense(self.core.device).to(self.core.dtype))


def _as_linear(dense: nn.Module) -> nn.Linear:
    """A torch.nn.Linear with the weight W of a layer that stores W^T, and with its bias."""
    weight = dense.get_parameter("weight")
    inputs, outputs = weight.shape
    linear = nn.Linear(inputs, outputs, dense.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, weight.requires_grad)
    linear.register_parameter("bias", dense._parameters.get("bias"))
    return linear.train(dense.training)
