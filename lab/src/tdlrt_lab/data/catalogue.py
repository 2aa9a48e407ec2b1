"""The available data sets: their source, the shape of an example, and defaults for runs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdlrt_lab.data.text_data import CHARACTERS
from tdlrt_lab.measures import ACCURACY, BITS, Measure

__all__ = ["DATA_SETS", "DatasetInfo"]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Source and shape of a data set, and the defaults of a run on it.

    Attributes:
        epochs: Default number of epochs.
        input_shape: Channels, height and width of an image; characters of a window of text.
        classes: Number of classes; of text, of characters.
        batch_size: Default number of images, or windows of text, per step.
        optimizer: Default optimiser; None for that of the method's recipe.
        mode: Pillow mode to which the images are converted.
        hub: Repository on the Hugging Face hub; empty if there is none.
        image: Name of the image column in the repository.
        label: Name of the label column in the repository.
        test: Name of the test split in the repository.
        folder: Whether the data are a folder of image files.
    """

    epochs: int
    input_shape: tuple[int, ...]
    classes: int = 10
    batch_size: int = 128
    optimizer: str | None = None
    mode: Literal["L", "RGB"] = "L"
    hub: str = ""
    image: str = "image"
    label: str = "label"
    test: str = "test"
    folder: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the data are text and not images."""
        return len(self.input_shape) == 1

    @property
    def measure(self) -> Measure:
        """How well a network does on the data."""
        return BITS if self.is_text else ACCURACY

    def random_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs of a network, drawn at random in the shape of the data, and their labels."""
        if self.is_text:
            shape = (count, *self.input_shape)
            return torch.randint(self.classes, shape), torch.randint(self.classes, shape)
        images = torch.randn(count, *self.input_shape)
        return images, torch.randint(self.classes, (count,))

    @property
    def options(self) -> frozenset[str]:
        """The options of `tdlrt_lab.options.RunOptions` that this data set uses."""
        options = set() if self.is_text else {"train_images", "augment"}
        if self.folder:
            options |= {"data_dir", "image_size"}
        return frozenset(options | {"data_dir"} if self.hub else options)


DATA_SETS = {
    "digits": DatasetInfo(epochs=20, input_shape=(1, 8, 8), batch_size=32),
    "mnist": DatasetInfo(epochs=5, input_shape=(1, 28, 28), hub="ylecun/mnist"),
    "fashion_mnist": DatasetInfo(
        epochs=10, input_shape=(1, 28, 28), hub="zalando-datasets/fashion_mnist"
    ),
    "cifar10": DatasetInfo(
        epochs=30, input_shape=(3, 32, 32), mode="RGB", hub="uoft-cs/cifar10", image="img"
    ),
    "cifar100": DatasetInfo(
        epochs=30,
        input_shape=(3, 32, 32),
        classes=100,
        mode="RGB",
        hub="uoft-cs/cifar100",
        image="img",
        label="fine_label",
    ),
    "tiny_imagenet": DatasetInfo(
        epochs=30,
        input_shape=(3, 64, 64),
        classes=200,
        mode="RGB",
        hub="zh-plus/tiny-imagenet",
        test="valid",
    ),
    "imagefolder": DatasetInfo(epochs=30, input_shape=(3, 64, 64), mode="RGB", folder=True),
    # Stochastic gradient descent hardly trains a transformer.
    "stdlib": DatasetInfo(
        epochs=24, input_shape=(128,), classes=CHARACTERS, batch_size=8, optimizer="adamw"
    ),
}
