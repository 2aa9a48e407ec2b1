import importlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the tensors of the tests are small

collect_ignore = ["programs"]

SCRIPTS = (Path(__file__).parents[2] / "benchmarks", Path(__file__).parent / "programs")


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name."""
    for folder in SCRIPTS:
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def write_parquet(tmp_path):
    """Write `tmp_path/NAME/PART.parquet` in the hub's image layout; any column can be replaced."""

    def write(name, part, images, labels, columns=("image", "label"), metadata=None):
        rows = [{"bytes": encode(image), "path": None} for image in images]
        image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        arrays = pa.array(rows, image_type), pa.array(labels)
        table = pa.table(dict(zip(columns, arrays, strict=True)))
        return store(tmp_path, name, part, table.replace_schema_metadata(metadata))

    return write


def store(folder, name, part, table):
    path = folder / name / f"{part}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


def encode(image):
    """PNG bytes of an array; bytes and None stay what they are."""
    if not isinstance(image, np.ndarray):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
