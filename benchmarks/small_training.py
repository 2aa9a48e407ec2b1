"""Epochs over images that fit in memory, for benchmarks that train small networks."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdlrt_lab.run.accuracy import accuracy

__all__ = ["Epoch", "train_epochs"]


class Epoch(NamedTuple):
    """Test accuracy in per cent after an epoch, and the seconds that its steps took."""

    accuracy: float
    seconds: float


def train_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Tensor],
    *,
    batch: int,
    epochs: int,
    order: torch.Generator | None = None,
) -> Iterator[Epoch]:
    """Train by cross-entropy, with an evaluation after each epoch.

    Args:
        model: Maps images to logits.
        optimizer: Of its parameters.
        data: Training images and labels, then those of the test.
        batch: Images in a step.
        epochs: Passes over the training images.
        order: Draws the order of the images; None for torch's generator.
    """
    images, labels, test_images, test_labels = data
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(images), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        model.eval()
        yield Epoch(accuracy(model, test_images, test_labels), seconds)
