"""Time of the integrators next to forward and backward: VGG16, 32x32 images, rank 0.2.

    python benchmarks/integrator_overhead.py

The overhead is the time of a step without its forward and backward passes, relative to them; the
dense network with torch's SGD is measured in the same run. Every figure is the median of several
steps. Ranks stay at their start: the fixed-rank steps by their policy, the others because the step
size and the tolerance are too small to move them. Writes
benchmarks/results/integrator_overhead.json and docs/benchmarks.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdlrt
from tdlrt.experiments.models import build_model
from tdlrt.experiments.results import machine, versions

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/integrator_overhead.json"
RANK = 0.2
LR = 1e-6
EXAMINED = tdlrt.RelativeTolerance(0.01)
CASES: list[dict[str, Any]] = [
    {"integrator": "parallel", "rank_policy": tdlrt.FixedRank()},
    {"integrator": "parallel", "rank_policy": EXAMINED, "adapt_every": 10},
    {"integrator": "parallel", "rank_policy": EXAMINED},
    {"integrator": "bug", "rank_policy": EXAMINED},
    {"integrator": "bug", "rank_policy": EXAMINED, "core_steps": 4},
]


HEADER = """\
| batch | integrator | ranks examined | core steps | passes (ms) | integrator (ms) | overhead (%) \
| of dense (%) |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="batch sizes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each case")
    arguments = parser.parse_args()
    rows = []
    for batch in arguments.batches:
        dense_ms = measure_dense(batch, arguments.steps)
        for case in CASES:
            rows.append(measure(batch, case, arguments.steps) | {"dense_ms": dense_ms})
            print(line(rows[-1]), flush=True)
    result = {
        "command": "python benchmarks/integrator_overhead.py",
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (ROOT / "docs/benchmarks.md").write_text(document(result), encoding="utf-8")


def measure_dense(batch: int, steps: int) -> float:
    """Median time of a whole training step of the dense network, in ms."""
    torch.manual_seed(0)
    model = build_model("vgg16", (3, 32, 32), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    samples = [timed_step(model, optimizer, images, labels) for _ in range(steps + 2)][2:]
    return 1e3 * statistics.median(sum(sample) for sample in samples)


def measure(batch: int, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Median times of one integrator."""
    torch.manual_seed(0)
    model = build_model("vgg16", (3, 32, 32), 10)
    tdlrt.factorize_(model, rank=RANK)
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=LR, momentum=0.9, **case)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    ranks = tdlrt.summary(model).ranks
    # In groups of adapt_every, so that steps of both kinds count as often as in a training.
    samples = [timed_step(model, optimizer, images, labels) for _ in range(steps + 2)][2:]
    group = case.get("adapt_every", 1)
    overheads = [
        sum(step for _, step in samples[i : i + group])
        / sum(passes for passes, _ in samples[i : i + group])
        for i in range(0, steps, group)
    ]
    return {
        "batch": batch,
        "integrator": case["integrator"],
        "ranks": "fixed" if case["rank_policy"] == tdlrt.FixedRank() else "examined",
        "adapt_every": group,
        "core_steps": case.get("core_steps", 1),
        "passes_ms": 1e3 * statistics.median(passes for passes, _ in samples),
        "step_ms": 1e3 * statistics.mean(step for _, step in samples),
        "overhead": statistics.median(overheads),
        "ranks_moved": tdlrt.summary(model).ranks != ranks,
    }


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Seconds in forward and backward passes, and in the rest of one step."""
    spent = 0.0

    def closure() -> Tensor:
        nonlocal spent
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        spent += time.perf_counter() - start
        return loss

    step: Callable[[Callable[[], Tensor]], Any] = optimizer.step
    start = time.perf_counter()
    step(closure)
    return spent, time.perf_counter() - start - spent


def line(row: dict[str, Any]) -> str:
    every = f"every {row['adapt_every']}" if row["ranks"] == "examined" else "never"
    return (
        f"| {row['batch']} | {row['integrator']} | {every} | {row['core_steps']} "
        f"| {row['passes_ms']:.0f} | {row['step_ms']:.0f} | {100 * row['overhead']:.0f} "
        f"| {100 * (row['passes_ms'] + row['step_ms']) / row['dense_ms']:.0f} |"
    )


def document(result: dict[str, Any]) -> str:
    """The page docs/benchmarks.md."""
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    table = "\n".join(line(row) for row in result["rows"])
    return f"""\
# Benchmarks

Written by `{result["command"]}`; do not edit.

## Overhead of the integrators

VGG16 for 32x32 images, {RANK} of the channels of every mode, momentum 0.9. *Passes* is the time of
the forward and backward passes of a step (1 + core steps of them for `bug`, all but the first in
the augmented bases), *integrator* the mean time of the rest of the step, *overhead* the median of
their ratio. *Of dense* is the whole step (all of its passes and the integrator) relative to the
whole step of the dense network with torch's SGD, measured in the same run.

{HEADER}
{table}

The integrator's time does not depend on the batch. Ranks stay at their start here; in a training
they fall, and the integrator's time with them.

{facts[0]}; {facts[1]}
"""


if __name__ == "__main__":
    main()
