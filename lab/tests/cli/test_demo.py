import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tdlrt_lab import demo
from tdlrt_lab.cli.demo import closing_line
from tdlrt_lab.cli.display import rank_changes

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "CONFIG", replace(demo.CONFIG, epochs=2, batch_size=256))


def test_it_trains_exports_compares_and_reports(tdlrt, tmp_path, short):
    out, picture = tmp_path / "demo", tmp_path / "pictures/demo.svg"
    code, printed, err = tdlrt("demo", "--out", out, "--picture", picture)
    assert (code, err) == (0, "")
    last = " ".join(printed.partition("writing the report\n")[2].split())
    sizes = {name: path.stat().st_size for name, path in files(out).items()}
    assert f"{sizes['dense'] / sizes['tdlrt']:.1f}x smaller" in last
    assert "for 1 image (dense " in last
    assert "for 128 images (dense " in last
    assert f"its report in {out / 'report/index.html'}." in last
    assert (out / "report/index.html").exists()
    assert re.search(r"^ +ranks .*fc1 \d+x\d+", printed, re.MULTILINE)
    summary = json.loads((out / "summary.json").read_text())
    assert f"classifies {summary['accuracy']:.1f} % " in last
    assert f"(dense {summary['dense_accuracy']:.1f} %)" in last
    assert "epoch 1/2" in picture.read_text().replace("&#160;", " ")

    code, printed, err = tdlrt("demo", "--out", out)
    assert (code, printed) == (1, "")
    assert "--overwrite" in err


def files(out):
    return {"tdlrt": out / "export/lenet5.onnx", "dense": out / "baseline/export/lenet5.onnx"}


def test_json(tdlrt, tmp_path, short):
    code, printed, _ = tdlrt("demo", "--out", tmp_path / "demo", "--json")
    assert code == 0
    found = json.loads(printed.splitlines()[-1])
    assert found["event"] == "demo"
    assert Path(found["tdlrt"]["file"]).stat().st_size == found["tdlrt"]["bytes"]
    assert set(found["dense"]["milliseconds"]) == {"1", "128"}


def test_the_closing_line_names_every_figure():
    small, dense = (
        demo.ExportedNetwork(file=name, bytes=size, accuracy=accuracy, milliseconds=times)
        for name, size, accuracy, times in (
            ("s", 72_000, 98.25, {1: 0.0611, 128: 1.5}),
            ("d", 518_400, 98.05, {1: 0.08, 128: 3.0}),
        )
    )
    found = demo.Demonstration(tdlrt=small, dense=dense, out="o", report="r")
    line = closing_line(found)
    for words in ("98.2 %", "(dense 98.0 %)", "72 KB", "7.2x", "518 KB", "0.0611 ms for 1 image "):
        assert words in line


def test_changes_of_ranks():
    before = {name: [4, 3] for name in "abcde"}
    assert rank_changes(before, before) == ""
    assert rank_changes(before, before | {"b": [2, 3], "e": [4, 1]}) == "b 2x3, e 4x1"
    assert rank_changes({}, before) == "of 5 of 5 layers changed"
