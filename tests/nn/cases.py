"""Torch layers with all their options, for tests of what stands in for them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.cases import gaussian
from tdlrt.nn import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLayer, TuckerLinear

CONV = {nn.Conv1d: TuckerConv1d, nn.Conv2d: TuckerConv2d, nn.Conv3d: TuckerConv3d}


@dataclass(frozen=True)
class Case:
    """A torch layer, the rank to factorise it with and the shape of an input."""

    name: str
    kind: type[nn.Module]
    arguments: tuple[Any, ...]
    input_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    rank: Any = 2
    modes: str = "all"
    reshape: Any = None

    def plain(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        return self.kind(*self.arguments, **self.options).to(device, dtype)

    def input(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
        return gaussian(self.input_shape, 1, dtype, device)

    def factorize(self, plain: nn.Module, rank: Any = None) -> TuckerLayer:
        rank = self.rank if rank is None else rank
        if self.kind is nn.Linear:
            return TuckerLinear.from_linear(plain, rank=rank, reshape=self.reshape)
        return CONV[self.kind].from_conv(plain, rank=rank, modes=self.modes)


def tensor(
    name: str,
    input_shape: tuple[int, ...],
    reshape: Any = ((10,), (3, 2, 2)),
    rank: Any = (4, 2, 2, 1),
    **options: Any,
) -> Case:
    return Case(name, nn.Linear, (12, 10), input_shape, options, rank, reshape=reshape)


def conv1d(name: str, rank: Any = 2, **options: Any) -> Case:
    return Case(name, nn.Conv1d, (4, 5, 3), (2, 4, 9), options, rank)


def conv2d(name: str, rank: Any = (3, 2, 2, 2), modes: str = "all", **options: Any) -> Case:
    return Case(name, nn.Conv2d, (4, 5, (3, 2)), (2, 4, 6, 5), options, rank, modes)


def conv3d(name: str, rank: Any = (3, 2, 2, 1, 2), **options: Any) -> Case:
    return Case(name, nn.Conv3d, (3, 4, (2, 1, 3)), (2, 3, 3, 4, 5), options, rank)


CASES = [
    Case("linear", nn.Linear, (7, 5), (4, 7)),
    Case("linear on sequences", nn.Linear, (7, 5), (2, 3, 7)),
    Case("linear unbatched", nn.Linear, (7, 5), (7,)),
    Case("linear without bias", nn.Linear, (7, 5), (4, 7), {"bias": False}),
    Case("linear full rank", nn.Linear, (5, 7), (4, 5), rank="full"),
    tensor("linear as tensor", (4, 12)),
    tensor("linear as tensor on sequences", (2, 3, 12)),
    tensor("linear as tensor unbatched", (12,)),
    tensor("linear as tensor full rank", (4, 12), rank="full"),
    tensor("linear as tensor without bias", (4, 12), bias=False),
    tensor("linear as tensor rank 1", (4, 12), rank=1),
    tensor("linear of split rows", (4, 12), ((2, 5), (3, 4)), (2, 2, 2, 3)),
    tensor("linear of split rows on sequences", (2, 3, 12), ((2, 5), (3, 4)), (2, 2, 2, 3)),
    tensor("linear of split rows without bias", (4, 12), ((5, 2), (12,)), (3, 2, 4), bias=False),
    conv1d("conv1d"),
    conv1d("conv1d strided, dilated", stride=2, dilation=2, padding=3),
    conv1d("conv1d same", padding="same"),
    conv1d("conv1d circular", padding=2, padding_mode="circular"),
    Case("conv1d unbatched", nn.Conv1d, (4, 5, 3), (4, 9)),
    conv2d("conv2d"),
    conv2d("conv2d stride 2", stride=2),
    conv2d("conv2d asymmetric stride", stride=(1, 2)),
    conv2d("conv2d dilation 2", dilation=2),
    conv2d("conv2d asymmetric dilation", dilation=(1, 2)),
    conv2d("conv2d padding", padding=1),
    conv2d("conv2d asymmetric padding", padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
    conv2d("conv2d same", padding="same", dilation=(1, 2)),
    conv2d("conv2d valid", padding="valid"),
    *(
        conv2d(f"conv2d {mode} {padding}", padding=padding, padding_mode=mode)
        for mode in ("circular", "reflect", "replicate")
        for padding in (2, (1, 2), "same", "valid")
    ),
    conv2d("conv2d without bias", bias=False),
    conv2d("conv2d full rank", rank="full"),
    conv2d("conv2d full input rank", rank=(2, 4, 2, 2), padding=1, padding_mode="circular"),
    conv2d("conv2d full output rank", rank=(5, 3, 2, 1)),
    conv2d("conv2d rank 1", rank=1),
    conv2d("conv2d Tucker-2", rank=(3, 2, 3, 2), modes="channels", padding=1),
    Case("conv2d one input channel", nn.Conv2d, (1, 5, 3), (2, 1, 5, 5)),
    Case("conv2d one output channel", nn.Conv2d, (4, 1, 3), (2, 4, 5, 5)),
    Case("conv2d 1x1", nn.Conv2d, (4, 5, 1), (2, 4, 3, 3)),
    Case("conv2d unbatched", nn.Conv2d, (4, 5, 3), (4, 5, 5), {"padding": 1}),
    Case(
        "conv2d unbatched reflect",
        nn.Conv2d,
        (4, 5, 3),
        (4, 5, 5),
        {"padding": 1, "padding_mode": "reflect"},
    ),
    conv3d("conv3d"),
    conv3d("conv3d strided, dilated", stride=(1, 2, 1), dilation=(2, 1, 1), padding=(1, 0, 2)),
    conv3d("conv3d replicate", padding=(1, 0, 1), padding_mode="replicate"),
    conv3d("conv3d same", padding="same", dilation=(2, 1, 1)),
    Case("conv3d unbatched", nn.Conv3d, (3, 4, 2), (3, 3, 3, 3)),
]
BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
