"""Training and test images in memory, with the statistics that normalise them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tdlrt.text_tables import format_shape
from tdlrt_lab.data.protocol import DataRecord
from tdlrt_lab.data.validation import held_out_rows

__all__ = ["ImageData", "Split", "make_image_data"]


class Split(NamedTuple):
    """Images (N, channels, height, width) in uint8, labels (N,) in int64, class names if known."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def select(self, rows: Tensor) -> "Split":
        """The images and labels with these indices."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Training and test images with their labels.

    Attributes:
        name: Name of the data set.
        train_images: uint8, (N, channels, height, width).
        train_labels: int64, (N,).
        test_images: uint8, (M, channels, height, width).
        test_labels: int64, (M,).
        classes: Name of each class.
        mean: Mean of each channel over the training images, on the scale 0 to 1.
        std: Standard deviation of each channel over the training images, on the same scale.
        split: Whether the test images are the test set or validation images in its place.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: Literal["test", "validation"] = "test"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an image."""
        return self.image_shape

    @property
    def unit(self) -> str:
        """Images."""
        return "images"

    @property
    def epoch_examples(self) -> int:
        """Number of training images."""
        return len(self.train_labels)

    @property
    def description(self) -> str:
        """Numbers of images and their shape in words."""
        return (
            f"{len(self.train_labels):,} training, {len(self.test_labels):,} {self.split} images "
            f"{format_shape(self.image_shape)}"
        )

    def record(self) -> DataRecord:
        """Image counts and digests, by which a resumed run recognises its data."""
        splits = {
            "training": (self.train_images, self.train_labels),
            self.split: (self.test_images, self.test_labels),
        }
        return {
            name: {"images": len(labels), "sha256": _digest(images, labels)}
            for name, (images, labels) in splits.items()
        }

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The test images and their labels."""
        return self.test_images, self.test_labels

    def sample(self, count: int) -> Tensor:
        """Training images drawn with a fixed seed."""
        order = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(0))
        return self.train_images[order[:count]]

    def metadata(self) -> dict[str, str]:
        """What the inputs and outputs of a network mean, as texts by name."""
        channels, height, width = self.image_shape
        return {
            "input": f"images (N, {channels}, {height}, {width}): levels from 0 to 1, minus the "
            "mean, divided by the standard deviation of the channel",
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "classes": json.dumps(self.classes),
        }

    def hold_out(self, part: float | int, seed: int) -> "ImageData":
        """Replace the test set by validation images, drawn at random from the training set.

        Args:
            part: Share (float) or number (int) of the training images to hold out.
            seed: Seed of the random draw.

        Returns:
            The remaining training images, with their own mean and deviation, and the validation
            images in place of the test set.

        Raises:
            DataError: The training or the validation set would be empty.
        """
        validation, training = held_out_rows(len(self.train_labels), part, seed, "training images")
        whole = Split(self.train_images, self.train_labels, self.classes)
        return make_image_data(
            self.name, whole.select(training), whole.select(validation), split="validation"
        )

    def normalise(self, images: Tensor) -> Tensor:
        """The network's input for uint8 images: (x / 255 - mean) / std, per channel."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images / 255 - mean) / std


def make_image_data(
    name: str, train: Split, test: Split, split: Literal["test", "validation"] = "test"
) -> ImageData:
    """Combine two splits, with the class names and the statistics of the training split."""
    mean, std = _channel_statistics(train.images)
    return ImageData(
        name=name,
        train_images=train.images,
        train_labels=train.labels,
        test_images=test.images,
        test_labels=test.labels,
        classes=train.classes,
        mean=mean,
        std=std,
        split=split,
    )


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, from a histogram: exact, and in little memory."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum()
        mean = share @ levels
        means.append(float(mean))
        # A constant channel has deviation 0, by which nothing can be divided.
        stds.append(float((share @ (levels - mean).square()).sqrt()) or 1.0)
    return tuple(means), tuple(stds)
