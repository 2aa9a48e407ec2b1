"""Accuracy and loss on held-out examples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tdlrt_lab.run.processes import process_count, process_number, total

__all__ = ["Quality", "accuracy", "quality"]

BATCH = 500


class Quality(NamedTuple):
    """Percentage of the labels that are predicted, and mean cross-entropy of a label, in nats."""

    accuracy: float
    loss: float


def accuracy(network: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> float:
    """The accuracy of `quality`."""
    return quality(network, inputs, labels).accuracy


@torch.inference_mode()
def quality(network: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Quality:
    """Measure a network on examples.

    Several processes divide the examples among them; each returns the measures over all of them.

    Args:
        network: Maps a batch of inputs to logits, with the classes along dimension 1; a module must
            be in evaluation mode.
        inputs: The inputs of the network.
        labels: The class of each example, or of each position of each example, on the same device.
    """
    batches = [*zip(torch.split(inputs, BATCH), torch.split(labels, BATCH), strict=True)]
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    loss = torch.zeros((), dtype=torch.float64, device=labels.device)
    for x, y in batches[process_number() :: process_count()]:
        logits = network(x)
        correct += (logits.argmax(1) == y).sum()
        loss += F.cross_entropy(logits, y, reduction="sum")
    count = labels.numel()
    return Quality(100 * int(total(correct)) / count, float(total(loss)) / count)
