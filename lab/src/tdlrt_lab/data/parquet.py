"""Parquet tables of images in the layout of the Hugging Face hub, decoded to tensors."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tdlrt.errors import DataError
from tdlrt.files import open_regular
from tdlrt_lab.data.image_data import Split
from tdlrt_lab.data.images import ImageFileError, decode_image, to_pixels
from tdlrt_lab.data.pixels import stack_images

__all__ = ["Columns", "decode_table", "read_table"]

LAYOUT = "a column of images, struct<bytes, path>, and a column of integer labels"

# A small compressed file can expand without limit. Encoded images hardly compress further, so a
# table that exceeds both of these limits does not hold images.
ALWAYS_ALLOWED_BYTES = 2**26
MAX_COMPRESSION_RATIO = 100
BYTES_PER_ROW = 12  # a label and the dictionary index of an image


class Columns(NamedTuple):
    """Accepted names of the two columns, in order of preference."""

    image: Sequence[str]
    label: Sequence[str]


def read_table(path: Path, columns: Columns) -> pa.Table:
    """Read the columns of images and labels of a parquet file.

    Args:
        path: The file.
        columns: Accepted names of the two columns.

    Raises:
        DataError: The file is missing, damaged, in another layout, or far larger when decompressed
            than a table of images can be.
    """
    try:
        with open_regular(path) as source:
            return _read(source, path, columns)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; expected parquet with {LAYOUT}; put the file there, or leave "
            "out the data directory to download the data from the Hugging Face hub"
        ) from error
    except Exception as error:  # pyarrow raises many types on damaged files
        raise DataError(
            f"{path}: not a readable parquet file ({str(error) or type(error).__name__}); "
            f"expected parquet with {LAYOUT}; copy or download the file again"
        ) from error


def _read(source: IO[bytes], path: Path, columns: Columns) -> pa.Table:
    """The columns of an open file; `path` names it in messages."""
    metadata = pq.read_metadata(source)
    schema = metadata.schema.to_arrow_schema()
    image, label = _locate(schema, str(path), columns)
    leaves = [f"{image}.bytes", label]
    _check_inflation(path, os.fstat(source.fileno()).st_size, metadata)
    # Read as a dictionary, equal images are in memory only once.
    with pq.ParquetFile(source, metadata=metadata, read_dictionary=leaves[:1]) as file:
        groups = [file.read_row_group(n, leaves) for n in range(file.num_row_groups)]
    return pa.concat_tables(groups) if groups else schema.empty_table()


def decode_table(
    table: pa.Table,
    source: str,
    columns: Columns,
    mode: Literal["L", "RGB"],
    progress: Callable[[int, int], None],
) -> Split:
    """Decode all images of a table.

    Args:
        table: Rows with an encoded image and a label.
        source: Where the table comes from, for error messages.
        columns: Accepted names of the two columns.
        mode: Pillow mode of the result: "L" gives one channel, "RGB" three.
        progress: Called regularly with the number of images decoded and their total.

    Raises:
        DataError: The table is empty or in another layout, an image cannot be decoded or differs in
            size from the first, a label is missing or negative, or the memory is too small.
    """
    image, label = _locate(table.schema, source, columns)
    if table.num_rows == 0:
        raise DataError(f"{source}: no rows; expected one row per image; download the file again")
    labels = _read_labels(table.column(label), source)
    images = _decode_images(table.column(image), source, mode, progress)
    return Split(images, labels, _class_names(table, source, columns.label))


def _locate(schema: pa.Schema, source: str, columns: Columns) -> tuple[str, str]:
    """Find the columns of images and of labels, and check their types."""
    image = _find_column(schema, source, columns.image, "images")
    label = _find_column(schema, source, columns.label, "labels")
    kind = schema.field(image).type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise DataError(
            f"{source}: images of type {kind}; expected struct<bytes, path> with the "
            "encoded image files; write the table with the Image feature of `datasets`"
        )
    kind = schema.field(label).type
    if not pa.types.is_integer(kind):
        raise DataError(f"{source}: labels of type {kind}; expected integers from 0")
    return image, label


def _find_column(schema: pa.Schema, source: str, names: Sequence[str], what: str) -> str:
    for name in names:
        if schema.names.count(name) == 1:
            return name
    raise DataError(
        f"{source}: columns {', '.join(schema.names) or 'none'}; expected {what} in "
        f"one column named {' or '.join(names)}; rename the column"
    )


def _check_inflation(path: Path, size: int, metadata: pq.FileMetaData) -> None:
    # Not column by column: pyarrow's `column` crashes the process on some damaged files.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    declared = metadata.num_rows * BYTES_PER_ROW + sum(group.total_byte_size for group in groups)
    if declared > max(ALWAYS_ALLOWED_BYTES, MAX_COMPRESSION_RATIO * size):
        raise DataError(
            f"{path}: {metadata.num_rows:,} rows that take {declared:,} bytes, in a file of "
            f"{size:,} bytes; expected encoded images, which hardly compress; download it again"
        )


def _read_labels(column: pa.ChunkedArray, source: str) -> Tensor:
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


def _decode_images(
    column: pa.ChunkedArray,
    source: str,
    mode: Literal["L", "RGB"],
    progress: Callable[[int, int], None],
) -> Tensor:
    encoded = pa.compute.struct_field(column, "bytes")
    height, width, channels = _decode(encoded[0].as_py(), source, 0, mode).shape

    def decoded() -> Iterator[np.ndarray[Any, Any]]:
        for row, content in enumerate(encoded):
            image = _decode(content.as_py(), source, row, mode)
            if image.shape[:2] != (height, width):
                raise DataError(
                    f"{source}, row {row}: an image of {image.shape[1]}x{image.shape[0]} pixels; "
                    f"expected {width}x{height} as in row 0; resize the images"
                )
            yield image

    return stack_images(decoded(), (len(encoded), height, width, channels), source, progress)


def _decode(
    content: object, source: str, row: int, mode: Literal["L", "RGB"]
) -> np.ndarray[Any, Any]:
    if not isinstance(content, bytes):
        raise DataError(
            f"{source}, row {row}: no image bytes; expected the encoded image file; "
            "store the images in the table instead of their paths"
        )
    try:
        return to_pixels(decode_image(io.BytesIO(content), mode), mode)
    except ImageFileError as error:
        raise DataError(
            f"{source}, row {row}: {len(content)} bytes that are not a readable image ({error}); "
            "expected a PNG or JPEG file; download the file again"
        ) from error


def _class_names(table: pa.Table, source: str, label_names: Sequence[str]) -> tuple[str, ...]:
    """Class names in the metadata that `datasets` writes; empty if there are none."""
    try:
        found = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        found = None
    for key in ("info", "features"):
        found = found.get(key, {}) if isinstance(found, Mapping) else None
    names: object = []
    for name in label_names:
        feature = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(feature, Mapping):
            names = feature.get("names") or []
            break
    if found is None or not (isinstance(names, list) and all(type(n) is str for n in names)):
        raise DataError(
            f"{source}: the metadata 'huggingface' cannot be interpreted; expected JSON with "
            "info.features.LABEL.names, a list of strings; write the table with `datasets`"
        )
    return tuple(names)
