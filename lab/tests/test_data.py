import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tdlrt.errors import DataError, MissingExtraError, UnknownNameError
from tdlrt_lab.data import DATA_SETS, load_data

RNG = np.random.default_rng(0)
GREY = [RNG.integers(0, 256, (6, 5), dtype=np.uint8) for _ in range(8)]
COLOUR = [RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8) for _ in range(8)]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.fixture
def mnist(write_parquet, tmp_path):
    write_parquet("mnist", "train", GREY, LABELS)
    write_parquet("mnist", "test", GREY[:3], LABELS[:3])
    return tmp_path


def test_digits_are_embedded_and_split_in_the_same_way_every_time():
    data, again = load_data("digits"), load_data("digits")
    assert data.image_shape == (1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert len(data.train_labels) == 1437 and len(data.test_labels) == 360
    assert torch.equal(data.test_images, again.test_images)
    assert data.test_labels.bincount().min() >= 34  # every class is in the test set
    assert data.train_images.unique().numel() == 17  # no grey level is lost in uint8


def test_parquet_pixels_and_labels_arrive_unchanged(mnist):
    data = load_data("mnist", mnist)
    assert np.array_equal(data.train_images[:, 0].numpy(), np.stack(GREY))
    assert data.train_labels.tolist() == LABELS
    assert data.test_labels.tolist() == LABELS[:3]
    assert data.classes == ("0", "1", "2")
    assert data.train_labels.dtype == torch.int64


def test_statistics_are_those_of_the_training_images(write_parquet, tmp_path):
    write_parquet("cifar10", "train", COLOUR, LABELS)
    write_parquet("cifar10", "test", COLOUR[:1], [0])
    data = load_data("cifar10", tmp_path)
    pixels = np.stack(COLOUR).astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    assert data.train_images.shape == (8, 3, 6, 5)
    assert torch.equal(data.train_images[0].permute(1, 2, 0), torch.from_numpy(COLOUR[0]))


def test_first_training_images_alone(mnist):
    data = load_data("mnist", mnist, train_images=4)
    assert np.array_equal(data.train_images[:, 0].numpy(), np.stack(GREY[:4]))
    assert (data.train_labels.tolist(), len(data.test_labels)) == (LABELS[:4], 3)
    assert data.mean == pytest.approx([np.stack(GREY[:4]).mean() / 255])
    with pytest.raises(DataError, match=r"train_images 9: .*train\.parquet holds 8 images"):
        load_data("mnist", mnist, train_images=9)


def test_first_training_images_of_the_digits():
    data, whole = load_data("digits", train_images=100), load_data("digits")
    assert torch.equal(data.train_images, whole.train_images[:100])
    assert torch.equal(data.train_labels, whole.train_labels[:100])
    assert torch.equal(data.test_images, whole.test_images)
    with pytest.raises(DataError, match=r"train_images 2000: digits holds 1437 images"):
        load_data("digits", train_images=2000)


def test_constant_images_have_a_usable_deviation(write_parquet, tmp_path):
    for part in ("train", "test"):
        write_parquet("mnist", part, [np.zeros((4, 4), np.uint8)], [0])
    assert load_data("mnist", tmp_path).std == (1.0,)


def test_class_names_come_from_the_metadata_of_datasets(write_parquet, tmp_path):
    features = {"features": {"label": {"names": ["cat", "dog", "elk"], "_type": "ClassLabel"}}}
    metadata = {"huggingface": json.dumps({"info": features})}
    for part in ("train", "test"):
        write_parquet("mnist", part, GREY, LABELS, metadata=metadata)
    assert load_data("mnist", tmp_path).classes == ("cat", "dog", "elk")


def test_column_names_of_the_hub_are_understood(write_parquet, tmp_path):
    for part in ("train", "test"):
        write_parquet("cifar100", part, COLOUR, LABELS, columns=("img", "fine_label"))
    assert load_data("cifar100", tmp_path).image_shape == (3, 6, 5)


def test_progress_reports_each_part_to_its_end(mnist):
    seen = []
    load_data("mnist", mnist, progress=lambda *report: seen.append(report))
    assert seen == [("train", 8, 8), ("test", 3, 3)]


def test_without_folder_the_hub_is_asked(mnist, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(repository, split):
        asked.append((repository, split))
        path = str(mnist / "mnist" / f"{split}.parquet")
        return datasets.Dataset.from_parquet(path, cache_dir=str(mnist / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("mnist")
    assert asked == [("ylecun/mnist", "train"), ("ylecun/mnist", "test")]
    assert np.array_equal(data.train_images[:, 0].numpy(), np.stack(GREY))


def test_unreachable_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(repository, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"uoft-cs/cifar10: could not be .*no route.*--data-dir"):
        load_data("cifar10")


def test_unknown_name():
    with pytest.raises(UnknownNameError, match=r"data set 'cifar'; did you mean cifar10"):
        load_data("cifar")


def test_missing_package_names_the_extra(monkeypatch, mnist):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"package sklearn, .*pip install 'tdlrt\[cli\]'"):
        load_data("digits")
    monkeypatch.delitem(sys.modules, "tdlrt_lab.data.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"package pyarrow, .*pip install 'tdlrt\[data\]'"):
        load_data("mnist", mnist)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"mnist.train\.parquet: no such file; expected parquet"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + bytes(40) + b"PAR1"])
def test_broken_file(mnist, content):
    (mnist / "mnist" / "test.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.parquet: not a readable parquet file"):
        load_data("mnist", mnist)


def test_truncated_file(mnist):
    path = mnist / "mnist" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"train\.parquet: not a readable parquet file"):
        load_data("mnist", mnist)


WRONG_TABLES = {
    "no images": (
        {"pic": ["a"], "label": [0]},
        r"columns pic, label; expected images in one column named image",
    ),
    "no labels": (
        {"image": ["a"], "y": [0]},
        r"columns image, y; expected labels in one column named label",
    ),
    "no columns": ({}, r"columns none; expected images"),
    "paths": ({"image": ["a.png"], "label": [0]}, r"images of type string; expected struct<bytes"),
    "text labels": (
        {"image": [{"bytes": b"x"}], "label": ["cat"]},
        r"labels of type string; expected integers",
    ),
    "empty": (
        {"image": pa.array([], pa.struct({"bytes": pa.binary()})), "label": pa.array([], "int64")},
        r"no rows; expected one row per image",
    ),
}


@pytest.mark.parametrize(("columns", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_wrong_layout(mnist, columns, message):
    pa.parquet.write_table(pa.table(columns), mnist / "mnist" / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: " + message):
        load_data("mnist", mnist)


WRONG_ROWS = {
    "other size": (
        [*GREY[:7], GREY[0].T],
        LABELS,
        r", row 7: an image of 6x5 pixels; expected 5x6",
    ),
    "no bytes": ([*GREY[:7], None], LABELS, r", row 7: no image bytes"),
    "no image": ([*GREY[:7], b"junk"], LABELS, r", row 7: 4 bytes that are not a readable image"),
    "missing label": (GREY, [*LABELS[:7], None], r": 1 labels are missing"),
    "negative label": (GREY, [*LABELS[:7], -1], r", row 7: label -1; expected classes numbered"),
}


@pytest.mark.parametrize(("images", "labels", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_wrong_rows(write_parquet, mnist, images, labels, message):
    write_parquet("mnist", "train", images, labels)
    with pytest.raises(DataError, match=r"train\.parquet" + message):
        load_data("mnist", mnist)


def test_classes_and_sizes_of_the_test_set_must_be_those_of_the_training_set(write_parquet, mnist):
    write_parquet("mnist", "test", GREY, [*LABELS[:7], 3])
    with pytest.raises(DataError, match=r"test\.parquet, row 7: label 3; expected 0 to 2"):
        load_data("mnist", mnist)
    write_parquet("mnist", "test", [GREY[0].T], [0])
    with pytest.raises(DataError, match=r"test\.parquet: images of shape \(1, 5, 6\); expected"):
        load_data("mnist", mnist)


def test_tiny_imagenet_is_tested_on_its_valid_part(write_parquet, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for part in ("train", "test"):
        write_parquet("tiny_imagenet", part, COLOUR, LABELS)
    assert load_data("tiny_imagenet", tmp_path).image_shape == (3, 6, 5)
    asked = []

    def load_dataset(repository, split):
        asked.append((repository, split))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="zh-plus/tiny-imagenet"):
        load_data("tiny_imagenet")
    assert asked == [("zh-plus/tiny-imagenet", "train")]
    assert DATA_SETS["tiny_imagenet"].test == "valid"


@pytest.fixture
def folder(tmp_path):
    """Two classes of three training images, one test image of one of them; sizes differ."""
    for number, (part, name) in enumerate(
        [("train", "cat"), ("train", "dog")] * 3 + [("test", "dog")]
    ):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        colour = (10 * number, 100, 200)
        Image.new("RGB", (5 + number, 7), colour).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "test" / "cat").mkdir()
    return tmp_path


def test_image_folder(folder):
    (folder / "train" / "dog" / ".thumbs").write_bytes(b"")
    seen = []
    data = load_data("imagefolder", folder, lambda *report: seen.append(report), image_size=6)
    assert data.image_shape == (3, 6, 6)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train_images[:, 0, 2, 3].tolist() == [0, 20, 40, 10, 30, 50]
    assert (data.test_labels.tolist(), data.test_images[0, 0, 0, 0]) == ([1], 60)
    assert seen == [("train", 6, 6), ("test", 1, 1)]
    assert load_data("imagefolder", folder).image_shape == (3, 64, 64)
    few = load_data("imagefolder", folder, train_images=4)
    assert set(few.train_labels.tolist()) == {0, 1}


def test_wrong_image_folders(folder):
    with pytest.raises(DataError, match=r"data_dir None: expected the folder .*--data-dir"):
        load_data("imagefolder")
    with pytest.raises(DataError, match=r"train: no such folder; expected a folder train and"):
        load_data("imagefolder", folder / "train")
    with pytest.raises(DataError, match=r"train_images 7: .*train holds 6 images"):
        load_data("imagefolder", folder, train_images=7)
    (folder / "test" / "elk").mkdir()
    with pytest.raises(DataError, match=r"elk: this class is not in the training set; .*cat"):
        load_data("imagefolder", folder)
    (folder / "test" / "elk").rmdir()
    (folder / "test" / "cat" / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a\.png: not a readable image"):
        load_data("imagefolder", folder)
    for path in folder.glob("test/*/*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"test: no images"):
        load_data("imagefolder", folder)
    for path in folder.glob("test/*"):
        path.rmdir()
    with pytest.raises(DataError, match=r"test: no subfolders; expected one per class"):
        load_data("imagefolder", folder)


@pytest.mark.parametrize(("part", "count"), [(0.25, 359), (100, 100)])
def test_validation_images_are_carved_from_the_training_set(part, count):
    data, seed = load_data("digits"), 3
    held = data.hold_out(part, seed)
    assert (held.split, data.split) == ("validation", "test")
    assert len(held.test_labels) == count and len(held.train_labels) == 1437 - count
    whole, parts = rows(data.train_images), rows(held.train_images) + rows(held.test_images)
    assert sorted(parts) == sorted(whole)
    assert held.mean == pytest.approx([float(held.train_images.double().mean()) / 255])
    assert torch.equal(held.test_images, data.hold_out(part, seed).test_images)
    assert not torch.equal(held.test_labels, data.hold_out(part, 4).test_labels)


def rows(images):
    return [bytes(image.flatten().tolist()) for image in images]


@pytest.mark.parametrize(("part", "count"), [(1437, 1437), (0.0001, 0), (0.9999, 1437)])
def test_neither_part_is_empty(part, count):
    with pytest.raises(DataError, match=rf"validation {part}: {count} of the 1437 training images"):
        load_data("digits").hold_out(part, 0)
