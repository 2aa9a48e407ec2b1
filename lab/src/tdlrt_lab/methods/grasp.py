"""GraSP: gradient signal preservation."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdlrt_lab.methods.masks import MaskedAtStart
from tdlrt_lab.methods.training_view import TrainingView

__all__ = ["GraSP"]

TEMPERATURE = 200.0


class GraSP(MaskedAtStart):
    """Before training, remove the weights with the largest -w * H g, to preserve the gradient norm.

    g is the gradient and H the Hessian of the loss, computed with logits divided by 200.

    Source: Wang, Zhang and Grosse, arXiv:2002.07376, equation 8 and algorithm 1.
    """

    def scores(
        self, training: TrainingView, weights: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """W * H g; weights with high scores are kept."""
        tensors = list(weights.values())
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            logits = training.model(images)
        loss = F.cross_entropy(logits / TEMPERATURE, labels)
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        # The gradient of g^T g with one g held constant is H g.
        product = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
        products = torch.autograd.grad(product, tensors)
        pairs = zip(weights.items(), products, strict=True)
        return {name: weight.detach() * one for (name, weight), one in pairs}
