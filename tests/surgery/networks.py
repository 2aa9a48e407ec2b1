"""A network with every kind of layer that surgery meets."""

import torch
from torch import nn


class Odd(nn.Conv2d):
    """A subclass, which may do anything."""


def everything():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 16, 3, stride=(2, 1), padding="valid", dilation=(1, 2)))
    model.add_module("grouped", nn.Conv2d(16, 16, 3, groups=4))
    model.add_module("up", nn.ConvTranspose2d(16, 16, 2))
    model.add_module("odd", Odd(16, 16, 3, padding=1))
    model.add_module("ring", nn.Conv2d(16, 24, (3, 5), padding=(1, 2), padding_mode="circular"))
    model.add_module("norm", nn.BatchNorm2d(24))
    model.add_module("tiny", nn.Conv2d(24, 1, 1, bias=False))
    model.add_module("flat", nn.Flatten())
    model.add_module("hidden", nn.LazyLinear(40))
    model.add_module("relu", nn.ReLU())
    model.add_module("head", nn.Linear(40, 10))
    model(inputs())
    return model.eval()


def inputs():
    return torch.randn(2, 3, 15, 16, generator=torch.Generator().manual_seed(3))
