"""Small files that stand for more than there is memory: refused, in little memory."""

import io
import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tdlrt.errors import DataError, RunError
from tdlrt_lab.data import load_data
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.sweep.plan import SweepError, read_sweep

# Address space beyond that of the imports; what is refused here would take more.
SPACE = 2**29

READ = f"""
import json, os, resource, sys, warnings
import torch
from tdlrt.errors import TdlrtError
from tdlrt_lab.data import load_data
import tdlrt_lab.data.imagefolder, tdlrt_lab.data.parquet

torch.set_num_threads(1)
warnings.simplefilter("ignore")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + {SPACE}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = dict()
for name, (data, folder) in json.load(sys.stdin).items():
    try:
        found[name] = str(load_data(data, folder).train_images.shape)
    except TdlrtError as error:
        found[name] = str(error)
print(json.dumps(found), flush=True)
os._exit(0)  # where the limit has kept pyarrow from starting a thread, its pool aborts at the exit
"""


def png(width, height):
    """One colour, one bit a pixel."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def claiming(width, height):
    """A PNG file of 8x8 pixels that says it has more."""
    content = png(8, 8)
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def jpeg_claiming(width, height):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, format="JPEG")
    frame = buffer.getvalue().index(b"\xff\xc0") + 5
    content = bytearray(buffer.getvalue())
    content[frame : frame + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


def eps(width, height):
    """For Pillow to read this, another program would run."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 {width} {height}\n%%EndComments\n".encode()


IMAGES = {
    "png that claims": (claiming(60_000, 60_000), "60000x60000|3600000000 pixels"),
    "jpeg that claims": (jpeg_claiming(60_000, 60_000), "60000x60000|3600000000 pixels"),
    "png of one colour": (png(9000, 9000), "9000x9000 pixels, more than 67,108,864 in all"),
    "flat png": (claiming(2**31 - 1, 1), "pixels|cannot"),
    "eps": (eps(8, 8), "cannot identify image file"),
}


def table(cells, labels=None):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": cell, "path": None} for cell in cells]
    return pa.table({"image": pa.array(rows, kind), "label": labels or [0] * len(rows)})


def of_equal_rows(count, cell):
    indices = pa.array(np.zeros(count, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, pa.array([cell], pa.binary()))
    image = pa.StructArray.from_arrays([column], ["bytes"])
    return pa.table({"image": image, "label": pa.array(np.zeros(count, np.int8))})


PADDED = png(8, 8) + bytes(2**20)
NESTED = pa.array(
    [[[[[b"a"] * 100] * 100] * 10]], pa.list_(pa.list_(pa.list_(pa.list_(pa.binary()))))
)
TABLES = {
    "a cell": (table([bytes(200_000_000)]), "hardly compress"),
    "many cells": (table([bytes(10_000_000)] * 20), "hardly compress|not a readable image"),
    "equal cells": (of_equal_rows(2000, PADDED), r"torch.Size\(\[2000, 1, 8, 8\]\)"),
    "equal rows": (of_equal_rows(7_000_000, png(8, 8)), "7,000,000 rows that take .* hardly"),
    "nested": (pa.table({"image": NESTED, "label": [0]}), "images of type list"),
    "a label": (table([png(8, 8)], pa.array([10**12])), "label 1000000000000; expected 0 to 65535"),
    "an image": (table([claiming(60_000, 60_000)]), "row 0: .* not a readable image"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a bound on the address space")
def test_what_is_small_in_a_file_and_large_in_memory(tmp_path):
    cases = {}
    for name, (content, _) in IMAGES.items():
        for part in ("train", "test"):
            (tmp_path / name / part / "a").mkdir(parents=True)
            (tmp_path / name / part / "a" / "1.png").write_bytes(content)
        cases[name] = "imagefolder", str(tmp_path / name)
    for name, (content, _) in TABLES.items():
        (tmp_path / name / "mnist").mkdir(parents=True)
        pq.write_table(content, tmp_path / name / "mnist" / "train.parquet", compression="zstd")
        pq.write_table(table([png(8, 8)]), tmp_path / name / "mnist" / "test.parquet")
        cases[name] = "mnist", str(tmp_path / name)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert max(sizes) < 3_000_000
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (_, message) in (IMAGES | TABLES).items():
        assert re.search(message, found[name]), (name, found[name])


def test_images_that_do_not_fit_in_memory(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "1.png").write_bytes(png(8, 8))
    with pytest.raises(DataError, match=r"1 images of 100000000x100000000 pixels take .* memory"):
        load_data("imagefolder", tmp_path, image_size=10**8)


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"]
    + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
)
TEXTS = {
    "aliases": (LAUGHS, "more than 262,144 bytes with its aliases"),
    "merges": (MERGES, "more than 262,144 bytes with its aliases"),
    "itself": ("model: &a [*a]", "an alias that contains itself"),
    "deep": ("[" * 100_000, "more than 20 levels"),
    "long": ("x" * 300_000, "more than 262,144 bytes"),
    "digits": ("a: 0x" + "f" * 5000, "an integer beyond 64 bits"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_texts_that_stand_for_far_more(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SweepError, match=rf"config\.yaml: cannot be read as YAML \(.*{message}"):
        read_sweep(tmp_path / "config.yaml")
    with pytest.raises(RunError, match=rf"config\.yaml: cannot be read as YAML \(.*{message}"):
        RunDirectory(tmp_path).read_config()
