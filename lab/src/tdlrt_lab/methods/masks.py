"""Base classes of unstructured pruning, by masks of `torch.nn.utils.prune`."""

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
    """Keep the weights with the highest scores, compared over all layers; set the others to zero.

    Size: the number of kept weights. Masks are not counted, and inference costs as much as before.
    """

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave the network dense until it is pruned."""
        return dense_sizes(factorizable(model))

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Add masks of ones to the layers that had masks; loading the weights sets their values."""
        for name in training.layers:
            layer = training.model.get_submodule(name)
            if f"{name}.weight_mask" in weights and not prune.is_pruned(layer):
                prune.identity(layer, "weight")  # type: ignore[no-untyped-call]

    def keep(self, training: TrainingView, scores: Mapping[str, Tensor], share: float) -> None:
        """Mask all weights but the share with the highest scores.

        Args:
            training: The training.
            scores: Scores of the weights of each layer; those of masked weights must be lowest.
            share: Share of the weights to keep.
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
    """Pruning before the first step, by scores from a sample of the training images."""

    def scores(
        self, training: TrainingView, weights: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The score of each weight, by layer; the highest are kept."""
        raise NotImplementedError

    def begin(self, training: TrainingView) -> None:
        """Compute the scores and prune."""
        count = min(SAMPLES_PER_CLASS * training.classes, MOST_SAMPLES)
        images, labels = training.sample(count)
        weights: dict[str, Tensor] = {
            name: training.model.get_submodule(name).get_parameter("weight")
            for name in training.layers
        }
        buffers = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
        scores = self.scores(training, weights, images, labels)
        # Undo the update of running statistics by these images.
        training.model.load_state_dict(buffers, strict=False)
        self.keep(training, scores, training.config.budget or 1.0)
