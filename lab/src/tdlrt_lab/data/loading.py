"""Reading of data sets: digits, parquet files, the Hugging Face hub, image folders, text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import DataError
from tdlrt.extras import needs_extra
from tdlrt_lab.data.catalogue import DATA_SETS, DatasetInfo
from tdlrt_lab.data.image_data import Split, make_image_data
from tdlrt_lab.data.protocol import Data
from tdlrt_lab.data.stdlib import read_stdlib
from tdlrt_lab.names import pick

__all__ = ["DataProgress", "load_data"]

MAX_CLASSES = 2**16
"""Limit on labels without class names: the largest label sets the number of classes."""

DataProgress = Callable[[str, int, int], None]


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    progress: DataProgress = lambda part, done, total: None,
    train_images: int | None = None,
    image_size: int | None = None,
) -> Data:
    """Load a data set into memory.

    Args:
        name: One of `DATA_SETS`.
        data_dir: Folder with `NAME/train.parquet` and `NAME/test.parquet`, whose columns are
            `image` and `label` or have the hub's own names. For `imagefolder`, a folder with
            `{train,test}/CLASS/*`. None downloads the data from the Hugging Face hub. Not used by
            `digits` and `stdlib`.
        progress: Called while images are decoded, with the part ("train" or "test"), the number of
            images decoded and their total.
        train_images: Number of training images to take; None takes all.
        image_size: Height and width to which the images of `imagefolder` are resized; None is 64.

    Raises:
        UnknownNameError: `name` is not in `DATA_SETS`.
        DataError: A file is missing, damaged or in another layout, or there are fewer training
            images than `train_images`.
        MissingExtraError: A package that reads the data is not installed.
    """
    info = pick("data set", name, DATA_SETS)
    if info.is_text:
        return read_stdlib(name, context=info.input_shape[0])
    if info.folder:
        train, test = _read_folders(info, data_dir, progress, train_images, image_size)
    elif info.hub:
        train, test = _read_tables(name, info, data_dir, progress, train_images)
    else:
        train, test = _read_digits(name, train_images)
    return make_image_data(name, train, test)


def _read_tables(
    name: str,
    info: DatasetInfo,
    data_dir: str | Path | None,
    progress: DataProgress,
    train_images: int | None,
) -> tuple[Split, Split]:
    (train_source, train), (test_source, test) = (
        _read_table(name, info, part, data_dir, progress, limit)
        for part, limit in (("train", train_images), ("test", None))
    )
    _check_labels(train_source, train.labels, len(train.classes) or MAX_CLASSES)
    classes = train.classes or tuple(map(str, range(int(train.labels.max()) + 1)))
    _check_labels(test_source, test.labels, len(classes))
    if test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{test_source}: images of shape {tuple(test.images.shape[1:])}; expected "
            f"{tuple(train.images.shape[1:])} as in the training set; resize the images"
        )
    return train._replace(classes=classes), test


def _read_table(
    name: str,
    info: DatasetInfo,
    part: str,
    data_dir: str | Path | None,
    progress: DataProgress,
    limit: int | None,
) -> tuple[str, Split]:
    """One part of a data set, and the name of its source for error messages."""
    with needs_extra("data", f"the data set {name!r}"):
        from tdlrt_lab.data.parquet import Columns, decode_table, read_table
    columns = Columns(
        image=list(dict.fromkeys(["image", info.image])),
        label=list(dict.fromkeys(["label", info.label])),
    )
    if data_dir is None:
        split_name = info.test if part == "test" else part
        table, source = _download(info.hub, split_name), f"{info.hub} ({split_name})"
    else:
        path = Path(data_dir) / name / f"{part}.parquet"
        table, source = read_table(path, columns), str(path)
    if limit is not None:
        _check_limit(source, limit, len(table))
        table = table.slice(0, limit)
    return source, decode_table(table, source, columns, info.mode, partial(progress, part))


def _download(repository: str, split: str) -> Any:
    with needs_extra("data", f"{repository} from the Hugging Face hub"):
        import datasets
    try:
        return datasets.load_dataset(repository, split=split).with_format("arrow")[:]
    except Exception as error:  # `datasets` passes on the errors of many libraries
        raise DataError(
            f"{repository}: could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}); check the connection, or give the folder that "
            "holds the parquet files with --data-dir"
        ) from error


def _read_folders(
    info: DatasetInfo,
    data_dir: str | Path | None,
    progress: DataProgress,
    train_images: int | None,
    image_size: int | None,
) -> tuple[Split, Split]:
    if data_dir is None:
        raise DataError(
            "data_dir None: expected the folder with train/CLASS/* and test/CLASS/*; give it "
            "with --data-dir"
        )
    with needs_extra("data", "a folder of images"):
        from tdlrt_lab.data.imagefolder import class_names, read_folder
    size, folder = image_size or info.input_shape[1], Path(data_dir)
    classes = class_names(folder / "train")
    train, test = (
        read_folder(folder / part, classes, info.mode, size, partial(progress, part))
        for part in ("train", "test")
    )
    if train_images is not None:
        _check_limit(str(folder / "train"), train_images, len(train.labels))
        # The files are sorted by class: the first ones would be of few classes.
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
        train = train.select(order[:train_images])
    return train, test


def _read_digits(name: str, train_images: int | None) -> tuple[Split, Split]:
    """scikit-learn's 8x8 digits; a fifth of every class is the test set."""
    with needs_extra("cli", f"the data set {name!r}"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    # Levels 0 to 16 become 0 to 255, rounded; they stay different.
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    whole = Split(images, labels, tuple(map(str, range(10))))
    rows = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target
    )
    train, test = map(torch.tensor, rows)
    if train_images is not None:
        _check_limit(name, train_images, len(train))
        train = train[:train_images]
    return whole.select(train), whole.select(test)


def _check_limit(source: str, limit: int, images: int) -> None:
    if limit > images:
        raise DataError(
            f"train_images {limit}: {source} holds {images} images; expected at most that many; "
            "lower it, or leave it out to take all"
        )


def _check_labels(source: str, labels: Tensor, classes: int) -> None:
    if labels.max() >= classes:
        row = int(labels.argmax())
        raise DataError(
            f"{source}, row {row}: label {int(labels[row])}; expected 0 to {classes - 1}, the "
            "classes of the training set; remove the row or complete the training set"
        )
