"""Image tables in the layout of the Hugging Face hub, checked row by row and decoded to tensors."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tdlrt.errors import DataError

__all__ = ["Columns", "Split", "decode_table", "read_table"]

LAYOUT = "a column of images, struct<bytes, path>, and a column of integer labels"
ROWS_PER_REPORT = 1000


class Columns(NamedTuple):
    """Names a column may have, first choice first."""

    image: Sequence[str]
    label: Sequence[str]


class Split(NamedTuple):
    """Images (N, channels, height, width) in uint8, labels (N,) in int64, class names if known."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


def read_table(path: Path) -> pa.Table:
    """Read the parquet file at `path`.

    Raises:
        DataError: The file is missing, cannot be read, or is not a parquet file.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected parquet with {LAYOUT}; put the file there, or leave "
            "the data directory out to take the data from the Hugging Face hub"
        )
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}); "
            f"expected parquet with {LAYOUT}; copy or download the file again"
        ) from error


def decode_table(
    table: pa.Table,
    source: str,
    columns: Columns,
    mode: Literal["L", "RGB"],
    progress: Callable[[int, int], None],
) -> Split:
    """Decode every image of `table`.

    Args:
        table: Rows with an encoded image and a label.
        source: Where the table comes from, as errors name it.
        columns: Names of the two columns.
        mode: Pillow mode of the result: "L" gives one channel, "RGB" three.
        progress: Called now and then with the rows done and the rows in all.

    Raises:
        DataError: The table is empty or of another layout, an image cannot be decoded or has
            another size than the first one, or a label is missing or negative.
    """
    image_column = _column(table, source, columns.image, "images")
    label_column = _column(table, source, columns.label, "labels")
    if table.num_rows == 0:
        raise DataError(f"{source}: no rows; expected one row per image; download the file again")
    labels = _labels(label_column, source)
    images = _images(image_column, source, mode, progress)
    return Split(images, labels, _class_names(table, columns.label))


def _column(table: pa.Table, source: str, names: Sequence[str], what: str) -> pa.ChunkedArray:
    for name in names:
        if name in table.column_names:
            return table.column(name)
    raise DataError(
        f"{source}: columns {', '.join(table.column_names) or 'none'}; expected {what} in "
        f"{' or '.join(names)}; rename the column"
    )


def _labels(column: pa.ChunkedArray, source: str) -> Tensor:
    if not pa.types.is_integer(column.type):
        raise DataError(f"{source}: labels of type {column.type}; expected integers from 0")
    if column.null_count:
        raise DataError(f"{source}: {column.null_count} labels are missing; expected one per image")
    labels = torch.from_numpy(column.to_numpy().astype(np.int64))
    if labels.min() < 0:
        row = int(labels.argmin())
        raise DataError(
            f"{source}, row {row}: label {int(labels[row])}; expected classes numbered from 0; "
            "remove the rows without a class"
        )
    return labels


def _images(
    column: pa.ChunkedArray,
    source: str,
    mode: Literal["L", "RGB"],
    progress: Callable[[int, int], None],
) -> Tensor:
    if not (pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0):
        raise DataError(
            f"{source}: images of type {column.type}; expected struct<bytes, path> with the "
            "encoded image files; write the table with the Image feature of `datasets`"
        )
    encoded = pa.compute.struct_field(column, "bytes").to_pylist()
    first = _decode(encoded[0], source, 0, mode)
    pixels = np.empty((len(encoded), *first.shape), dtype=np.uint8)
    for row, content in enumerate(encoded):
        image = _decode(content, source, row, mode)
        if image.shape != first.shape:
            raise DataError(
                f"{source}, row {row}: an image of {image.shape[1]}x{image.shape[0]} pixels; "
                f"expected {first.shape[1]}x{first.shape[0]} as in row 0; resize the images"
            )
        pixels[row] = image
        if (row + 1) % ROWS_PER_REPORT == 0 or row + 1 == len(encoded):
            progress(row + 1, len(encoded))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode(content: bytes | None, source: str, row: int, mode: str) -> np.ndarray[Any, Any]:
    if content is None:
        raise DataError(
            f"{source}, row {row}: no image bytes; expected the encoded image file; "
            "write the images into the table instead of their paths"
        )
    try:
        image = Image.open(io.BytesIO(content)).convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{source}, row {row}: {len(content)} bytes that are no readable image ({error}); "
            "expected a PNG or JPEG file; download the file again"
        ) from error
    return np.asarray(image).reshape(image.height, image.width, len(mode))


def _class_names(table: pa.Table, label_names: Sequence[str]) -> tuple[str, ...]:
    """Class names from the metadata `datasets` writes; empty where there are none."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    for name in label_names:
        if name in features:
            return tuple(features[name].get("names", ()))
    return ()
