"""The training batches of a run; their order and augmentation depend on seed and epoch alone."""

import torch
from torch import Tensor

from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageData
from tdlrt_lab.data.augmentation import draw_moves, move_images

__all__ = ["Batches"]


class Batches:
    """The training images of a run, on its device.

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
        return torch.randperm(len(self), generator=self._generator(0, epoch)).to(self._device)

    def moves(self, epoch: int) -> Tensor | None:
        """How each training image is augmented in an epoch; None without augmentation."""
        if self._augment == "none":
            return None
        return draw_moves(len(self), self._generator(1, epoch)).to(self._device)

    def _generator(self, purpose: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(purpose * 2**52 + self._seed * 2**20 + epoch)

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
