"""The data sets that a run can choose from: where each comes from, and what it holds."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DATA_SETS", "DatasetInfo"]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Where a data set comes from and what a run on it does unless told otherwise.

    Attributes:
        epochs: Default length of a training run.
        batch_size: Default number of images per step.
        mode: Pillow mode its images are converted to.
        hub: Repository on the Hugging Face hub; empty for data that need no download.
        image: Name of the column of images in that repository.
        label: Name of the column of labels in that repository.
        image_shape: Channels, height and width of an image.
        classes: Number of classes.
        test: Name of the part of that repository that runs are tested on.
        folder: Whether it is read from a folder of image files.
    """

    epochs: int
    image_shape: tuple[int, int, int]
    classes: int = 10
    batch_size: int = 128
    mode: Literal["L", "RGB"] = "L"
    hub: str = ""
    image: str = "image"
    label: str = "label"
    test: str = "test"
    folder: bool = False

    @property
    def options(self) -> frozenset[str]:
        """The options of `tdlrt_lab.options.RunOptions` that reading it uses."""
        folder_of_files = {"data_dir"} if self.hub or self.folder else set()
        return frozenset(folder_of_files | ({"image_size"} if self.folder else set()))


DATA_SETS = {
    "digits": DatasetInfo(epochs=20, image_shape=(1, 8, 8), batch_size=32),
    "mnist": DatasetInfo(epochs=5, image_shape=(1, 28, 28), hub="ylecun/mnist"),
    "fashion_mnist": DatasetInfo(
        epochs=10, image_shape=(1, 28, 28), hub="zalando-datasets/fashion_mnist"
    ),
    "cifar10": DatasetInfo(
        epochs=30, image_shape=(3, 32, 32), mode="RGB", hub="uoft-cs/cifar10", image="img"
    ),
    "cifar100": DatasetInfo(
        epochs=30,
        image_shape=(3, 32, 32),
        classes=100,
        mode="RGB",
        hub="uoft-cs/cifar100",
        image="img",
        label="fine_label",
    ),
    "tiny_imagenet": DatasetInfo(
        epochs=30,
        image_shape=(3, 64, 64),
        classes=200,
        mode="RGB",
        hub="zh-plus/tiny-imagenet",
        test="valid",
    ),
    "imagefolder": DatasetInfo(epochs=30, image_shape=(3, 64, 64), mode="RGB", folder=True),
}
