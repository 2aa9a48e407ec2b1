"""Image data sets held in memory: embedded digits, local parquet files, or the hub."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tdlrt.errors import DataError
from tdlrt_lab.data.catalogue import DATA_SETS, DatasetInfo
from tdlrt_lab.data.pixels import Split
from tdlrt_lab.names import pick

__all__ = ["DataProgress", "ImageData", "ImageRecord", "hold_out", "load_data"]

MAX_CLASSES = 2**16
"""Of data without names of classes: there are as many as the largest label says."""

DataProgress = Callable[[str, int, int], None]

ImageRecord = dict[str, dict[str, int | str]]
"""For each part of a data set the number of images, and a digest of them and their labels."""


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Training and test images with their labels.

    Attributes:
        name: Name of the data set.
        train_images: uint8, (N, channels, height, width).
        train_labels: int64, (N,).
        test_images: uint8, (M, channels, height, width); by `split` those of the test set, or
            validation images in its place.
        test_labels: int64, (M,).
        classes: Name of each class.
        mean: Mean of each channel over the training images, on the scale 0 to 1.
        std: Standard deviation of each channel over the training images, same scale.
        split: What the test images are.
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

    def record(self) -> ImageRecord:
        """What is needed to find out later whether data are the same as these."""
        parts = {
            "training": (self.train_images, self.train_labels),
            self.split: (self.test_images, self.test_labels),
        }
        return {
            name: {"images": len(labels), "sha256": _digest(images, labels)}
            for name, (images, labels) in parts.items()
        }

    def normalise(self, images: Tensor) -> Tensor:
        """Images (uint8) as a network is given them: (x / 255 - mean) / std, per channel."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images / 255 - mean) / std


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    progress: DataProgress | None = None,
    train_images: int | None = None,
    image_size: int | None = None,
) -> ImageData:
    """Load a data set into memory.

    Args:
        name: One of `DATA_SETS`.
        data_dir: Folder that holds `NAME/train.parquet` and `NAME/test.parquet` with columns
            `image` and `label` (the hub's own column names are understood too). None takes the
            data from the Hugging Face hub. `digits` needs neither.
            `imagefolder` reads `{train,test}/CLASS/*` in it.
        progress: Called while images are decoded with the part ("train" or "test"), the images
            done and the images in all.
        train_images: Take only the first so many training images; None takes all.
        image_size: Height and width to which the images of `imagefolder` are resized; None is 64.

    Raises:
        UnknownNameError: `name` is not in `DATA_SETS`.
        DataError: A file is missing, broken or of another layout, a package is missing, or there
            are fewer training images than `train_images`.
    """
    info = pick("data set", name, DATA_SETS)
    if info.folder:
        return _image_folder(name, info, data_dir, progress, train_images, image_size)
    if not info.hub:
        return _digits(name, train_images)
    (train_source, train), (test_source, test) = (
        _read(name, info, part, data_dir, progress, limit)
        for part, limit in (("train", train_images), ("test", None))
    )
    _check_classes(train_source, train.labels, len(train.names) or MAX_CLASSES)
    names = train.names or tuple(map(str, range(int(train.labels.max()) + 1)))
    _check_classes(test_source, test.labels, len(names))
    if test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{test_source}: images of shape {tuple(test.images.shape[1:])}; expected "
            f"{tuple(train.images.shape[1:])} as in the training set; resize the images"
        )
    return _assemble(name, (train.images, train.labels), (test.images, test.labels), names)


def hold_out(data: ImageData, part: float | int, seed: int) -> ImageData:
    """Put some of the training images, drawn at random, in the place of the test set.

    Args:
        data: The data set.
        part: The share of the training images, or how many.
        seed: Seed of the draw.

    Returns:
        The rest of the training set, with its own mean and deviation, and `part` of it for
        validation; the test set is not in it.

    Raises:
        DataError: Either would be empty.
    """
    total = len(data.train_labels)
    count = part if isinstance(part, int) else round(part * total)
    if not 1 <= count < total:
        raise DataError(
            f"validation {part}: {count} of the {total} training images; expected at least 1 for "
            "validation and 1 for training"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count].sort().values, order[count:].sort().values
    images, labels = data.train_images, data.train_labels
    parts = (images[rest], labels[rest]), (images[held], labels[held])
    return replace(_assemble(data.name, *parts, data.classes), split="validation")


