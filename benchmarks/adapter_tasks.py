"""The tasks of benchmarks/adapters.py: networks, and the images of each stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt_lab.data import ImageData
from tdlrt_lab.models import build_model

ImageShape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, the classes it is trained on first, and what follows.

    Attributes:
        data: Data set.
        build: Makes the network for images of a shape and a number of classes.
        head: Name of its last layer; all other convolutions and linear layers get adapters.
        first: Classes of the first training; the others follow.
        images: Images and epochs of the first training.
        tuning: Images and epochs of the fine-tuning.
        held_out: Training images that choose the learning rate.
        ranks: Ranks of LoRA, which set the numbers of trainable parameters.
        lokr_factor: LoKr's `decompose_factor`, which bounds its parameters at any rank.
    """

    data: str
    build: Callable[[ImageShape, int], nn.Module]
    head: str
    first: tuple[int, ...]
    images: tuple[int, int]
    tuning: tuple[int, int] = (3000, 3)
    held_out: int = 2000
    ranks: tuple[int, ...] = (2, 4)
    lokr_factor: int = -1

    def targets(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers that get an adapter."""
        return tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name != self.head
        )

    def lora_parameters(self, model: nn.Module, rank: int) -> int:
        """Parameters of LoRA: r (inputs x kernel + outputs), over the layers."""
        shapes = [model.get_submodule(name).weight.shape for name in self.targets(model)]
        return rank * sum(shape[0] + shape[1:].numel() for shape in shapes)


class ViT(nn.Module):
    """A small ViT of `transformers` with random weights, from images to logits."""

    def __init__(self, shape: ImageShape, classes: int) -> None:
        super().__init__()
        import transformers

        channels, *size = shape
        config = transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=size,
            patch_size=7,
            num_channels=channels,
            num_labels=classes,
        )
        self.network = transformers.ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


TASKS = {
    "LeNet-5, MNIST": Task(
        data="mnist",
        build=lambda shape, classes: build_model("lenet5", shape, classes),
        head="head",
        first=(0, 1, 2, 3, 4),
        images=(20_000, 2),
    ),
    "ViT, MNIST": Task(
        data="mnist",
        build=ViT,
        head="network.classifier",
        first=(0, 1, 2, 3, 4),
        images=(20_000, 3),
        tuning=(3000, 4),
        ranks=(4,),
        lokr_factor=2,
    ),
}


@dataclass
class Split:
    """Normalised images and labels."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, key: Any) -> "Split":
        return Split(self.images[key], self.labels[key])

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a size, in the order given."""
        order = torch.arange(len(self)) if order is None else order
        for part in order.split(size):
            yield self.images[part], self.labels[part]


def splits(task: Task, data: ImageData) -> dict[str, Split]:
    """Images of each stage, and those of the test for the classes of the first and the second."""
    mean = 255 * torch.tensor(data.mean).view(1, -1, 1, 1)
    std = 255 * torch.tensor(data.std).view(1, -1, 1, 1)
    first = torch.zeros(len(data.classes), dtype=torch.bool)
    first[list(task.first)] = True

    def pick(images: Tensor, labels: Tensor, where: Tensor, part: slice) -> Split:
        chosen = where.nonzero()[:, 0][part]
        return Split((images[chosen] - mean) / std, labels[chosen])

    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    count = task.tuning[0]
    return {
        "first": pick(*train, first[train[1]], slice(task.images[0])),
        "first test": pick(*test, first[test[1]], slice(None)),
        "tune": pick(*train, ~first[train[1]], slice(count)),
        "held out": pick(*train, ~first[train[1]], slice(count, count + task.held_out)),
        "test": pick(*test, ~first[test[1]], slice(None)),
    }
