"""Layers in Tucker format, used like the torch.nn layers that they are named after."""

from collections.abc import Callable

from torch import nn

from tdlrt.nn.attention import SplitAttention
from tdlrt.nn.compiling import mark_dynamic_ranks_
from tdlrt.nn.conv import TuckerConv1d, TuckerConv2d, TuckerConv3d
from tdlrt.nn.layer import TuckerLayer
from tdlrt.nn.linear import TuckerLinear
from tdlrt.nn.transposed import TuckerTransposedLinear

__all__ = [
    "SplitAttention",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerLayer",
    "TuckerLinear",
    "TuckerTransposedLinear",
    "mark_dynamic_ranks_",
]

# The constructor that factorises each torch layer. A new layer type is one more line here.
FACTORIZERS: dict[type[nn.Module], Callable[..., TuckerLayer]] = {
    nn.Conv1d: TuckerConv1d.from_conv,
    nn.Conv2d: TuckerConv2d.from_conv,
    nn.Conv3d: TuckerConv3d.from_conv,
    nn.Linear: TuckerLinear.from_linear,
}
