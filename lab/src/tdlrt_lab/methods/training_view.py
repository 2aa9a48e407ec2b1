"""The part of a training that a method uses."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tdlrt_lab.options import RunOptions

__all__ = ["TrainingView"]


class TrainingView(Protocol):
    """The attributes of `tdlrt_lab.run.training.Training` that methods use."""

    @property
    def config(self) -> RunOptions:
        """The options of the run."""

    @property
    def model(self) -> nn.Module:
        """The network, on its device."""

    @property
    def layers(self) -> Mapping[str, int]:
        """The layers that the method compresses, with the size of their dense weights."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of all parameters."""

    @property
    def classes(self) -> int:
        """The number of classes."""

    @property
    def input_size(self) -> tuple[int, ...]:
        """The shape of a batch of one example, such as (1, channels, height, width)."""

    @property
    def step(self) -> int:
        """The number of steps so far."""

    @property
    def dense_steps(self) -> int:
        """The step after which a method that starts dense compresses the network."""

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """The first training examples of this epoch, with `count` labels, and these labels."""

    def rebuild(self) -> None:
        """Create a new optimiser after the method has replaced parameters of the network."""
