import json
import shutil
import sys

import pytest
import torch

from tdlrt.export import FORMATS
from tdlrt.text_tables import format_bytes
from tdlrt_lab.cli.export import closing_lines
from tdlrt_lab.config import RunConfig
from tdlrt_lab.methods import METHODS as ALL_METHODS
from tdlrt_lab.run.runner import run

OPTIONS = {"model": "lenet5", "data": "digits", "batch_size": 64, "epochs": 6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run(RunConfig(**OPTIONS, budget=0.1), path)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    """A run that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.mark.parametrize("format", FORMATS)
def test_export_prints_what_it_measured(tdlrt, finished, tmp_path, format):
    out = tmp_path / "file"
    code, text, err = tdlrt("export", finished, "--format", format, "--out", out, "--rounds", 1)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 + len(str(out))
    table = [line.split()[0] for line in lines if "," in line and line.startswith(" ")]
    assert table == ["dense", "tucker", format]
    (parity,) = [line for line in lines if line.startswith("parity error ")]
    assert float(parity.split()[2]) < 1e-5
    assert lines[-1].startswith(f"{out} written in ")
    dense = 4 * json.loads((finished / "summary.json").read_text())["network_dense_parameters"]
    ratio = dense / out.stat().st_size
    assert (
        f"{format_bytes(out.stat().st_size)}, {ratio:.1f}x smaller than the dense weights" in text
    )


@pytest.mark.parametrize(
    ("bytes", "words"), [(50, "50 B, 2.0x smaller than"), (400, "400 B, 4.00x the size of")]
)
def test_a_file_may_be_larger_than_the_dense_weights(bytes, words):
    found = {
        "bytes": bytes,
        "networks": [{"bytes": 100}],
        "parity": 0.0,
        "batch_size": 1,
        "unit": "images",
    }
    lines = closing_lines(found | {"int8": False, "file": "f", "seconds": 1.0})
    assert lines[1] == f"{words} the dense weights"


def test_export_for_machines(tdlrt, copied):
    words = ("export", copied, "--format", "plain", "--json", "--rounds", 1, "--batch-size", 9)
    code, text, err = tdlrt(*words)
    assert (code, err) == (0, "")
    found = json.loads(text)
    path = copied / "export" / "lenet5.safetensors"
    assert (found["file"], found["bytes"]) == (str(path), path.stat().st_size)
    assert (found["format"], found["int8"], found["batch_size"]) == ("plain", False, 9)
    summary = json.loads((copied / "summary.json").read_text())
    assert found["accuracy"] == summary["accuracy"]
    dense, tucker, exported = found["networks"]
    assert dense["parameters"] == summary["network_dense_parameters"]
    assert tucker["parameters"] == summary["network_parameters"]
    assert exported["parameters"] == found["parameters"]
    assert all(row["inference_ms"] > 0 for row in found["networks"])
    code, _, err = tdlrt(*words)
    assert (code, err) == (
        2,
        f"error: {path}: already exists; replace it with --overwrite, or choose another path "
        "with --out\n",
    )
    assert tdlrt(*words, "--overwrite")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_int8_keeps_the_accuracy(tdlrt, finished, tmp_path, format):
    words = ("--format", format, "--int8", "--json", "--rounds", 1, "--out", tmp_path / "file")
    code, text, err = tdlrt("export", finished, *words)
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["accuracy"] > 90
    assert abs(found["int8_accuracy"] - found["accuracy"]) < 1


def test_a_dense_run_has_no_tucker_row(tdlrt, tmp_path):
    path = tmp_path / "run"
    run(RunConfig(**{**OPTIONS, "epochs": 1}, method="dense"), path)
    code, text, _ = tdlrt("export", path, "--format", "plain", "--rounds", 1)
    assert code == 0
    table = [line for line in text.splitlines() if "," in line and line.startswith(" ")]
    assert [line.split()[0] for line in table] == ["dense", "plain"]


METHODS = [name for name in ALL_METHODS if name not in ("dense", "tdlrt")]


@pytest.mark.parametrize("method", METHODS)
def test_the_network_of_any_method(tdlrt, tmp_path, method):
    path = tmp_path / "run"
    run(RunConfig(**{**OPTIONS, "epochs": 1}, method=method, budget=0.2), path)
    words = ("--format", "plain", "--rounds", 1, "--json")
    code, text, err = tdlrt("export", path, *words)
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["parity"] < 1e-5
    dense, trained, exported = found["networks"]
    assert trained["network"] in ("tucker", method)
    assert dense["parameters"] > 0 < exported["parameters"]


def test_the_file_says_what_its_input_is(tdlrt, finished, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "file"
    assert tdlrt("export", finished, "--format", "onnx", "--rounds", 1, "--out", out)[0] == 0
    session = onnxruntime.InferenceSession(out)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["input"].startswith("images (N, 1, 8, 8)")
    assert json.loads(facts["classes"]) == list("0123456789")
    assert 0 < json.loads(facts["mean"])[0] < json.loads(facts["std"])[0] < 1


def remove(name):
    return lambda run: (run / name).unlink()


def write(name, data):
    return lambda run: (run / name).write_bytes(data)


def cut(run):
    path = run / "checkpoints" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def foreign(run):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, run / "checkpoints" / "model.safetensors")


MODEL = "checkpoints/model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words", "code", "message"),
    [
        (remove("config.yaml"), [], 1, "contains no run; expected a directory written by"),
        (remove("summary.json"), [], 1, "the run is not finished; continue it with --resume"),
        (write("config.yaml", b"[1]"), [], 1, "config.yaml: not the configuration of a run"),
        (
            write("config.yaml", b"{model: lenet5, data: digits, method: tdlrt, more: 1}"),
            [],
            1,
            "config.yaml: has options that this version does not have",
        ),
        (remove(MODEL), [], 2, "model.safetensors: "),
        (write(MODEL, b""), [], 2, "model.safetensors: "),
        (cut, [], 2, "model.safetensors: "),
        (foreign, [], 2, "model.safetensors: "),
        (lambda run: None, ["--format", "onxx"], 2, "unknown format 'onxx'; did you mean onnx?"),
        (lambda run: None, ["--int8"], 2, "--int8 with --format 'plain': expected a format that"),
        (lambda run: None, ["--prefer", "fast"], 2, "unknown prefer 'fast'"),
        (lambda run: None, ["--rounds", "0"], 2, "Invalid value for '--rounds'"),
    ],
)
def test_what_cannot_be_exported(tdlrt, copied, spoil, words, code, message):
    spoil(copied)
    found = tdlrt("export", copied, "--format", "plain", *words)
    assert found[:2] == (code, "")
    assert found[2].startswith("error: ") and found[2].count("\n") == 1
    assert message in found[2]
    assert not (copied / "export").exists()


def test_a_missing_package_is_named(tdlrt, finished, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = tdlrt("export", finished, "--format", "onnx", "--out", tmp_path / "file")
    assert (code, err) == (
        1,
        "error: --format 'onnx' needs the package onnxruntime, which is not installed; "
        "run: pip install 'tdlrt[export]'\n",
    )
