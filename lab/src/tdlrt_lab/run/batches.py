"""The batches of a run; their order and augmentation depend on seed and epoch alone."""

from typing import Protocol

import torch
from torch import Tensor

from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data, ImageData, TextData
from tdlrt_lab.data.augmentation import draw_moves, move_images
from tdlrt_lab.data.text_data import windows

__all__ = ["Batches", "ImageBatches", "TextBatches", "make_batches"]


class Batches(Protocol):
    """The training examples of a run, on its device."""

    def __len__(self) -> int:
        """Number of examples in an epoch."""

    def order(self, epoch: int) -> Tensor:
        """Indices of the examples of an epoch, in their order."""

    def moves(self, epoch: int) -> Tensor | None:
        """How each example is augmented in an epoch; None without augmentation."""

    def batch(self, index: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The network's inputs for the examples with these indices, and their labels."""

    def normalise(self, inputs: Tensor, /) -> Tensor:
        """The network's inputs for examples as the data hold them."""


def make_batches(config: RunConfig, data: Data, device: torch.device) -> Batches:
    """The training examples of the data, images or text, on a device."""
    if isinstance(data, TextData):
        return TextBatches(config, data, device)
    if isinstance(data, ImageData):
        return ImageBatches(config, data, device)
    raise TypeError(f"data: got {type(data).__name__}, expected ImageData or TextData")


class ImageBatches:
    """All training images, once in an epoch.

    Args:
        config: Options of the run.
        data: The data; its test images are not used.
        device: The device.
    """

    def __init__(self, config: RunConfig, data: ImageData, device: torch.device) -> None:
        self._seed, self._augment = config.seed, config.augment
        self._device = device
        self._images, self._labels = data.train_images.to(device), data.train_labels.to(device)
        self._mean = 255 * torch.tensor(data.mean, device=device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(data.std, device=device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        """Number of training images."""
        return len(self._labels)

    def order(self, epoch: int) -> Tensor:
        """Indices of all training images, in the order of an epoch."""
        order = torch.randperm(len(self), generator=_generator(self._seed, 0, epoch))
        return order.to(self._device)

    def moves(self, epoch: int) -> Tensor | None:
        """How each training image is augmented in an epoch; None without augmentation."""
        if self._augment == "none":
            return None
        return draw_moves(len(self), _generator(self._seed, 1, epoch)).to(self._device)

    def batch(self, index: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised training images and their labels.

        Args:
            index: Indices of the images.
            moves: The augmentation of all training images; None for no augmentation.
        """
        images = self._images[index]
        if moves is not None:
            images = move_images(images, moves[index])
        return self.normalise(images), self._labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """Images of 8 bits with the mean subtracted, divided by the standard deviation."""
        # Allocate in channels_last: `to` does not change the strides of images with one channel.
        normalised = torch.empty(
            images.shape, device=images.device, memory_format=torch.channels_last
        ).copy_(images)
        return normalised.sub_(self._mean).div_(self._std)


class TextBatches:
    """Windows at random places of the training text.

    Args:
        config: Options of the run.
        data: The data; its test files are not used.
        device: The device.
    """

    def __init__(self, config: RunConfig, data: TextData, device: torch.device) -> None:
        self._seed, self._device = config.seed, device
        self._context, self._count = data.context, data.epoch_examples
        self._text = data.train_text().to(device)

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return self._count

    def order(self, epoch: int) -> Tensor:
        """First characters of the windows of an epoch, in their order."""
        places, generator = len(self._text) - self._context, _generator(self._seed, 0, epoch)
        return torch.randint(places, (len(self),), generator=generator).to(self._device)

    def moves(self, epoch: int) -> None:
        """None: text is not augmented."""

    def batch(self, index: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The windows that begin at these characters, and the characters that follow."""
        return windows(self._text, index, self._context)

    def normalise(self, text: Tensor) -> Tensor:
        """Characters as they are."""
        return text


def _generator(seed: int, purpose: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(purpose * 2**52 + seed * 2**20 + epoch)
