"""Time and size of the first linear layer of AlexNet and VGG16, as a matrix and as a tensor.

    python benchmarks/linear_tensors.py

The layers behind the flattened maps of 256 x 6 x 6 and of 512 x 7 x 7 features of the networks for
224x224 images, 4,096 outputs, batch 64, one thread: forward and backward pass, and the step of the
integrator with Adam at fixed ranks. Once with the same rank of the outputs, once with a matrix of
the size of the tensor. Writes benchmarks/results/linear_tensors.json and a section of
docs/integrator-cost.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tdlrt
from allocator import keep_freed_memory
from operations import table_section
from tdlrt.linalg import TuckerTensor
from tdlrt.nn import TuckerLinear
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/linear_tensors.json"
DOCUMENT = ROOT / "docs/integrator-cost.md"
Row = dict[str, Any]

OUTPUTS, BATCH, RANK, REPETITIONS = 4096, 64, 64, 7
MAPS = {"AlexNet": (256, 6, 6), "VGG16": (512, 7, 7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fill", action="store_true", help="only write the section")
    if not parser.parse_args().fill:
        measure()
    fill(DOCUMENT)


def fill(document: Path) -> None:
    """Put what was measured between the marks of a document."""
    fill_section(document, "linear_tensors", section(json.loads(RESULT.read_text("utf-8"))))


def measure() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for network, sizes in MAPS.items():
        inputs = math.prod(sizes)
        tensor = layer((RANK, RANK, *sizes[1:]), ((OUTPUTS,), sizes))
        # r (n + m) + r^2 = size
        n = OUTPUTS + inputs
        rank = int((math.sqrt(n * n + 4 * tensor.weight_parameters) - n) / 2)
        made = {
            "dense": nn.Linear(inputs, OUTPUTS),
            "matrix": layer((RANK, RANK), ((OUTPUTS,), (inputs,))),
            "tensor": tensor,
            "matrix of its size": layer((rank, rank), ((OUTPUTS,), (inputs,))),
        }
        for form, one in made.items():
            rows.append({"network": network, "form": form, **timed(one, inputs)})
            print(rows[-1], flush=True)
    result = {
        **made_by("python benchmarks/linear_tensors.py"),
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")


def layer(ranks: Sequence[int], modes: tuple[tuple[int, ...], tuple[int, ...]]) -> TuckerLinear:
    """A layer with a random core and bases: to truncate a weight would take minutes."""
    rows, columns = modes
    factors = [
        torch.linalg.qr(torch.randn(size, rank))[0]
        for size, rank in zip((*rows, *columns), ranks, strict=True)
    ]
    start = TuckerTensor(torch.randn(*ranks), tuple(factors))
    linear = nn.Linear(math.prod(columns), math.prod(rows))
    return TuckerLinear.from_linear(linear, rank=start, reshape=modes)


def timed(one: nn.Module, inputs: int) -> Row:
    model, x = nn.Sequential(one), torch.randn(BATCH, inputs, requires_grad=True)
    options: Row = {"lr": 1e-8}
    tucker = isinstance(one, TuckerLinear)
    optimizer: torch.optim.Optimizer = (
        tdlrt.TDLRT(model, torch.optim.Adam, rank_policy=tdlrt.FixedRank(), **options)
        if tucker
        else torch.optim.Adam(model.parameters(), **options)
    )

    def passes() -> None:
        model(x).sum().backward()

    weights = one.weight_parameters if tucker else one.weight.numel()
    return {
        "ranks": list(one.ranks) if tucker else None,
        "parameters": weights,
        "passes_ms": least(passes),
        "step_ms": least(optimizer.step),
    }


def least(function: Callable[[], Any]) -> float:
    """The shortest of several times, in milliseconds."""
    function()
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 2)


def section(result: Row) -> list[str]:
    """Lines of the section."""
    head = ["network", "weight", "ranks", "parameters", "forward, backward (ms)", "step (ms)"]
    lines = [
        [
            row["network"],
            row["form"],
            "-" if row["ranks"] is None else "x".join(map(str, row["ranks"])),
            f"{row['parameters']:,}",
            f"{row['passes_ms']:.1f}",
            f"{row['step_ms']:.1f}",
        ]
        for row in result["rows"]
    ]
    return table_section(result, TEXT.format(outputs=OUTPUTS, batch=BATCH), head, lines)


TEXT = """\
The first linear layer of AlexNet and VGG16 for 224x224 images, {outputs:,} outputs behind a map of
256 x 6 x 6 and of 512 x 7 x 7 features, as a matrix and as a tensor (`reshape`); batch {batch}, one
thread, Adam at fixed ranks, least times."""


if __name__ == "__main__":
    main()
