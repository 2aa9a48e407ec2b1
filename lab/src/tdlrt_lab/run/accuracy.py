"""How many images a network classifies rightly."""

from collections.abc import Callable

import torch
from torch import Tensor

from tdlrt_lab.run.processes import process_count, process_number, total

__all__ = ["accuracy"]

BATCH = 500


@torch.inference_mode()
def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of the images, in percent, that a network classifies rightly.

    Several processes share the images out, and each gets the share of all.

    Args:
        network: From images to a score per class; a module must be in the mode eval.
        images: What the network takes.
        labels: The right class of each, on the same device.
    """
    batches = [*zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)]
    right = torch.zeros((), dtype=torch.int64, device=labels.device)
    for x, y in batches[process_number() :: process_count()]:
        right += (network(x).argmax(1) == y).sum()
    return 100 * int(total(right)) / len(labels)
