"""What a method sees of the training that it is part of."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tdlrt_lab.options import RunOptions

__all__ = ["TrainingView"]


class TrainingView(Protocol):
    """A training, as far as a method needs it; `tdlrt_lab.run.training.Training` is one."""

    @property
    def config(self) -> RunOptions:
        """The options of the run."""

    @property
    def model(self) -> nn.Module:
        """The network, on its device."""

    @property
    def layers(self) -> Mapping[str, int]:
        """The layers that the method makes small, with the size of their dense weights."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of all parameters."""

    @property
    def classes(self) -> int:
        """The number of classes."""

    @property
    def input_size(self) -> tuple[int, ...]:
        """The shape of a batch of one image."""

    @property
    def step(self) -> int:
        """The number of steps taken so far."""

    @property
    def dense_steps(self) -> int:
        """The step after which a method that starts dense makes the network small."""

    def order(self) -> Tensor:
        """The indices of the training images in the order of this epoch."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The training images (normalised) and the labels of some indices."""

    def rebuild(self) -> None:
        """Take up the network after its parameters were replaced by others."""