def _read(
    name: str,
    info: DatasetInfo,
    part: str,
    data_dir: str | Path | None,
    progress: DataProgress | None,
    limit: int | None,
) -> tuple[str, Split]:
    """One part of a data set, and where it came from."""
    parquet = _require("tdlrt_lab.data.parquet", extra="data")
    columns = parquet.Columns(
        image=list(dict.fromkeys(["image", info.image])),
        label=list(dict.fromkeys(["label", info.label])),
    )
    if data_dir is None:
        split_name = info.test if part == "test" else part
        table, source = _from_hub(info.hub, split_name), f"{info.hub} ({split_name})"
    else:
        path = Path(data_dir) / name / f"{part}.parquet"
        table, source = parquet.read_table(path, columns), str(path)
    if limit is not None:
        _check_limit(source, limit, len(table))
        table = table.slice(0, limit)
    report = _reporter(part, progress)
    split: Split = parquet.decode_table(table, source, columns, info.mode, report)
    return source, split


def _image_folder(
    name: str,
    info: DatasetInfo,
    data_dir: str | Path | None,
    progress: DataProgress | None,
    train_images: int | None,
    image_size: int | None,
) -> ImageData:
    if data_dir is None:
        raise DataError(
            f"data_dir None: expected the folder that holds train and test for {name}; give it "
            "with --data-dir"
        )
    files = _require("tdlrt_lab.data.imagefolder", extra="data")
    size, folder = image_size or info.image_shape[1], Path(data_dir)
    names = files.class_names(folder / "train")
    train, test = (
        files.read_folder(folder / part, names, info.mode, size, _reporter(part, progress))
        for part in ("train", "test")
    )
    images, labels = train.images, train.labels
    if train_images is not None:
        _check_limit(str(folder / "train"), train_images, len(labels))
        # Files come class by class: the first so many would be of a few classes.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order[:train_images]], labels[order[:train_images]]
    return _assemble(name, (images, labels), (test.images, test.labels), names)


def _reporter(part: str, progress: DataProgress | None) -> Callable[[int, int], None]:
    return lambda done, total: progress(part, done, total) if progress else None


def _check_limit(source: str, limit: int, images: int) -> None:
    if limit > images:
        raise DataError(
            f"train_images {limit}: {source} holds {images} images; expected at most that many; "
            "lower it, or leave it out to take all"
        )


def _digits(name: str, train_images: int | None) -> ImageData:
    """scikit-learn's 8x8 digits, a fifth of every class held out for the test."""
    datasets = _require("sklearn.datasets", extra="cli")
    selection = _require("sklearn.model_selection", extra="cli")
    bunch = datasets.load_digits()
    # Grey levels 0 to 16 spread over 0 to 255; the rounding keeps them apart.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = selection.train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target
    )
    if train_images is not None:
        _check_limit(name, train_images, len(train))
        train = train[:train_images]
    names = tuple(map(str, range(10)))
    return _assemble(name, (images[train], labels[train]), (images[test], labels[test]), names)


def _from_hub(repository: str, part: str) -> Any:
    datasets = _require("datasets", extra="data")
    try:
        return datasets.load_dataset(repository, split=part).with_format("arrow")[:]
    except Exception as error:  # Errors of many libraries pass through `datasets`.
        raise DataError(
            f"{repository}: could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {error}); check the connection, or give the folder that "
            "holds the parquet files with --data-dir"
        ) from error


def _require(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading these data needs the package {error.name}, which is not installed; "
            f"run: pip install 'tdlrt[{extra}]'"
        ) from error


def _check_classes(source: str, labels: Tensor, classes: int) -> None:
    if labels.max() >= classes:
        row = int(labels.argmax())
        raise DataError(
            f"{source}, row {row}: label {int(labels[row])}; expected 0 to {classes - 1}, the "
            "classes of the training set; remove the row or complete the training set"
        )


def _assemble(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: tuple[str, ...]
) -> ImageData:
    mean, std = _channel_statistics(train[0])
    return ImageData(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=classes,
        mean=mean,
        std=std,
    )


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, exact and in little memory: from counts of levels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum()
        mean = share @ levels
        means.append(float(mean))
        # A constant channel has no spread to divide by.
        stds.append(float((share @ (levels - mean).square()).sqrt()) or 1.0)
    return tuple(means), tuple(stds)
