"""The available data sets: their source, the shape of their images, and defaults for runs."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DATA_SETS", "DatasetInfo"]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Source and shape of a data set, and the defaults of a run on it.

    Attributes:
        epochs: Default number of epochs.
        image_shape: Channels, height and width of an image.
        classes: Number of classes.
        batch_size: Default number of images per step.
        mode: Pillow mode to which the images are converted.
        hub: Repository on the Hugging Face hub; empty if there is none.
        image: Name of the image column in the repository.
        label: Name of the label column in the repository.
        test: Name of the test split in the repository.
        folder: Whether the data are a folder of image files.
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
        """The options of `tdlrt_lab.options.RunOptions` that this data set uses."""
        if self.folder:
            return frozenset({"data_dir", "image_size"})
        return frozenset({"data_dir"} if self.hub else ())


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
