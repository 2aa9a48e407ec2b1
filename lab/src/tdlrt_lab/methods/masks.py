"""What unstructured pruning methods share: masks over the weights of the network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tdlrt_lab.methods.method import Method
from tdlrt_lab.methods.sizes import dense_sizes, factorizable
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions

__all__ = ["Masked", "MaskedAtStart"]

SAMPLES_PER_CLASS = 10
MOST_SAMPLES = 512


class Masked(Method):
    """Keep the weights with the highest scores over all layers together, set the others to zero.

    Size: kept weights. The mask is not counted, and what runs is as large as before.
    """

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave the network dense for now."""
        return dense_sizes(factorizable(model))

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Put masks on the layers that had one, of ones for now."""
        for name in training.layers:
            layer = training.model.get_submodule(name)
            if f"{name}.weight_mask" in weights and not prune.is_pruned(layer):
                prune.identity(layer, "weight")  # type: ignore[no-untyped-call]

    def keep(self, training: TrainingView, scores: Mapping[str, Tensor], share: float) -> None:
        """Mask all but a share of the weights.

        Args:
            training: The training.
            scores: Score of each weight, by layer; weights masked before must score lowest.
            share: Share of the weights that stay.
        """
        flat = torch.cat([scores[name].flatten() for name in training.layers])
        kept = torch.zeros_like(flat)
        kept[flat.topk(max(1, round(share * len(flat)))).indices] = 1
        sizes = list(training.layers.values())
        for name, part in zip(training.layers, torch.split(kept, sizes), strict=True):
            layer = training.model.get_submodule(name)
            mask = part.reshape(scores[name].shape)
            if prune.is_pruned(layer):
                layer.get_buffer("weight_mask").copy_(mask)
            else:
                prune.custom_from_mask(layer, "weight", mask)  # type: ignore[no-untyped-call]


class MaskedAtStart(Masked):
    """Masks that are found on a sample of the training images before the first step."""

    def scores(
        self, training: TrainingView, weights: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Score of each weight on the images."""
        raise NotImplementedError

    def begin(self, training: TrainingView) -> None:
        """Prune."""
        count = min(SAMPLES_PER_CLASS * training.classes, MOST_SAMPLES)
        images, labels = training.sample(count)
        weights: dict[str, Tensor] = {
            name: training.model.get_submodule(name).get_parameter("weight")
            for name in training.layers
        }
        buffers = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
        scores = self.scores(training, weights, images, labels)
        # Running statistics have seen these images; they begin with the training.
        training.model.load_state_dict(buffers, strict=False)
        self.keep(training, scores, training.config.budget or 1.0)
