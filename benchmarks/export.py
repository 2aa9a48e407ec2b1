"""Exported networks: parity, size, accuracy, latency, and the time it takes to export.

    python benchmarks/export.py --data-dir DATA_DIR

Trains LeNet-5 on MNIST with a budget of 5 % (2 epochs; kept in --runs and not trained again),
exports it in every format and measures each file in a process of its own. VGG16 is exported as it
is initialised, at rank 0.15: its files have size and speed, but no accuracy. Writes
benchmarks/results/export.json and the tables of docs/export.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import tdlrt
from tdlrt.export import FORMATS, export, load_network
from tdlrt_lab.config import RunConfig
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.exporting import accuracy_on, calibration_inputs, inference_times, load_run
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.runner import run

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/export.json"
PAGE = ROOT / "docs/export.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->"

CONFIG = {"model": "lenet5", "data": "mnist", "budget": 0.05, "epochs": 2, "seed": 0}
VGG_RANK = 0.15
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    directory = arguments.runs / "export_lenet5"
    if not (directory / "summary.json").exists():
        run(RunConfig(**CONFIG, data_dir=arguments.data_dir), directory, overwrite=True)
    rows = []
    for model in ("lenet5", "vgg16"):
        for format, writer in FORMATS.items():
            for int8 in (False, True)[: 1 + writer.has_int8]:
                case = {"model": model, "format": format, "int8": int8}
                paths = {"run": str(directory), "data_dir": arguments.data_dir}
                words = json.dumps({**case, **paths, "rounds": arguments.rounds})
                done = subprocess.run(
                    [sys.executable, __file__, "--case", words],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                rows.append(case | json.loads(done.stdout))
                print(rows[-1], flush=True)
    packages = ("onnx", "onnxscript", "onnxruntime", "torchao")
    result = {
        **made_by("python benchmarks/export.py --data-dir DATA_DIR", *packages),
        "training": CONFIG,
        "vgg_rank": VGG_RANK,
        "batch": BATCH,
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + tables(result) + END + after, encoding="utf-8")


def measure(
    model: str, format: str, int8: bool, run: str, data_dir: str | None, rounds: int
) -> dict[str, Any]:
    """Export one network once and measure the file."""
    network, data = load_run(run, data_dir) if model == "lenet5" else (_vgg16(), None)
    if data is None:
        images, calibration = torch.randn(BATCH, 3, 32, 32), torch.randn(512, 3, 32, 32)
    else:
        images, calibration = data.normalise(data.test_images[:BATCH]), calibration_inputs(data)
    with TemporaryDirectory() as folder:
        path, before = Path(folder) / "network", time.process_time()
        options = {"format": format, "calibration": calibration if int8 else None}
        report = export(network, path, images, **options)  # type: ignore[arg-type]
        cpu_seconds = time.process_time() - before
        exported = load_network(path, format, network)
    dense = tdlrt.to_dense(network)
    times = inference_times(dense, network, exported, images, rounds)
    return {
        "parity": report.parity,
        "parameters": report.parameters,
        "dense_parameters": sum(parameter.numel() for parameter in dense.parameters()),
        "bytes": report.bytes,
        "size_ratio": report.size_ratio,
        "accuracy": None if data is None else accuracy_on(exported, data),
        "trained_accuracy": None if data is None else accuracy_on(network, data),
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "dense_ms": 1e3 * times["dense"],
        "tucker_ms": 1e3 * times["trained"],
        "exported_ms": 1e3 * times["exported"],
    }


def _vgg16() -> nn.Module:
    torch.manual_seed(0)
    network = build_model("vgg16", (3, 32, 32), 10)
    tdlrt.factorize_(network, rank=VGG_RANK, init_scale=1.0)
    for _ in range(5):
        network(torch.randn(BATCH, 3, 32, 32))  # statistics for the batch norms
    return network.eval()


def tables(result: dict[str, Any]) -> str:
    """The part of docs/export.md that is measured."""
    training, first = result["training"], result["rows"][0]
    files = "\n".join(map(_file_line, result["rows"]))
    times = "\n".join(map(_time_line, result["rows"]))
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    return f"""\
LeNet-5 on MNIST, budget {training["budget"]}, {training["epochs"]} epochs, seed \
{training["seed"]}; trained accuracy {first["trained_accuracy"]:.2f} %. VGG16 for 32x32 images at \
rank {result["vgg_rank"]}, not
trained. *Size* is that of the file over 4 bytes per parameter, *accuracy* over all test images.

| network | format | parameters | bytes | size | parity error | accuracy (%) |
| --- | --- | --- | --- | --- | --- | --- |
{files}

Batch {result["batch"]}. *Export* is the time until the file is written and compared, with all
imports, *CPU* that of the processor. The exported network is run by torch without compilation, or
by onnxruntime.

| network | format | export (s) | CPU (s) | dense (ms) | tucker (ms) | exported (ms) |
| --- | --- | --- | --- | --- | --- | --- |
{times}

Written by `{result["command"]}`; {facts[0]}; {facts[1]}.
"""


def _file_line(row: dict[str, Any]) -> str:
    accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
    cells = [row["model"], _format(row), f"{row['parameters']:,}", f"{row['bytes']:,}"]
    cells += [f"{row['size_ratio']:.3f}", f"{row['parity']:.1e}", accuracy]
    return f"| {' | '.join(cells)} |"


def _time_line(row: dict[str, Any]) -> str:
    cells = [row["model"], _format(row), f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
    cells += [f"{row[name]:.2f}" for name in ("dense_ms", "tucker_ms", "exported_ms")]
    return f"| {' | '.join(cells)} |"


def _format(row: dict[str, Any]) -> str:
    return f"{row['format']} int8" if row["int8"] else str(row["format"])


if __name__ == "__main__":
    main()
