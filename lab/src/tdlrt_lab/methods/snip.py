"""SNIP: single-shot network pruning by connection sensitivity."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tdlrt_lab.methods.masks import MaskedAtStart
from tdlrt_lab.methods.training_view import TrainingView

__all__ = ["SNIP"]


class SNIP(MaskedAtStart):
    """Before training, keep the weights with the largest |w * grad_w L|.

    Source: Lee, Ajanthan and Torr, arXiv:1810.02340, equation 5.
    """

    def scores(
        self, training: TrainingView, weights: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """|w * grad_w L|."""
        loss = F.cross_entropy(training.model(images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        pairs = zip(weights.items(), gradients, strict=True)
        return {name: (weight.detach() * gradient).abs() for (name, weight), gradient in pairs}
