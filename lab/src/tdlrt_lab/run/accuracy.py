"""Classification accuracy."""

from collections.abc import Callable

import torch
from torch import Tensor

from tdlrt_lab.run.processes import process_count, process_number, total

__all__ = ["accuracy"]

BATCH = 500


@torch.inference_mode()
def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Percentage of the images that a network classifies correctly.

    Several processes divide the images among them; each returns the accuracy over all images.

    Args:
        network: Maps a batch of images to logits; a module must be in evaluation mode.
        images: The inputs of the network.
        labels: The class of each image, on the same device.
    """
    batches = [*zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)]
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for x, y in batches[process_number() :: process_count()]:
        correct += (network(x).argmax(1) == y).sum()
    return 100 * int(total(correct)) / len(labels)
